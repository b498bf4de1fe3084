"""Start the workers of a run as Ray processes, placed over the GPUs and nodes of a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TypeVar

import ray

from togi.config.rl import RLConfig
from togi.obs.names import Holder
from togi.obs.way_out import way_out
from togi.plan.machine import Machine
from togi.plan.placement import LEARNERS, Role, arithmetic, engines_first, plan_groups, team_size, used_roles
from togi.rollout.collect import all_or_none
from togi.weights.carriers import Rendezvous
from togi.workers.engine_worker import EnginePool
from togi.workers.model_worker import LearnerWorker, ModelWorker, ScorerWorker
from togi.workers.protocol import Health, call_all
from togi.workers.ray.cluster import Cluster, EngineActor, LearnerActor, ModelActor, RayWorkers, ScorerActor, connect
from togi.workers.ray.healing import EngineCare, RayProcesses
from togi.workers.ray.weight_sync import WeightSync
from togi.workers.session import Session, engine_settings, sleepers
from togi.workers.worker_group import LearnerGroup, WorkerGroup

M = TypeVar("M", bound=ModelActor)
S = TypeVar("S", int, str)
MAX_CONCURRENT_CALLS = 4096


async def start(config: RLConfig, machine: Machine, updates: Mapping[Role, int], health: Health) -> Session:
    """Connect, place, and load all models concurrently: start-up is import and disk time, which overlaps.

    ``updates``: planned optimizer steps of each learner.
    """
    groups, resources = plan_groups(config), connect(config, machine)
    try:
        health.announce(f"placement: {arithmetic(groups, 'GPUs' if resources.gpus > 0 else 'worker processes')}")
        cluster = Cluster(groups, resources, health, overlaps=config.max_staleness > 0)
        session = await _start_all(config, cluster, updates, health)
        if resources.gpus > 0 and (await session.actor.call_all(LearnerWorker.device_type))[0] == "cpu":
            health.announce(
                "placement: these GPUs are declared only, so each is a process that computes on the CPU, over gloo"
            )
        if line := cluster.describe_nodes():
            health.announce(f"nodes: {line}")
        return session
    except BaseException:
        with way_out("leaving the cluster"):
            ray.shutdown()
        raise


async def _start_all(config: RLConfig, cluster: Cluster, updates: Mapping[Role, int], health: Health) -> Session:
    # Stage 1: start all processes at once.
    engines = cluster.start(EngineActor, Role.ENGINE, concurrency=MAX_CONCURRENT_CALLS)
    trained = {role: cluster.start(LearnerActor, role) for role in LEARNERS if role in used_roles(config)}
    frozen = [(Role.REF, config.pretrain, cluster.start(ScorerActor, Role.REF))] if config.loads_reference else []
    for number, path in enumerate(config.scoring_models):
        frozen.append((Role.REWARD, path, cluster.start(ScorerActor, Role.REWARD, number=number)))

    # Stage 2: load.
    actor, asleep = trained[Role.ACTOR], sleepers(config) & {Holder.ENGINES}
    start_engine = _engine_starter(config, cluster, engines, actor, health)
    loading = [_load_engines(engines, start_engine)]
    if engines_first(config, on_gpu=cluster.resources.gpus > 0):
        await loading.pop()
    if asleep:  # the models can use the memory that they release
        await call_all(engines, EngineActor.sleep, keep_weights=False)
    loading += [load(ranks, LearnerActor.start, config, role, updates[role]) for role, ranks in trained.items()]
    loading += [load(ranks, ScorerActor.start, config, role, path) for role, path, ranks in frozen]
    await asyncio.gather(*loading)

    # Stage 3: connect actor and engines.
    sync = await WeightSync.open(actor, engines, config)
    if config.generates:
        health.announce(sync.route.describe())
    # Stage 4: the groups that the session calls.
    share, teams = config.share_prompts, {role: team_size(config, role) for role in Role}
    learners = {
        role: LearnerGroup(role, ranks, share_prompts=share, ranks_per_share=teams[role])
        for role, ranks in trained.items()
    }
    scorers = [
        WorkerGroup[ScorerWorker](role, ranks, share_prompts=share, ranks_per_share=teams[role])
        for role, _, ranks in frozen
    ]
    # Stage 5: who looks after them.
    weights = EngineCare(engines, start_engine, sync, learners[Role.ACTOR], config, health)
    meter = RayMeter(weights.pool, list(learners.values()), scorers)
    processes = RayProcesses(engines, [*trained.values(), *(ranks for _, _, ranks in frozen)])
    await processes.watch()
    weights.pool.watch(config.engine_timeout)

    def end() -> None:
        cluster.close()
        ray.shutdown()

    return Session(config, weights.pool, learners, scorers, weights, meter, asleep, end, health, processes)


class RayMeter:
    """A ``Meter`` that asks each worker process."""

    def __init__(
        self,
        engines: EnginePool,
        learners: Sequence[LearnerGroup],
        scorers: Sequence[WorkerGroup[ScorerWorker]],
    ) -> None:
        self._engines, self._learners, self._scorers = engines, tuple(learners), tuple(scorers)

    async def take_peaks(self) -> dict[Holder, list[int]]:
        peaks = {Holder.ENGINES: await self._engines.on_all(EngineActor.take_peak)}
        for holder, groups in ((Holder.LEARNERS, self._learners), (Holder.SCORERS, self._scorers)):
            peaks[holder] = [peak for group in groups for peak in await group.call_all(ModelWorker.take_peak)]
        return peaks

    async def highest(self) -> dict[str, int]:
        numbered = {Role.ENGINE: await self._engines.on_all(EngineActor.memory_bytes)}
        for learner in self._learners:
            numbered[learner.role] = await learner.call_all(ModelWorker.memory_bytes)
        for scorer in self._scorers:
            numbered.setdefault(scorer.role, []).extend(await scorer.call_all(ModelWorker.memory_bytes))
        return {f"{role}{n}": nbytes for role, peaks in numbered.items() for n, nbytes in enumerate(peaks)}


async def load(
    ranks: RayWorkers[M],
    start: Callable[[M, Rendezvous, RLConfig, Role, S], None],
    config: RLConfig,
    role: Role,
    last: S,
) -> None:
    """Join the ranks to one process group, and load the model on each of them."""
    address, port = await ranks.call(0, ModelActor.open_meeting)
    size = len(ranks)
    # All ranks together: joining a process group blocks until every rank is there.
    await all_or_none(
        ranks.call(rank, start, Rendezvous(rank, size, address, port), config, role, last) for rank in range(size)
    )


async def _load_engines(engines: RayWorkers[EngineActor], start_engine: Callable[[int], Awaitable[None]]) -> None:
    _: list[None] = await all_or_none(start_engine(index) for index in range(len(engines)))


def _engine_starter(
    config: RLConfig,
    cluster: Cluster,
    engines: RayWorkers[EngineActor],
    actor: RayWorkers[LearnerActor],
    health: Health,
) -> Callable[[int], Awaitable[None]]:
    """What starts the engine of an index in its process, at first and after a restart."""
    count, size = len(engines), config.vllm_tensor_parallel_size
    threads = cluster.threads(max(1, count) * size)

    async def start_engine(index: int) -> None:
        # The GPUs of an engine that shares several with ranks of the actor; none are named where Ray gives each its own.
        gpus: tuple[str, ...] = ()
        if size > 1 and config.colocate_all_models:
            # Engine k runs on the GPUs of the k-th run of `size` actor ranks.
            run = range(index * size, (index + 1) * size)
            slots = await all_or_none(actor.call(rank, LearnerActor.gpus) for rank in run)
            gpus = tuple(gpu for slot in slots for gpu in slot)
        settings = engine_settings(config, index, threads, health.step)
        started: Coroutine[object, object, None] = engines.call(
            index, EngineActor.start_on, config.rollout_engine, settings, gpus
        )
        await started

    return start_engine
