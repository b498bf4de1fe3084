"""How the objects that do a run's work are called, wherever they are, and what a run asks of them besides.

A ``LearnerWorker``, a ``ScorerWorker`` or an ``EngineWorker`` is a plain object. ``Workers`` are several of one class: in this
process (``togi.workers.local``) or each in a process of its own (``togi.workers.ray``).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from togi.obs.names import Holder

W_co = TypeVar("W_co", covariant=True)
T = TypeVar("T")
P = ParamSpec("P")


class Workers(Protocol[W_co]):
    """Objects of class W_co, in an order."""

    def __len__(self) -> int: ...

    async def call(
        self,
        index: int,
        method: Callable[Concatenate[W_co, P], Coroutine[Any, Any, T] | T],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> T:
        """The result of ``method`` of object ``index``; the methods of an ``EngineWorker`` are coroutines."""
        ...


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One weight update: bytes that each engine got, and seconds from the first call to the last confirmation.

    ``checksum``: of the weights, the same on every rank of the actor and every engine; "" where none travelled.
    """

    version: int
    nbytes: int
    seconds: float
    checksum: str

    @property
    def gb_per_second(self) -> float:
        return self.nbytes / 1e9 / self.seconds


class Weights(Protocol):
    """The way from the actor to the engines."""

    async def send(self, version: int) -> SyncReport:
        """Give every engine the actor's present weights as ``version``. Raises WeightSyncError."""
        ...


class Meter(Protocol):
    """What the processes of a run occupy, in bytes."""

    async def take_peaks(self) -> Mapping[Holder, Sequence[int]]:
        """Of each kind of process, the peaks since the last call."""
        ...

    async def highest(self) -> Mapping[str, int]:
        """By the name of the process, the largest peak so far."""
        ...
