"""The phases of a run, and who may hold memory in each.

Engines hold key-value caches while they generate, evaluate and load weights. Learners hold what only an optimizer step needs
(``Backend.at_rest``) while they train and save. With ``--vllm_enable_sleep`` and ``--trainer_enable_sleep`` the others sleep.
Those that must release memory go first, then those that may take it. After a sleep the measured memory must have fallen.
Working weights always stay, because any rank may have to score.

The peak of each phase is measured whether or not anything sleeps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from enum import StrEnum

from togi.obs import names
from togi.obs.names import Holder
from togi.plan.memory import Released
from togi.workers.engine_worker import EnginePool
from togi.workers.model_worker import LearnerWorker
from togi.workers.protocol import Meter
from togi.workers.worker_group import LearnerGroup


class Phase(StrEnum):
    START = "start"
    GENERATE = "generate"
    SCORE = "score"
    TRAIN = "train"
    SYNC = "sync"
    SAVE = "save"
    EVALUATE = "evaluate"


# Scorers keep only working weights, so just these two can sleep.
SLEEPING = frozenset({Holder.ENGINES, Holder.LEARNERS})
MAY_HOLD: Mapping[Phase, frozenset[Holder]] = {
    Phase.START: SLEEPING,
    Phase.GENERATE: frozenset({Holder.ENGINES}),
    Phase.SCORE: frozenset(),
    Phase.TRAIN: frozenset({Holder.LEARNERS}),
    Phase.SYNC: frozenset({Holder.ENGINES}),
    Phase.SAVE: frozenset({Holder.LEARNERS}),
    Phase.EVALUATE: frozenset({Holder.ENGINES}),
}


class Phases:
    """The phase machine of a run. ``sleepers``: who may sleep; ``asleep``: who sleeps already.

    ``adapted``: the weights sent are masters of an adapter, alone or merged, so learners stay awake for a sync.
    """

    def __init__(
        self,
        engines: EnginePool,
        learners: Sequence[LearnerGroup],
        meter: Meter,
        sleepers: frozenset[Holder],
        asleep: frozenset[Holder],
        *,
        adapted: bool,
    ) -> None:
        self._engines, self._learners, self._meter = engines, tuple(learners), meter
        self._sleepers, self._adapted = sleepers, adapted
        self._asleep = set(asleep)
        self._values = dict[str, float]()
        self.current = Phase.START

    async def enter(self, phase: Phase) -> None:
        """End the current phase and enter ``phase``: measure, sleep, wake. Raises RunError if memory did not fall."""
        if phase is self.current:
            return
        await self._measure()
        may_hold = MAY_HOLD[phase]
        # The masters of an adapter are part of what sleeps.
        if phase is Phase.SYNC and self._adapted:
            may_hold |= {Holder.LEARNERS}
        # Release before taking: both may share one GPU.
        for holder in sorted((self._sleepers - may_hold) - self._asleep):
            await self._sleep(holder)
        for holder in sorted(self._asleep & may_hold):
            await self._wake(holder)
        assert not self._asleep & may_hold and self._sleepers - may_hold == self._asleep
        self.current = phase

    async def take_metrics(self) -> dict[str, float]:
        """GB by metric name since the last call: per phase the sum over workers of their peaks, and the released memory."""
        await self._measure()
        values, self._values = self._values, {}
        return values

    async def _measure(self) -> None:
        for kind, peaks in (await self._meter.take_peaks()).items():
            if peaks:
                name = names.phase_memory(self.current, kind)
                self._values[name] = max(self._values.get(name, 0.0), sum(peaks) / 1e9)

    async def _sleep(self, holder: Holder) -> None:
        self._asleep.add(holder)
        if holder is Holder.ENGINES:
            slept: list[Released] = await self._engines.sleep()
            released = {f"engine {number}": each for number, each in enumerate(slept)}
        else:
            released = {
                f"{group.role} {rank}": each
                for group in self._learners
                for rank, each in enumerate(await group.call_all(LearnerWorker.sleep))
            }
        # A sleeper that released nothing would make the next phase run out of memory, so it raises here.
        for who, each in released.items():
            each.check(who)
        self._values[names.released_memory(holder)] = sum(each.nbytes for each in released.values()) / 1e9

    async def _wake(self, holder: Holder) -> None:
        if holder is Holder.ENGINES:
            await self._engines.wake()
        else:
            await asyncio.gather(*(group.call_all(LearnerWorker.wake) for group in self._learners))
        self._asleep.discard(holder)
