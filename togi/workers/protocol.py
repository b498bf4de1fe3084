"""How the objects that do the work of a run are called, wherever they are, and what a run asks of them besides.

``LearnerWorker``, ``ScorerWorker`` and ``EngineWorker`` are plain objects. ``Workers`` are several objects of one class: in this
process (``togi.workers.local``) or each in its own process (``togi.workers.ray``).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, Protocol, TypeVar, overload

from togi.obs.names import Holder
from togi.rollout.collect import all_or_none

W = TypeVar("W")
W_co = TypeVar("W_co", covariant=True)
T = TypeVar("T")
P = ParamSpec("P")
Method = Callable[Concatenate[W, P], Coroutine[object, object, T] | T]
"""A method of class W, with its arguments and its result. Those of an ``EngineWorker`` are coroutines."""


class Workers(Protocol[W_co]):
    """Objects of class W_co, in a fixed order."""

    def __len__(self) -> int: ...

    async def call(self, index: int, method: Method[W_co, P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """The result of ``method`` on object ``index``."""


@overload
async def call_all(
    workers: Workers[W],
    method: Callable[Concatenate[W, P], Coroutine[object, object, T]],
    *arguments: P.args,
    **named: P.kwargs,
) -> list[T]: ...
@overload
async def call_all(
    workers: Workers[W], method: Callable[Concatenate[W, P], T], *arguments: P.args, **named: P.kwargs
) -> list[T]: ...
async def call_all(workers: Workers[W], method: Method[W, P, T], *arguments: P.args, **named: P.kwargs) -> list[T]:
    """The results of the same call on every object, in order. The first failure is raised without waiting for the others."""
    return await all_or_none(workers.call(index, method, *arguments, **named) for index in range(len(workers)))


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One weight update. ``nbytes``: bytes per engine; ``seconds``: from the first call to the last confirmation.

    ``checksum``: of the weights, the same on every rank of the actor and every engine; "" if the weights were not copied.
    """

    version: int
    nbytes: int
    seconds: float
    checksum: str

    @property
    def gb_per_second(self) -> float:
        return self.nbytes / 1e9 / self.seconds


class Weights(Protocol):
    """The transport of weights from the actor to the engines."""

    async def send(self, version: int) -> SyncReport:
        """Send the actor's current weights to every engine as ``version``. Raises WeightSyncError."""


class Meter(Protocol):
    """Memory of the processes of a run, in bytes."""

    async def take_peaks(self) -> Mapping[Holder, Sequence[int]]:
        """The peaks since the last call, for each kind of process."""

    async def highest(self) -> Mapping[str, int]:
        """The highest peak so far, by the name of the process."""
