"""What asynchronous RL would do on a given machine: the scheduling rules of the pump on a virtual clock.

An engine runs so many groups at once, each for a time drawn from a distribution; a trainer takes one batch after the other.
Each of these conventions decides some figure:

* A group is one sequence: its tokens come at a constant rate over its time, and its length is that time.
* Groups that are admitted while the engine is full wait in its queue. The version of a group is that at its start.
* A publish pauses the engine; what runs goes on afterwards (vLLM's ``pause_generation(mode="keep")``). The version changes at
  its end. A run starts with nothing at work and ends with its last publish.
* Trained length: the mean of trained groups over the mean of all that were admitted, also those that are still at work.
* Lost: dropped and cancelled groups among those and the trained ones.
* The disciplines of other frameworks are here for comparison. ``Window``: a batch takes ready groups fewer than W numbers after
  the oldest one. ``Finished``: no capacity. Finished groups queue in the order in which they finish, and no group starts while
  4 P or more are in the queue. Groups above a lag leave the queue when the trainer looks, and with ``cancels`` the engine too.

Not in it: an engine gets slower with more requests at once; prefill, rewards and scoring take no time.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from togi.config.choices import OnStale
from togi.plan.slots import Rules, Slot, Slots


@dataclass(frozen=True, slots=True)
class Machine:
    """``batch``: P, groups a step. ``concurrency``: groups that the engine runs at once. ``episode``: prompts in one."""

    batch: int = 32
    concurrency: int = 48
    train_seconds: float = 60.0
    sync_seconds: float = 3.0
    filtered_share: float = 0.0
    episode: int | None = None


def lognormal(mean: float, sigma: float, rng: random.Random) -> Iterator[float]:
    """Endless group times in seconds with this mean; ``sigma`` is the standard deviation of their logarithm."""
    while True:
        yield math.exp(rng.gauss(math.log(mean) - sigma**2 / 2, sigma))


def resampled(times: Sequence[float], rng: random.Random) -> Iterator[float]:
    """Endless group times in seconds, drawn from those of a run."""
    while True:
        yield rng.choice(times)


@dataclass(slots=True)
class Group:
    """``seconds``: of generation. ``start``: on the engine's clock, which stands still during a publish; None while it queues.

    ``version``: that of the weights at the start.
    """

    slot: Slot
    seconds: float
    is_filtered: bool
    start: float | None = None
    version: int = 0

    @property
    def lag(self) -> int:
        """Of its oldest token, in versions; of a trained group."""
        assert self.slot.trained is not None
        return self.slot.trained - self.slot.oldest


@dataclass
class Simulation:
    """One run. ``published``: when each version came, on the engine's clock."""

    machine: Machine
    slots: Slots
    times: Iterator[float]
    rng: random.Random
    seconds: float = 0.0
    admitted: list[Group] = field(default_factory=list)
    trained: list[Group] = field(default_factory=list)
    steps: int = 0
    lost: int = 0
    published: list[float] = field(default_factory=lambda: [0.0])
    held_seconds: float = 0.0
    run_seconds: float = 0.0
    _running: dict[int, Group] = field(default_factory=dict)
    _ends: list[tuple[float, int]] = field(default_factory=list)
    _waiting: deque[Group] = field(default_factory=deque)
    _trained_at: float = math.inf

    def run(self, steps: int) -> "Simulation":
        """Until so many batches are trained and published."""
        while self.steps < steps:
            self._admit()
            if self._trained_at == math.inf:
                self._take()
                self._admit()
            self._next()
        return self

    @property
    def _clock(self) -> float:
        return self.seconds - self.machine.sync_seconds * self.steps

    @property
    def _episode(self) -> int:
        return len(self.admitted) // self.machine.episode if self.machine.episode else 0

    def _admit(self) -> None:
        while self.slots.may_admit(self._episode):
            slot = self.slots.admit(self._episode)
            group = Group(slot, next(self.times), self.rng.random() < self.machine.filtered_share)
            self.admitted.append(group)
            self._waiting.append(group)
        while self._waiting and len(self._running) < self.machine.concurrency:
            group = self._waiting.popleft()
            group.start, group.version = self._clock, self.slots.version
            self._running[group.slot.number] = group
            heapq.heappush(self._ends, (group.start + group.seconds, group.slot.number))

    def _take(self) -> None:
        for slot in self.slots.drop():
            self.lost += 1
            self._running.pop(slot.number, None)
        batch = self.slots.take(exhausted=self._episode)
        if batch is not None:
            self.trained += [self.admitted[slot.number] for slot in batch]
            self._trained_at = self.seconds + self.machine.train_seconds

    def _next(self) -> None:
        """The next event: a group ends, or a batch is trained and published."""
        while self._ends and self._ends[0][1] not in self._running:
            heapq.heappop(self._ends)  # was cancelled
        group_ends = self._ends[0][0] + self.seconds - self._clock if self._ends else math.inf
        self._advance(min(group_ends, self._trained_at))
        if self._trained_at <= group_ends:
            self._trained_at = math.inf
            self.held_seconds += len(self.slots) * self.machine.sync_seconds
            self.seconds += self.machine.sync_seconds
            self.steps += 1
            self.published.append(self._clock)
            self.slots.published(self.steps)
        else:
            group = self._running.pop(heapq.heappop(self._ends)[1])
            if group.is_filtered:
                self.slots.filtered(group.slot)
            else:
                self.slots.ready(group.slot, group.version)

    def _advance(self, to: float) -> None:
        assert to < math.inf, "nothing is at work"
        self.held_seconds += len(self.slots) * (to - self.seconds)
        self.run_seconds += len(self._running) * (to - self.seconds)
        self.seconds = to

    def masked(self, max_lag: int) -> tuple[float, float]:
        """The share of trained tokens that are more than ``max_lag`` versions old, and of groups that have such tokens."""
        masked = [self._masked_seconds(group, max_lag) for group in self.trained]
        seconds = sum(group.seconds for group in self.trained)
        return sum(masked) / seconds, sum(value > 0 for value in masked) / len(masked)

    def _masked_seconds(self, group: Group, max_lag: int) -> float:
        assert group.start is not None and group.slot.trained is not None
        oldest = group.slot.trained - max_lag
        return min(max(self.published[oldest] - group.start, 0.0), group.seconds) if oldest > 0 else 0.0

    def report(self) -> "Report":
        machine = self.machine
        offered = [group.seconds for group in self.admitted if not group.is_filtered]
        return Report(
            seconds=self.seconds,
            max_lag=max(group.lag for group in self.trained),
            lost=self.lost / (self.lost + len(self.trained)),
            trained_length=fmean(group.seconds for group in self.trained) / fmean(offered),
            occupancy=self.held_seconds / self.seconds / self.slots.rules.capacity,
            trainer_idle=1 - self.steps * (machine.train_seconds + machine.sync_seconds) / self.seconds,
            engine_idle=1 - self.run_seconds / self.seconds / machine.concurrency,
        )


@dataclass(frozen=True, slots=True)
class Report:
    """Of one run. ``seconds``: of the virtual clock. ``max_lag``: of groups, in versions. All others are shares.

    ``occupancy``: of the (S + 1) P slots, those that are not released, on average (``Finished`` has more than these).
    ``trainer_idle``: of the time, neither training nor publishing. ``engine_idle``: of the engine's room for groups; all of it
    is idle during a publish.
    """

    seconds: float
    max_lag: int
    lost: float
    trained_length: float
    occupancy: float
    trainer_idle: float
    engine_idle: float


class Window(Slots):
    """First in, first out within a window of W numbers from the oldest group; W = 1 is strict."""

    def __init__(self, rules: Rules, window: int) -> None:
        super().__init__(rules)
        self.window = window

    def take(self, *, exhausted: int) -> list[Slot] | None:
        left, batch = self.outstanding, list[Slot]()
        while left and len(batch) < self.rules.batch:
            within = left[0].number + self.window
            found = next((slot for slot in left if slot.is_ready and slot.number < within), None)
            if found is None:
                return None
            left.remove(found)
            batch.append(found)
        return self._trained(batch) if len(batch) == self.rules.batch else None


class Finished(Slots):
    """No capacity: takes groups in the order in which they finish, and keeps the engine full until 4 P of them are left over."""

    def __init__(self, rules: Rules, concurrency: int, *, cancels: bool) -> None:
        super().__init__(rules)
        self.concurrency, self.cancels = concurrency, cancels
        self.queue = list[Slot]()

    def may_admit(self, episode: int, steps: float = math.inf) -> bool:
        running = len(self) - len(self.queue) - self.rules.batch * (self._next_trained - self.version)
        return running < self.concurrency and len(self.queue) < 4 * self.rules.batch

    def ready(self, slot: Slot, oldest: int) -> None:
        super().ready(slot, oldest)
        self.queue.append(slot)

    def drop(self) -> list[Slot]:
        limit = self._next_trained - self.rules.max_lag
        dropped = [slot for slot in self.outstanding if slot.oldest < limit and (slot.is_ready or self.cancels)]
        for slot in dropped:
            self.filtered(slot)
        self.queue = [slot for slot in self.queue if slot.oldest >= limit]
        return dropped

    def take(self, *, exhausted: int) -> list[Slot] | None:
        if len(self.queue) < self.rules.batch:
            return None
        batch, self.queue = self.queue[: self.rules.batch], self.queue[self.rules.batch :]
        return self._trained(batch)


Discipline = Callable[[Machine], Slots]

SYNCHRONOUS = "synchronous"
CAPACITY = "capacity rule, S 2"
DISCIPLINES: dict[str, Discipline] = {
    SYNCHRONOUS: lambda machine: Slots(Rules(machine.batch, 0, OnStale.MASK, 0)),
    "strict FIFO, S 1": lambda machine: Window(Rules(machine.batch, 1, OnStale.MASK, 1), 1),
    "windowed FIFO 0.3, S 2": lambda machine: Window(
        Rules(machine.batch, 2, OnStale.MASK, 2), int(0.9 * machine.batch)
    ),
    CAPACITY: lambda machine: Slots(Rules(machine.batch, 2, OnStale.MASK, 6)),
    "capacity and wait at 6, S 2": lambda machine: Slots(Rules(machine.batch, 2, OnStale.WAIT, 6)),
    "drop > 4": lambda machine: Finished(Rules(machine.batch, 4, OnStale.DROP, 4), machine.concurrency, cancels=False),
    "cancel > 8": lambda machine: Finished(Rules(machine.batch, 4, OnStale.DROP, 8), machine.concurrency, cancels=True),
}


def simulate(
    discipline: Discipline,
    machine: Machine,
    times: Callable[[random.Random], Iterator[float]],
    *,
    steps: int,
    seed: int,
) -> Simulation:
    """A finished run of ``steps`` batches; ``times`` makes the group times, the same for every discipline of a seed."""
    rng = random.Random(seed)
    return Simulation(machine, discipline(machine), times(rng), random.Random(seed + 1)).run(steps)
