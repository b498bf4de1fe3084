"""The processes of one RL run and what is asked of them: start, generate, score, update, sync, save.

Only the models that the settings need are started. Each method is one phase of a step; the recipe says in which order.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from ray.actor import ActorHandle

from togi.algo.mismatch import router_disagreement
from togi.config.rl import RLConfig
from togi.errors import RunError
from togi.learn.learner import UpdateReport
from togi.learn.policy_objective import OLD_LOGPROBS, OLD_VALUES, REF_LOGPROBS
from togi.obs import names
from togi.obs.names import Holder
from togi.obs.way_out import way_out
from togi.plan.machine import Machine
from togi.plan.placement import LEARNERS, Role, plan_groups, team_size, used_roles
from togi.rollout.engine import EngineSettings
from togi.rollout.parity import check_probe, compare, probe
from togi.sample import Sample, with_streams
from togi.workers.engine_worker import MAX_CONCURRENT_CALLS, EnginePool, EngineWorker
from togi.workers.model_worker import LearnerWorker, ScorerWorker
from togi.workers.phases import Phases
from togi.workers.ray.cluster import Cluster, connect, describe, disconnect
from togi.workers.ray.weight_sync import SyncReport, WeightSync
from togi.workers.worker_group import StepUpdate, WorkerGroup

logger = logging.getLogger(__name__)

# What cuBLAS needs to be deterministic under --full_determinism; it costs a few MB.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
SHUTDOWN_SECONDS = 60.0


class Session:
    """All workers of a run, placed and loaded. Make one with ``start`` and end it with ``close``."""

    def __init__(
        self,
        config: RLConfig,
        cluster: Cluster,
        engines: EnginePool,
        groups: Mapping[Role, WorkerGroup],
        reward_models: Sequence[WorkerGroup],
        weights: WeightSync,
        asleep: frozenset[Holder],
    ) -> None:
        """``asleep``: who sleeps already."""
        self.config = config
        self.cluster = cluster
        self.engines = engines
        self.groups = groups
        self.reward_models = tuple(reward_models)
        self.weights = weights
        learners = self._learners()
        scorers = [group for group in groups.values() if group not in learners]
        self.phases = Phases(
            engines, learners, [*scorers, *reward_models], sleepers(config), asleep, adapted=config.lora is not None
        )
        self._ended = False

    @classmethod
    async def start(
        cls, config: RLConfig, machine: Machine, updates: Mapping[Role, int], announce: Callable[[str], None]
    ) -> Session:
        """Connect, place, and load every model at once: start-up is import and disk time, which overlaps.

        ``updates``: planned optimizer steps of each learner.
        """
        groups, resources = plan_groups(config), connect(machine)
        try:
            announce(f"placement: {describe(groups, resources)}")
            session = await cls._start(config, Cluster(groups, resources), updates)
            if resources.gpus > 0 and (await session.groups[Role.ACTOR].call_all("device_type"))[0] == "cpu":
                announce(
                    "placement: these GPUs are declared only, so each is a process that computes on the CPU, over gloo"
                )
            return session
        except BaseException:
            with way_out("leaving the cluster"):
                disconnect()
            raise

    @classmethod
    async def _start(cls, config: RLConfig, cluster: Cluster, updates: Mapping[Role, int]) -> Session:
        def group_of(role: Role, workers: Sequence[ActorHandle]) -> WorkerGroup:
            return WorkerGroup(
                role, workers, share_prompts=config.share_prompts, ranks_per_share=team_size(config, role)
            )

        workers = cluster.start(EngineWorker, Role.ENGINE, ENVIRONMENT, concurrency=MAX_CONCURRENT_CALLS)
        engines = EnginePool(workers)
        groups: dict[Role, WorkerGroup] = {
            role: group_of(role, cluster.start(_kind(role), role, ENVIRONMENT))
            for role in used_roles(config)
            if role not in (Role.ENGINE, Role.REWARD)
        }
        rewards = [
            group_of(Role.REWARD, cluster.start(ScorerWorker, Role.REWARD, ENVIRONMENT, number=n))
            for n in range(len(config.scoring_models))
        ]
        threads = cluster.threads(max(1, len(workers)) * config.vllm_tensor_parallel_size)
        settings = [engine_settings(config, index, threads) for index in range(len(workers))]
        gpus = await gpus_of_engines(config, groups[Role.ACTOR], len(workers))
        starting = [engines.start(config.rollout_engine, settings, gpus)]
        asleep = sleepers(config) & {Holder.ENGINES}
        if asleep:  # the models then find the memory that the engines have reserved and do not use yet
            await starting.pop()
            await engines.sleep()
        for role, group in groups.items():
            last = updates[role] if role in LEARNERS else config.pretrain
            starting.append(group.start(config, role, last))
        for group, path in zip(rewards, config.scoring_models, strict=True):
            starting.append(group.start(config, Role.REWARD, path))
        await asyncio.gather(*starting)
        weights = await WeightSync.open(groups[Role.ACTOR], engines, config)
        return cls(config, cluster, engines, groups, rewards, weights, asleep)

    async def score(self, samples: Sequence[Sample]) -> list[Sample]:
        """Add what advantages and the update need: reference and old log-probs, values."""
        streams = {}
        if Role.REF in self.groups:
            streams[REF_LOGPROBS] = await self.groups[Role.REF].per_sample("logprobs", samples)
        elif self.config.uses_reference:
            streams[REF_LOGPROBS] = await self.groups[Role.ACTOR].per_sample("reference_logprobs", samples)
        if Role.CRITIC in self.groups:
            streams[OLD_VALUES] = await self.groups[Role.CRITIC].per_sample("values", samples)
        if self.needs_old_logprobs:
            streams[OLD_LOGPROBS] = await self.groups[Role.ACTOR].per_sample("logprobs", samples)
        return with_streams(samples, streams)

    @property
    def needs_old_logprobs(self) -> bool:
        """A first and only update on its rollouts takes old log-probs from its own forward, unless the reward needs them."""
        in_reward = self.config.uses_reference and not self.config.use_kl_loss
        return self.config.updates_per_rollout > 1 or in_reward

    @property
    def scoring_passes(self) -> int:
        """How many models read every sample before the update."""
        return self.config.uses_reference + (Role.CRITIC in self.groups) + self.needs_old_logprobs

    async def update(
        self, role: Role, steps: Sequence[Sequence[Sample]], kl_coef: float, mixed: Sequence[Sequence[Sample]]
    ) -> list[StepUpdate]:
        """Optimizer steps of the actor or the critic. ``mixed``: supervised rows for each step, or nothing at all."""
        return await self.groups[role].update(steps, kl_coef, mixed)

    async def sync(self, version: int) -> SyncReport:
        """Give every engine the actor's weights."""
        return await self.weights.send(version)

    async def probe(self, tokens: Sequence[int]) -> float:
        """Mean absolute difference of engine and trainer log-probs (nats) on fixed tokens, over all engines.

        Raises WeightSyncError when it is so large that the engines cannot hold the trainer's weights.
        """
        sample = probe(tokens, self.config.context_length)
        trainer = (await self.groups[Role.ACTOR].call_all("logprobs", [sample], 1.0))[0][0]
        engines = await self.engines.score(sample.tokens.tolist())
        return check_probe(float(np.mean([compare(logprobs, trainer).mean_abs for logprobs in engines])))

    async def routing(self, tokens: Sequence[int]) -> dict[str, float]:
        """By metric name, how differently engines and trainer route the probe of a mixture; nothing for other models."""
        sample = probe(tokens, self.config.context_length)
        trainer = (await self.groups[Role.ACTOR].call_all("routes", [sample]))[0]
        if not trainer:
            return {}
        engines = [routes[1:] for routes in await self.engines.routes(sample.tokens.tolist()) if routes.size > 0]
        shares = [router_disagreement(torch.from_numpy(r), torch.from_numpy(trainer[0]).long()) for r in engines]
        return {names.MISMATCH_PROBE_ROUTER: float(np.mean(shares))} if shares else {}

    async def memory(self) -> dict[str, float]:
        """Peak resident memory in GB by metric name: of each worker so far, and of all in each phase since the last call."""
        result = await self.phases.take_metrics()
        for index, nbytes in enumerate(await self.engines.memory_bytes()):
            result[names.process_memory(f"engine{index}")] = nbytes / 1e9
        for role, group in self.groups.items():
            for rank, nbytes in enumerate(await group.call_all("memory_bytes")):
                result[names.process_memory(f"{role}{rank}")] = nbytes / 1e9
        scorers = [nbytes for group in self.reward_models for nbytes in await group.call_all("memory_bytes")]
        for number, nbytes in enumerate(scorers):
            result[names.process_memory(f"{Role.REWARD}{number}")] = nbytes / 1e9
        return result

    async def checkpoint_bytes(self) -> int:
        """Size on disk of the learners' resumable state."""
        return sum([(await group.call_all("checkpoint_bytes"))[0] for group in self._learners()])

    async def save(self, folder: Path) -> None:
        """Write every learner's resumable state."""
        for group in self._learners():
            await group.call_all("save", folder)

    async def load(self, folder: Path) -> None:
        """Go on from what ``save`` wrote."""
        for group in self._learners():
            await group.call_all("load", folder)

    async def save_model(self, role: Role, folder: Path) -> None:
        """Write one model in plain Hugging Face format."""
        await self.groups[role].call_all("save_model", folder)

    async def save_average(self, folder: Path) -> None:
        """Write the moving average of the actor in the same format."""
        await self.groups[Role.ACTOR].call_all("save_average", folder)

    async def close(self) -> None:
        """End every worker in an orderly way, then leave the cluster."""
        try:
            await asyncio.wait_for(self.engines.shutdown(), SHUTDOWN_SECONDS)
        except (TimeoutError, RunError) as error:
            logger.warning("an engine did not shut down in an orderly way: %s", error)
        self.abandon()

    def abandon(self) -> None:
        """End every worker at once. A second call does nothing."""
        if not self._ended:
            self._ended = True
            self.cluster.close()
            disconnect()

    def _learners(self) -> list[WorkerGroup]:
        return [group for role, group in self.groups.items() if role in LEARNERS]


def sleepers(config: RLConfig) -> frozenset[Holder]:
    """Who sleeps in the phases that do not need it."""
    flags = {Holder.ENGINES: config.vllm_enable_sleep, Holder.LEARNERS: config.trainer_sleeps}
    return frozenset(holder for holder, sleeps in flags.items() if sleeps)


async def gpus_of_engines(config: RLConfig, actor: WorkerGroup, engines: int) -> list[tuple[str, ...]]:
    """The GPUs of each engine that shares several with the actor's ranks; empty where Ray gives an engine all of its own."""
    size = config.vllm_tensor_parallel_size
    if size == 1 or engines == 0 or not config.colocate_all_models:
        return [()] * engines
    slots: list[tuple[str, ...]] = await actor.call_all("gpus")
    return [tuple(gpu for slot in slots[first : first + size] for gpu in slot) for first in range(0, len(slots), size)]


def engine_settings(config: RLConfig, index: int, threads: int) -> EngineSettings:
    """The settings of engine ``index``; its seed differs from that of the others."""
    return EngineSettings(
        model=config.pretrain,
        dtype="bfloat16" if config.bf16 else "float32",
        max_model_len=config.context_length,
        seed=config.seed + index,
        enforce_eager=config.enforce_eager,
        enable_prefix_caching=config.enable_prefix_caching,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        kv_cache_gb=config.vllm_cpu_kv_cache_gb,
        threads=threads,
        trust_remote_code=config.trust_remote_code,
    )


def single_logprobs(updates: Sequence[StepUpdate]) -> list[np.ndarray]:
    """Log-probs of the one update's own forward, in the order of its samples."""
    assert len(updates) == 1, "old log-probs of several updates are not those of the rollout"
    return updates[0].logprobs


def _kind(role: Role) -> type:
    return LearnerWorker if role in LEARNERS else ScorerWorker


def update_metrics(role: Role, reports: Sequence[UpdateReport]) -> dict[str, float]:
    """Means over the optimizer steps of one rollout."""
    grad_norm, rate = (
        (names.POLICY_GRAD_NORM, names.POLICY_LR) if role is Role.ACTOR else (names.VALUE_GRAD_NORM, names.VALUE_LR)
    )
    keys = {key for report in reports for key in report.metrics}
    means = {key: float(np.mean([report.metrics[key] for report in reports if key in report.metrics])) for key in keys}
    if names.COMPILE_SECONDS in means:
        means[names.COMPILE_SECONDS] *= len(reports)  # it is a sum
    if role is Role.CRITIC and names.AUX_LOSS in means:
        means[names.VALUE_AUX_LOSS] = means.pop(names.AUX_LOSS)
    means[grad_norm] = float(np.mean([report.grad_norm for report in reports]))
    means[rate] = reports[-1].learning_rate
    if role is Role.ACTOR:
        means[names.PADDING_SHARE] = float(np.mean([report.load.padding_share for report in reports]))
        means[names.RANK_IMBALANCE] = float(np.mean([report.load.imbalance for report in reports]))
    return means
