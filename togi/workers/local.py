"""Workers as plain objects of this process: no other processes, no copies of weights, no Ray.

State that Ray would keep per process is separated or restored here: the number of threads, deterministic algorithms (for models,
not for the engine), and the random state at the start of a model. Models compute on the caller's thread, where a debugger finds
them. Two things have their own thread: the engine, and reward models, which score while the engine generates.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Generic

import torch

from togi.config.rl import RLConfig
from togi.device import default_device
from togi.errors import WeightSyncError
from togi.obs.names import Holder
from togi.parallel.process import CUBLAS, be_deterministic
from togi.plan.machine import Machine, PeakMemory
from togi.plan.placement import IN_PROCESS, LEARNERS, Role, arithmetic, plan_groups, used_roles
from togi.weights.carriers import Rendezvous
from togi.workers.engine_worker import EnginePool, EngineWorker
from togi.workers.model_worker import LearnerWorker, ScorerWorker, take_peak
from togi.workers.protocol import Health, Method, P, Processes, SyncReport, T, W_co, call_all
from togi.workers.session import Session, engine_settings, sleepers
from togi.workers.worker_group import LearnerGroup, WorkerGroup

ALONE = Rendezvous(0, 1, "", 0)
"""The rendezvous of a single rank."""


class LocalWorkers(Generic[W_co]):
    """``Workers`` that are objects of this process. ``thread``: where they compute, None for the caller's thread."""

    def __init__(self, *workers: W_co, deterministic: bool = False, thread: ThreadPoolExecutor | None = None) -> None:
        self._workers, self._deterministic, self._thread = workers, deterministic, thread

    def __len__(self) -> int:
        return len(self._workers)

    async def call(self, index: int, method: Method[W_co, P, T], *arguments: P.args, **named: P.kwargs) -> T:
        # Deterministic algorithms are switched on per call: the engine in this process cannot use them.
        def work() -> Coroutine[object, object, T] | T:
            with deterministic(self._deterministic):
                return method(self._workers[index], *arguments, **named)

        if self._thread is None:
            result = work()
        else:
            result = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        return await result if isinstance(result, Coroutine) else result


class LocalWeights:
    """``Weights`` that pass the actor's tensors to the engine without a copy. Never called in a replay, which has no engine."""

    def __init__(self, actor: LearnerWorker, engines: Sequence[EngineWorker], timeout: float) -> None:
        self._actor, self._engines, self._timeout = actor, tuple(engines), timeout

    async def send(self, version: int) -> SyncReport:
        (engine,), start = self._engines, time.perf_counter()
        manifest, tensors = self._actor.weights(version)
        try:
            await asyncio.wait_for(engine.take_weights(manifest, tensors), self._timeout)
        except TimeoutError:
            raise WeightSyncError(
                f"The engine did not load the weights of version {version} within --weight_sync_timeout {self._timeout:.0f} s."
            ) from None
        return SyncReport(version, manifest.nbytes, time.perf_counter() - start, "")


class LocalMeter:
    """Peak memory of this process. On a GPU: GPU memory, of which engines count only what torch has allocated."""

    def __init__(self) -> None:
        self._memory, self._device = PeakMemory(), default_device()

    async def take_peaks(self) -> dict[Holder, list[int]]:
        return {Holder.ALL: [take_peak(self._memory, self._device)]}

    async def highest(self) -> dict[str, int]:
        return {"local": self._memory.highest}


async def start(config: RLConfig, machine: Machine, updates: Mapping[Role, int], health: Health) -> Session:
    """Load the engine, then every model, one after the other, because they share the threads and random state of the process.

    ``updates``: planned optimizer steps of each learner.
    """
    roles = used_roles(config)
    health.announce(f"placement: {arithmetic(plan_groups(config), IN_PROCESS)}")
    with ExitStack() as undo:
        # Stage 1: the process. CuBLAS reads its workspace setting once, at its first use.
        for name, value in CUBLAS.items():
            os.environ.setdefault(name, value)
        undo.enter_context(threads(machine.cpus))
        # Stage 2: the engine, which measures the free memory.
        engines = []
        if config.generates:
            engines.append(EngineWorker())
            await engines[0].start(config.rollout_engine, engine_settings(config, 0, machine.cpus, health.step))
            undo.callback(engines[0].stop)
        pool, asleep = EnginePool(LocalWorkers(*engines)), sleepers(config) & {Holder.ENGINES}
        if asleep:  # frees the memory that the engine has reserved but does not use yet, for the models
            await call_all(pool.workers, EngineWorker.sleep, keep_weights=False)

        # Stage 3: models in training, then frozen models.
        scoring = ThreadPoolExecutor(1, "reward models")
        undo.callback(partial(scoring.shutdown, wait=False, cancel_futures=True))
        learners = dict[Role, LearnerGroup]()
        scorers = list[WorkerGroup[ScorerWorker]]()
        for role in LEARNERS:
            if role in roles:
                learner = LearnerWorker()
                ranks = LocalWorkers(learner, deterministic=config.full_determinism)
                await ranks.call(0, LearnerWorker.start, ALONE, config, role, updates[role])
                learners[role] = LearnerGroup(role, ranks, share_prompts=config.share_prompts)
                if role is Role.ACTOR:
                    weights = LocalWeights(learner, engines, config.weight_sync_timeout)
        models: list[tuple[Role, str, ThreadPoolExecutor | None]] = []
        if config.loads_reference:
            models.append((Role.REF, config.pretrain, None))
        models += [(Role.REWARD, path, scoring) for path in config.scoring_models]
        for role, path, thread in models:
            scorer = LocalWorkers(ScorerWorker(), deterministic=config.full_determinism, thread=thread)
            await scorer.call(0, ScorerWorker.start, ALONE, config, role, path)
            scorers.append(WorkerGroup(role, scorer, share_prompts=config.share_prompts))
        # Success: the session now owns the cleanup.
        end = undo.pop_all().close
    return Session(config, pool, learners, scorers, weights, LocalMeter(), asleep, end, health, Processes())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use as many threads as a worker process would have; restore the number at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Deterministic algorithms inside the block, if wanted. Engines have operations that do not support them."""
    if not wanted:
        yield
        return
    before, precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    be_deterministic()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.set_float32_matmul_precision(precision)
