"""The phases of an RL run, and its state between them. ``togi.run.rl.train`` calls each in one line."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from togi.algo.kl import kl_controller
from togi.config.rl import RLConfig
from togi.learn.checkpoint import HF_FOLDER, Checkpoint
from togi.learn.policy_objective import ADVANTAGES, KL_COEF, OLD_LOGPROBS
from togi.model.checkpoint import written_aside
from togi.obs import names
from togi.obs.rollout_store import Split
from togi.plan.placement import Role
from togi.pump import measure
from togi.pump.experience import ScoredGroup, Trainable, to_sample, trainable, with_advantages
from togi.pump.feed import Feed, RolloutFeed
from togi.pump.filtering import GroupFilter
from togi.pump.replay import replay_feed
from togi.reward.combine import CombinedReward, LengthPenalties
from togi.run.journal import RunJournal
from togi.run.keep import DRIVER, Keep, every
from togi.run.plan import StepPlan
from togi.run.rl_setup import Material, best_aim
from togi.sample import Sample, with_streams
from togi.workers.phases import Phase
from togi.workers.session import Session, single_logprobs, update_metrics
from togi.workers.worker_group import StepUpdate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The metrics on the held-out prompts after ``step`` rollouts: the mean reward, its standard error over prompts, ..."""

    step: int
    metrics: Mapping[str, float]

    @property
    def reward(self) -> float:
        return self.metrics[names.EVAL_REWARD]

    @property
    def stderr(self) -> float:
        return self.metrics[names.EVAL_REWARD_STDERR]


class RLRun:
    """A run after ``step`` rollouts were trained on. A phase returns metrics by name."""

    def __init__(
        self,
        config: RLConfig,
        material: Material,
        reward: CombinedReward,
        plan: StepPlan,
        session: Session,
        journal: RunJournal,
    ) -> None:
        self.config, self.plan, self.session, self.journal = config, plan, session, journal
        self._material = material
        self.step = 0
        self._kl = kl_controller(config.init_kl_coef, config.kl_target, config.kl_horizon)
        self._tokens_seen = 0
        self._pretrain_steps = 0
        self._keep = Keep(config, best_aim(config, material), DRIVER, journal)
        # Feeds: a live one generates and scores, a replay reads stored rollouts. Evaluation samples at its own
        # temperature.
        generate = session.engines.generate
        seed = config.seed if config.full_determinism else None
        acting, trying = (material.environment(config, t) for t in (config.temperature, config.eval_temperature))
        errors = config.allowed_reward_errors
        penalties = LengthPenalties.of(config) if config.uses_length_penalties else None
        live = RolloutFeed(acting, generate, reward, seed, errors, penalties, GroupFilter.of(config))
        self._feed: Feed = live
        if config.replay is not None:
            self._feed = replay_feed(config.replay, filtering=config.dynamic_filtering)
        self._eval_feed = RolloutFeed(trying, generate, reward, seed, errors)

    async def resume(self, found: Checkpoint | None) -> None:
        """Resume from a checkpoint. ``find_checkpoint`` has already set the loader to its position."""
        progress = self.journal.progress
        if found is not None:
            with progress.phase(f"loading checkpoint of step {found.step}", expected_seconds=10):
                await self.session.phases.enter(Phase.SAVE)
                await self.session.load(found.path)
            self.step = found.step
            self._kl = self._kl.restored(found.state["kl"])
            self._tokens_seen = found.state["tokens_seen"]
            if self._material.pretraining is not None:
                self._pretrain_steps = self._material.pretraining.steps_of(found.state.get("pretraining"))
            self._keep.resume(found)
        progress.start_steps(self.plan.rollouts, done=self.step)

    @property
    def first_probe(self) -> tuple[int, ...]:
        """The probe text before the first rollout: the first prompt, at least two tokens long, the shortest that can be scored."""
        tokens = self._material.prompts[0].tokens
        return (tokens * 2)[: max(2, len(tokens))]

    async def sync(self, probe: tuple[int, ...]) -> dict[str, float]:
        """Send the weights to the engines and compare logprobs of engine and trainer on a probe text. No-op in a replay."""
        if not self.config.generates:
            return {}
        with self.journal.progress.phase("syncing weights", expected_seconds=3):
            await self.session.phases.enter(Phase.SYNC)
            report = await self.session.sync(self.step)
            mismatch, routing = await self.session.probe(probe), await self.session.routing(probe)
        return routing | {
            names.MISMATCH_PROBE_MEAN_ABS: mismatch,
            names.WEIGHT_SYNC_BYTES: report.nbytes,
            names.WEIGHT_SYNC_RATE: report.gb_per_second,
            names.WEIGHT_SYNC_SECONDS: report.seconds,
        }

    async def generate(self) -> tuple[list[ScoredGroup], dict[str, float]]:
        """The scored groups of the next prompts: generated by the current weights, or read from the stored run in a replay."""
        self.journal.beat()
        await self.session.phases.enter(Phase.GENERATE)
        generates, loader, start = self.config.generates, self._material.loader, time.perf_counter()
        with self.journal.progress.phase("generating" if generates else "reading rollouts"):
            count, samples = self.config.rollout_batch_size, self.config.n_samples_per_prompt
            groups = await self._feed.take(loader, count, samples, self.step + 1)
        tokens = sum(len(rollout.response_tokens) for group in groups for rollout in group.rollouts)
        return groups, {names.THROUGHPUT_GENERATE: tokens / (time.perf_counter() - start)} if generates else {}

    async def score(self, groups: Sequence[ScoredGroup]) -> tuple[list[Trainable], list[Sample], dict[str, float]]:
        """Trainable samples with the logprobs and values that the advantages need. Empty if no response has a reward."""
        items = trainable(groups, self.config.on_reward_error)
        if not items:
            logger.warning(
                "rollout %d is not trained on: the reward abstained or failed on every response, or filtering left no group",
                self.step + 1,
            )
            return [], [], {}
        await self.session.phases.enter(Phase.SCORE)
        start = time.perf_counter()
        with self.journal.progress.phase("scoring"):
            # Reference, critic and old logprobs, whichever this run uses.
            samples = await self.session.score([to_sample(item) for item in items])
        scored = sum(len(sample.tokens) for sample in samples) * self.session.scoring_passes
        rate = {names.THROUGHPUT_SCORE: scored / (time.perf_counter() - start)} if scored > 0 else {}
        return items, samples, rate

    @property
    def actor_is_frozen(self) -> bool:
        """Whether the next rollout is one of the first ``--freezing_actor_steps``."""
        return self.step < self.config.freezing_actor_steps

    def with_advantages(self, items: Sequence[Trainable], samples: Sequence[Sample]) -> list[Sample]:
        """Add advantages and returns, computed over the whole step, and the coefficient of a KL in the loss."""
        samples = with_advantages(items, samples, self.config, self._kl.value)
        if not (self.config.uses_reference and self.config.use_kl_loss):
            return samples
        return [replace(sample, values={**sample.values, KL_COEF: self._kl.value}) for sample in samples]

    async def update(self, role: Role, samples: Sequence[Sample]) -> tuple[list[StepUpdate], dict[str, float]]:
        """All optimizer steps of one model on this rollout. Returns their updates and metrics."""
        await self.session.phases.enter(Phase.TRAIN)
        start, batches = time.perf_counter(), mini_batches(samples, self.config, self.step)
        # Pretraining rows are mixed into the actor's updates only.
        mixed = self._pretraining(len(batches)) if role is Role.ACTOR else []
        with self.journal.progress.phase(f"training the {role}"):
            updates = await self.session.update(role, batches, mixed)
        metrics = update_metrics(role, [update.report for update in updates])
        # Tokens are counted once per step, on the actor.
        if role is Role.ACTOR:
            tokens = sum(update.unshared_tokens for update in updates)
            self._tokens_seen += tokens
            metrics |= {
                names.THROUGHPUT_TRAIN: tokens / (time.perf_counter() - start),
                names.SHARED_SHARE: 1 - sum(update.tokens for update in updates) / tokens,
                names.TOKENS_STEP: tokens,
            }
        return updates, metrics

    def _pretraining(self, updates: int) -> list[list[Sample]]:
        """The next rows of ``--pretrain_data`` for each update; empty without it."""
        rows = self._material.pretraining
        if rows is None:
            return []
        first, self._pretrain_steps = self._pretrain_steps, self._pretrain_steps + updates
        return [rows.batch(first + number) for number in range(updates)]

    @property
    def is_done(self) -> bool:
        """Whether all rollouts are made, or, as filtering needs more prompts for each, all prompts are used up."""
        return self.step >= self.plan.rollouts or self._material.loader.remaining <= 0

    @property
    def episode(self) -> int:
        """The number of the current pass over the prompts."""
        return self._material.loader.episode

    def evaluation_is_due(self, episode: int) -> bool:
        """Every ``--eval_steps`` rollouts, or without it when ``episode`` has ended; always at the end of the run."""
        if len(self._material.held_out) == 0:
            return False
        steps = self.config.eval_steps
        return self.is_done or (every(steps, self.step) if steps > 0 else self.episode > episode)

    async def evaluate(self) -> Evaluation:
        """Answer and score the held-out prompts with the current weights. The model is saved if it is the best so far."""
        count = self.config.eval_n_samples_per_prompt
        await self.session.phases.enter(Phase.EVALUATE)
        with self.journal.progress.phase("evaluating"):
            groups = await self._eval_feed.run(self._material.held_out, count, f"eval{self.step}")
        self.journal.rollouts.write(self.step, Split.EVAL, measure.rows(self.step, Split.EVAL, groups))
        metrics = measure.eval_metrics(groups, count)
        if self._keep.is_best(metrics):
            await self.session.phases.enter(Phase.SAVE)
            with self._keep.best(self.step, metrics) as folder:
                await self.session.save_model(Role.ACTOR, folder)
        return Evaluation(self.step, metrics)

    async def log(
        self,
        groups: Sequence[ScoredGroup],
        items: Sequence[Trainable],
        samples: Sequence[Sample],
        updates: Sequence[StepUpdate],
        measured: Mapping[str, float],
    ) -> None:
        """Write metrics and samples of a rollout, and adapt the KL coefficient. ``measured``: metrics of the phases."""
        # Metrics of the rollout itself.
        values = {**measured, **measure.rollout_metrics(groups), **await self.session.memory()}
        if self.config.dynamic_filtering:
            values |= measure.filter_metrics(groups, self.config.rollout_batch_size)
        if self._material.rewards.remotes:
            values[names.REWARD_PAUSED] = self._material.rewards.take_paused_seconds()
        # With a single update there was no separate pass for old logprobs: the update's own forward gave them.
        if updates and OLD_LOGPROBS not in samples[0].streams:
            samples = with_streams(samples, {OLD_LOGPROBS: single_logprobs(updates)})
        if samples and OLD_LOGPROBS in samples[0].streams:
            values |= measure.trainer_metrics(samples)
        values[names.TOKENS_SEEN] = self._tokens_seen
        # An adaptive KL controller follows the measured KL.
        if names.KL_REFERENCE in values:
            self._kl = self._kl.update(values[names.KL_REFERENCE], len(samples))
        # Samples, then the line of progress. A step without a gradient says so.
        details = measure.StepDetails.of(items, samples)
        self.journal.rollouts.write(self.step, Split.TRAIN, measure.rows(self.step, Split.TRAIN, groups, details))
        note = f"reward {values[names.REWARD_MEAN]:.3f}"
        if not any(np.any(sample.streams[ADVANTAGES][sample.loss_mask]) for sample in samples):
            note += " (all advantages are 0: no response was better than another, nothing was learnt)"
        self.journal.write(self.step, values, note)

    async def checkpoint_if_due(self) -> None:
        """Write a resumable checkpoint and, with --save_hf_ckpt, a model folder inside it."""
        config, rows = self.config, self._material.pretraining
        if not self._keep.checkpoint_is_due(self.step):
            return
        state = {
            "rollout_batch_size": config.rollout_batch_size,
            "loader": self._material.loader.state().to_json(),
            "kl": self._kl.state,
            "tokens_seen": self._tokens_seen,
            "ema": config.enable_ema,
            "pretraining": rows.state(self._pretrain_steps) if rows is not None else None,
        }
        await self.session.phases.enter(Phase.SAVE)
        with self._keep.checkpoint(self.step, state, await self.session.checkpoint_bytes()) as folder:
            if not config.disable_ds_ckpt:
                await self.session.save(folder)
            if config.save_hf_ckpt:
                await self.session.save_model(Role.ACTOR, folder / HF_FOLDER)

    async def save(self) -> None:
        """Write the final model (also moving average and critic, if set) in Hugging Face format, each aside and then renamed."""
        target = self.config.save_path
        with self.journal.progress.phase("saving the model", expected_seconds=5):
            await self.session.phases.enter(Phase.SAVE)
            with written_aside(Path(target)) as aside:
                await self.session.save_model(Role.ACTOR, aside)
            if self.config.enable_ema:
                with written_aside(Path(target + "_ema")) as aside:
                    await self.session.save_average(aside)
            if self.config.save_value_network:
                with written_aside(Path(target + "_critic")) as aside:
                    await self.session.save_model(Role.CRITIC, aside)


def probe_of(groups: Sequence[ScoredGroup]) -> tuple[int, ...]:
    """The first sequence of this rollout, as probe text for engines and trainer."""
    first = groups[0].rollouts[0]
    return first.prompt.tokens + first.response_tokens


def mini_batches(samples: Sequence[Sample], config: RLConfig, step: int) -> list[list[Sample]]:
    """Batches of ``--train_batch_size`` samples, one per optimizer step. Groups are shuffled anew in each epoch.

    A single update on all samples is not shuffled: its order does not matter, and results can be read in the order of samples.
    """
    size, batches = config.train_batch_size, list[list[Sample]]()
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    for epoch in range(config.max_epochs):
        order = list(groups.values())
        if len(samples) > size or config.max_epochs > 1:
            random.Random(f"{config.seed}/{step}/{epoch}").shuffle(order)
        flat = [sample for group in order for sample in group]
        batches += [flat[i : i + size] for i in range(0, len(flat), size)]
    return batches
