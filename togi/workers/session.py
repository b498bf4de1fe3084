"""The workers of one RL run and its operations on them: generate, score, update, sync, save.

Only the models that the settings need exist. Each method is one phase of a step; ``togi.run.rl`` has their order.

The phases of a run, and who may hold memory in each.

Engines hold key-value caches while they generate, evaluate and load weights. Learners hold what only an optimizer step needs
(``Backend.at_rest``) while they train and save. With ``--vllm_enable_sleep`` and ``--trainer_enable_sleep`` the others sleep.
Those that must release memory go first, then those that may take it. After a sleep the measured memory must have fallen.
Working weights always stay, because any rank may have to score.

The peak of each phase is measured whether or not anything sleeps.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch

from togi.algo.policy import router_disagreement
from togi.config.fields import SEEDS
from togi.config.rl import RLConfig
from togi.errors import RunError
from togi.learn.learner import UpdateReport
from togi.learn.objective import OLD_LOGPROBS, OLD_VALUES, REF_LOGPROBS
from togi.obs import names
from togi.plan.engine_args import extra_arguments
from togi.plan.placement import Role
from togi.rollout.engine import EngineSettings
from togi.sample import Sample, with_streams
from togi.weights.updates import check_probe, compare, probe
from togi.workers.engine_worker import EnginePool, EngineWorker
from togi.workers.model_worker import LearnerWorker, ScorerWorker
from togi.workers.protocol import Health, Meter, Processes, Weights, call_all
from togi.workers.worker_group import LearnerGroup, WorkerGroup


class Phase(StrEnum):
    START = "start"
    GENERATE = "generate"
    SCORE = "score"
    TRAIN = "train"
    SYNC = "sync"
    SAVE = "save"
    EVALUATE = "evaluate"


# Scorers keep only working weights, so just these two can sleep.
SLEEPING = frozenset({names.Holder.ENGINES, names.Holder.LEARNERS})
MAY_HOLD: Mapping[Phase, frozenset[names.Holder]] = {
    Phase.START: SLEEPING,
    Phase.GENERATE: frozenset({names.Holder.ENGINES}),
    Phase.SCORE: frozenset(),
    Phase.TRAIN: frozenset({names.Holder.LEARNERS}),
    Phase.SYNC: frozenset({names.Holder.ENGINES}),
    Phase.SAVE: frozenset({names.Holder.LEARNERS}),
    Phase.EVALUATE: frozenset({names.Holder.ENGINES}),
}


class Phases:
    """The phase machine of a run. ``asleep``: who sleeps already."""

    def __init__(
        self,
        config: RLConfig,
        engines: EnginePool,
        learners: Collection[LearnerGroup],
        meter: Meter,
        asleep: frozenset[names.Holder],
    ) -> None:
        self._engines, self._learners, self._meter = engines, learners, meter
        self._sleepers, self._adapted = sleepers(config), config.lora is not None
        self._overlaps = config.max_staleness > 0
        self._asleep = set(asleep)
        self._values = dict[str, float]()
        self.current = Phase.START

    async def enter(self, phase: Phase) -> None:
        """End the current phase and enter ``phase``: measure, sleep, wake. Raises RunError if memory did not fall."""
        await (
            self._engines.settled()
        )  # the actor sends its weights to an engine that is restarted, and does nothing else then
        if phase is self.current:
            return
        await self._measure()
        may_hold = MAY_HOLD[phase]
        # The weights sent are masters of an adapter, alone or merged, and masters are part of what sleeps.
        if phase is Phase.SYNC and self._adapted:
            may_hold |= {names.Holder.LEARNERS}
        # Release before taking: both may share one GPU.
        for holder in sorted((self._sleepers - may_hold) - self._asleep):
            await self._sleep(holder, keep_weights=phase is Phase.SAVE)
        if names.Holder.ENGINES in self._asleep & may_hold:
            await self._engines.on_all(EngineWorker.wake)
        if names.Holder.LEARNERS in self._asleep & may_hold:
            await asyncio.gather(*(group.call_all(LearnerWorker.wake) for group in self._learners))
        self._asleep -= may_hold
        # What the engines hold is out of date as soon as the policy trains; a sync follows every update.
        if phase is Phase.TRAIN:
            await self._engines.expire(drop=not self._overlaps)
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

    async def _sleep(self, holder: names.Holder, *, keep_weights: bool) -> None:
        # Engines forget their weights in every phase that leads to a sync. A checkpoint comes after it.
        self._asleep.add(holder)
        if holder is names.Holder.ENGINES:
            slept = await self._engines.on_all(EngineWorker.sleep, keep_weights=keep_weights)
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


logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 60.0
RESUMED = 1_000_003
"""More than there are engines, and prime, so that no engine and step has the seed of another."""


class Session:
    """All workers of a run, started and loaded (``togi.workers``). Call ``close`` at the end."""

    def __init__(
        self,
        config: RLConfig,
        engines: EnginePool,
        learners: Mapping[Role, LearnerGroup],
        scorers: Sequence[WorkerGroup[ScorerWorker]],
        weights: Weights,
        meter: Meter,
        asleep: frozenset[names.Holder],
        end: Callable[[], None],
        health: Health,
        processes: Processes,
    ) -> None:
        """``scorers``: the reference and the reward models. ``asleep``: who sleeps already. ``end``: ends every worker at once."""
        self.config, self.engines, self.learners, self.weights = config, engines, learners, weights
        self.health, self.processes = health, processes
        self.references = [group for group in scorers if group.role is Role.REF]  # one or none
        self.reward_models = [group for group in scorers if group.role is Role.REWARD]
        self._meter, self._end = meter, end
        self.phases = Phases(config, engines, learners.values(), meter, asleep)
        self._ended = False

    @property
    def actor(self) -> LearnerGroup:
        return self.learners[Role.ACTOR]

    async def score(self, samples: Sequence[Sample]) -> list[Sample]:
        """Add the streams that advantages and the update need: reference logprobs, old logprobs, values."""
        streams = {}
        # With LoRA the reference is the base inside the actor.
        for reference in self.references:
            streams[REF_LOGPROBS] = await reference.per_sample(ScorerWorker.logprobs, samples)
        if self.config.uses_reference and not self.references:
            streams[REF_LOGPROBS] = await self.actor.per_sample(LearnerWorker.reference_logprobs, samples)
        if Role.CRITIC in self.learners:
            streams[OLD_VALUES] = await self.learners[Role.CRITIC].per_sample(LearnerWorker.values, samples)
        if self.needs_old_logprobs:
            streams[OLD_LOGPROBS] = await self.actor.per_sample(LearnerWorker.logprobs, samples)
        return with_streams(samples, streams)

    @property
    def needs_old_logprobs(self) -> bool:
        """False for a first and only update on its rollouts, which takes them from its own forward, unless the reward
        needs them.
        """
        in_reward = self.config.uses_reference and not self.config.use_kl_loss
        return self.config.updates_per_rollout > 1 or in_reward

    @property
    def scoring_passes(self) -> int:
        """How many models score every sample before the update."""
        return self.config.uses_reference + (Role.CRITIC in self.learners) + self.needs_old_logprobs

    async def probe(self, tokens: Sequence[int]) -> float:
        """Mean absolute difference of engine and trainer logprobs (nats) on fixed tokens, over all engines.

        Raises WeightSyncError if it is so large that the engines cannot hold the trainer's weights.
        """
        sample = self.engines.probed = probe(tokens, self.config.context_length)
        # Engines score at temperature 1, so the trainer must too.
        trainer = (await self.actor.call_all(LearnerWorker.logprobs, [sample], 1.0))[0][0]
        engines = await self.engines.on_all(EngineWorker.score, sample.tokens.tolist())
        return check_probe(float(np.mean([compare(logprobs, trainer) for logprobs in engines])))

    async def routing(self, tokens: Sequence[int]) -> dict[str, float]:
        """The router disagreement of engines and trainer on the probe, by metric name.

        Empty for a dense model, and where engines generate at the same time: they report routes only when they are idle.
        """
        if self.config.max_staleness > 0:
            return {}
        sample = probe(tokens, self.config.context_length)
        trainer = (await self.actor.call_all(LearnerWorker.routes, [sample]))[0]
        if not trainer:
            return {}
        every = await self.engines.on_all(EngineWorker.routes, sample.tokens.tolist())
        # The first token is not scored, and an engine in compiled graphs reports no routes.
        engines = [routes[1:] for routes in every if routes.size > 0]
        shares = [router_disagreement(torch.from_numpy(r), torch.from_numpy(trainer[0]).long()) for r in engines]
        return {names.MISMATCH_PROBE_ROUTER: float(np.mean(shares))} if shares else {}

    async def engine_facts(self) -> Mapping[str, str | bool]:
        """What computes in the engines (``RolloutEngine.facts``); empty in a replay."""
        return next(iter(await self.engines.on_all(EngineWorker.facts)), {})

    async def memory(self) -> dict[str, float]:
        """Peak resident memory in GB by metric name: per process so far, and per phase over all since the last call.

        With the number of restarts, if there were any.
        """
        result = await self.phases.take_metrics() | self.health.metrics()
        for process, nbytes in (await self._meter.highest()).items():
            result[names.process_memory(process)] = nbytes / 1e9
        return result

    async def checkpoint_bytes(self) -> int:
        """Bytes on disk of the learners' resumable state."""
        return sum([(await group.call_all(LearnerWorker.checkpoint_bytes))[0] for group in self.learners.values()])

    async def save(self, folder: Path) -> None:
        """Write the resumable state of every learner into ``folder``."""
        for group in self.learners.values():
            await group.call_all(LearnerWorker.save, folder)

    async def load(self, folder: Path) -> None:
        """Resume from a folder that ``save`` wrote."""
        for group in self.learners.values():
            await group.call_all(LearnerWorker.load, folder)

    async def wake_learners(self) -> None:
        """Bring back what an optimizer step needs, whatever the phase is."""
        for group in self.learners.values():
            await group.call_all(LearnerWorker.wake)

    async def save_model(self, role: Role, folder: Path) -> None:
        """Write one model in plain Hugging Face format."""
        await self.learners[role].call_all(LearnerWorker.save_model, folder)

    async def save_average(self, folder: Path) -> None:
        """Write the moving average of the actor in plain Hugging Face format."""
        await self.actor.call_all(LearnerWorker.save_average, folder)

    async def close(self) -> None:
        """Shut the engines down in order, then end every worker."""
        self.engines.close()
        try:
            await asyncio.wait_for(call_all(self.engines.workers, EngineWorker.shutdown), SHUTDOWN_SECONDS)
        except (TimeoutError, RunError) as error:
            logger.warning("an engine did not shut down in an orderly way: %s", error)
        self.abandon()

    def abandon(self) -> None:
        """End every worker at once. A second call does nothing."""
        if not self._ended:
            self._ended = True
            self.engines.close()
            self._end()


def sleepers(config: RLConfig) -> frozenset[names.Holder]:
    """Who sleeps in the phases that do not need it."""
    flags = {names.Holder.ENGINES: config.vllm_enable_sleep, names.Holder.LEARNERS: config.trainer_sleeps}
    return frozenset(holder for holder, sleeps in flags.items() if sleeps)


def engine_settings(config: RLConfig, index: int, threads: int, step: int = 0) -> EngineSettings:
    """The settings of engine ``index``. Each engine has its own seed, and another when a run is resumed after ``step`` rollouts,
    since its random numbers start anew and would repeat those of the start.
    """
    return EngineSettings(
        model=config.pretrain,
        dtype="bfloat16" if config.bf16 else "float32",
        max_model_len=config.context_length,
        seed=(config.seed + index + RESUMED * step) % SEEDS,
        enforce_eager=config.enforce_eager,
        enable_prefix_caching=config.enable_prefix_caching,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
        gpu_memory_utilization=float(config.vllm_gpu_memory_utilization),
        enable_sleep_mode=config.vllm_enable_sleep,
        quantization=config.vllm_quantization,
        kv_cache_dtype=config.vllm_kv_cache_dtype,
        kv_cache_gb=config.vllm_cpu_kv_cache_gb,
        max_num_seqs=config.max_num_seqs,
        extra=extra_arguments(config.vllm_args),
        recompute_kv=config.recompute_kv,
        threads=threads,
        trust_remote_code=config.trust_remote_code,
    )


def update_metrics(role: Role, reports: Sequence[UpdateReport]) -> dict[str, float]:
    """Metrics of the optimizer steps of one rollout: means over the steps, and the last learning rate."""
    actor = role is Role.ACTOR
    keys = {key for report in reports for key in report.metrics}
    means = {key: float(np.mean([report.metrics[key] for report in reports if key in report.metrics])) for key in keys}
    if names.COMPILE_SECONDS in means:
        means[names.COMPILE_SECONDS] *= len(reports)  # seconds add up, so the sum instead of the mean
    if role is Role.CRITIC and names.AUX_LOSS in means:
        means[names.VALUE_AUX_LOSS] = means.pop(names.AUX_LOSS)
    means[names.POLICY_LR if actor else names.VALUE_LR] = reports[-1].learning_rate
    grad_norm = names.POLICY_GRAD_NORM if actor else names.VALUE_GRAD_NORM
    means[grad_norm] = float(np.mean([report.grad_norm for report in reports]))
    if actor:
        means[names.PADDING_SHARE] = float(np.mean([report.padding_share for report in reports]))
        means[names.RANK_IMBALANCE] = float(np.mean([report.imbalance for report in reports]))
    return means
