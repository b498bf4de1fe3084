"""Engines under Ray that are restarted in their place, weight updates that survive it, and the processes of a run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from togi.config.rl import RLConfig
from togi.errors import RunError, WeightSyncError, WorkerDied, WorkerError
from togi.plan.placement import Route
from togi.weights.updates import check_probe, compare
from togi.workers.engine_worker import EnginePool, EngineWorker
from togi.workers.model_worker import LearnerWorker
from togi.workers.protocol import Health, Processes, SyncReport
from togi.workers.ray.cluster import STACKS_SIGNAL, EngineActor, ModelActor, RayWorkers, Watched, this_node
from togi.workers.ray.weight_sync import WeightSync
from togi.workers.worker_group import LearnerGroup

LOOK_SECONDS = 15.0
"""A worker that is dead says so at once; one that computes may not answer at all."""
STACKS_SECONDS = 10.0


class EngineCare:
    """The ``Weights`` of a run whose engines are restarted in their place.

    ``start``: starts the engine of an index in its new process.
    """

    def __init__(
        self,
        engines: RayWorkers[EngineActor],
        start: Callable[[int], Awaitable[None]],
        sync: WeightSync,
        actor: LearnerGroup,
        config: RLConfig,
        health: Health,
    ) -> None:
        self.sync, self.pool = sync, EnginePool(engines, self.revive)
        self._engines, self._start, self._actor, self._config, self._health = engines, start, actor, config, health
        # One transfer at a time.
        self._lock = asyncio.Lock()

    @property
    def route(self) -> Route:
        return self.sync.route

    async def send(self, version: int) -> SyncReport:
        """``WeightSync.send`` to all engines, and once more when one that died meanwhile is back."""
        self.pool.version = None  # an engine that comes back waits for this update
        while True:
            await self.pool.settled()
            try:
                async with self._lock:
                    report = await self.sync.send(version)
            except (WorkerError, WeightSyncError):
                # An engine's death shows as its own, as a deadline, or as an error of those that it was connected to.
                if not await self.pool.any_lost():
                    raise
            else:
                self.pool.arrived(version)
                return report

    async def revive(self, index: int, died: WorkerDied, lost: int) -> bool:
        """Restart an engine. Returns whether it has the present weights; if the actor trains, the next update brings them.

        Raises ``died`` if there were enough restarts.
        """
        if self._config.vllm_enable_sleep:
            # It would take the memory that the models have now: the whole run restarts.
            self._engines.respawn(index)
            raise died
        while True:
            self._health.allow(died, f"engine {index}" + (f", {lost} requests are repeated," if lost > 0 else ""))
            try:
                # The old process first: an update that it was part of ends with it, also if it only hung.
                self._engines.respawn(index)
                async with self._lock:
                    return await self._restart(index)
            except WorkerDied as again:
                if again.who != died.who:
                    raise
                died = again

    async def _restart(self, index: int) -> bool:
        await self._start(index)
        await self._engines.watch(index)
        self.sync.connected = ()
        version = self.pool.version
        if version is not None:
            await self._bring(index, version)
        return version is not None

    async def _bring(self, index: int, version: int) -> None:
        """Send the present weights to one engine alone, and compare it with the trainer."""
        # Masters of an adapter are part of what sleeps.
        asleep = self._config.lora is not None and self._config.trainer_sleeps
        if asleep:
            await self._actor.call_all(LearnerWorker.wake)
        await self.sync.send(version, only=index)
        sample = self.pool.probed
        if sample is not None:
            trainer = (await self._actor.call_all(LearnerWorker.logprobs, [sample], 1.0))[0][0]
            check_probe(compare(await self._engines.call(index, EngineWorker.score, sample.tokens.tolist()), trainer))
        if asleep:
            await self._actor.call_all(LearnerWorker.sleep)


class RayProcesses(Processes):
    """The worker processes of a run under Ray."""

    def __init__(self, engines: RayWorkers[EngineActor], models: Sequence[RayWorkers[ModelActor]]) -> None:
        self._engines, self._models = engines, models

    async def watch(self) -> None:
        """Learn where each runs, and let it write its stacks when it is asked to."""
        everyone: list[RayWorkers[Watched]] = [self._engines, *self._models]
        await asyncio.gather(*(workers.watch(index) for workers in everyone for index in range(len(workers))))

    async def find_dead(self) -> WorkerDied | None:
        looks = [self._look(workers, rank) for workers in self._models for rank in range(len(workers))]
        return next((died for died in await asyncio.gather(*looks) if died is not None), None)

    async def _look(self, workers: RayWorkers[ModelActor], rank: int) -> WorkerDied | None:
        try:
            await asyncio.wait_for(workers.call(rank, ModelActor.device_type), LOOK_SECONDS)
        except WorkerDied as died:
            return died
        except (TimeoutError, RunError):
            pass
        return None

    def kill_engines(self) -> None:
        for handle in self._engines.handles:
            ray.kill(handle)

    async def write_stacks(self) -> None:
        nodes: dict[str, list[int]] = {}
        for workers in (self._engines, *self._models):
            for node, process in workers.processes.values():
                nodes.setdefault(node, []).append(process)
        ask_for_stacks(nodes.pop(this_node(), []))
        remote = ray.remote(ask_for_stacks)
        for node, processes in nodes.items():  # their files are on the node, unless the folder is shared
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            remote.options(num_cpus=0, scheduling_strategy=there).remote(processes)
        await asyncio.sleep(STACKS_SECONDS if nodes else 1.0)  # until they are written


def ask_for_stacks(processes: Sequence[int]) -> None:
    """Let processes of this node write the stacks of their threads (``Watched.watch``)."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, STACKS_SIGNAL)
