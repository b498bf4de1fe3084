"""How the objects that do the work of a run are called, wherever they are, and what a run asks of them besides.

``LearnerWorker``, ``ScorerWorker`` and ``EngineWorker`` are plain objects. ``Workers`` are several objects of one class: in this
process (``togi.workers.local``) or each in its own process (``togi.workers.ray``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar, overload

from togi.errors import WorkerDied
from togi.obs import names
from togi.obs.names import Holder
from togi.obs.progress import duration
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


logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Health:
    """How the workers of a run are, over all its attempts: restarts, and calls that are not answered yet.

    ``limit``: of all restarts together. ``step``: the rollouts that the run had when it was started or resumed. ``stacks``: the
    folder where a worker writes its stacks when it is asked to.
    """

    limit: int = 0
    announce: Callable[[str], None] = logger.info
    step: int = 0
    stacks: Path | None = None
    engines: int = 0
    runs: int = 0
    has_stalled: bool = False
    # who, method and start of each call, by a number; and when the last one was answered, in seconds of ``time.monotonic``
    _calls: dict[int, tuple[str, str, float]] = field(default_factory=dict)
    _number: int = 0
    answered: float = field(default_factory=time.monotonic)

    def allow(self, died: WorkerDied, what: str) -> None:
        """Count the restart of ``what`` and say so. Raises ``died`` if there were enough."""
        if self.engines + self.runs >= self.limit:
            raise died
        if what.startswith("engine"):
            self.engines += 1
        else:
            self.runs += 1
        number = self.engines + self.runs
        self.announce(f"{died}; {what} is restarted ({number} of at most {self.limit} restarts)")

    def metrics(self) -> dict[str, float]:
        """The restarts so far, by metric name; empty if there were none."""
        counts = {names.RESTARTS_ENGINES: self.engines, names.RESTARTS_RUN: self.runs}
        return {name: float(count) for name, count in counts.items() if self.engines + self.runs > 0}

    @contextmanager
    def calling(self, who: str, method: str) -> Iterator[None]:
        """One call to a worker. Looking after it is no progress."""
        if method in ("beat", "device_type"):
            yield
            return
        if not self._calls:
            self.answered = time.monotonic()
        self._number += 1
        key = self._number
        self._calls[key] = (who, method, time.monotonic())
        try:
            yield
            self.answered = time.monotonic()
        finally:
            del self._calls[key]

    def stalled_for(self) -> float:
        """Seconds since a worker has answered, while others are waited for."""
        return time.monotonic() - self.answered if self._calls else 0.0

    def waiting(self) -> list[str]:
        """Whom the run waits for, longest first, one line for each worker and method."""
        since: dict[tuple[str, str], list[float]] = {}
        for who, method, start in self._calls.values():
            since.setdefault((who, method), []).append(start)
        now = time.monotonic()
        return [
            f"{who} has not answered {method} for {duration(now - min(starts))}"
            + (f" ({len(starts)} calls)" if len(starts) > 1 else "")
            for (who, method), starts in sorted(since.items(), key=lambda item: min(item[1]))
        ]


class Processes:
    """The processes that the workers of a run have. In this class they have none of their own."""

    async def find_dead(self) -> WorkerDied | None:
        """A model worker that has died: this shows first as an error of those that computed with it."""
        return None

    def kill_engines(self) -> None:
        """End the engines at once, whatever they do."""

    async def write_stacks(self) -> None:
        """Let each write the stacks of its threads into ``Health.stacks``."""
