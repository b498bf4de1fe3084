"""The state of an RL run between its phases. Each method is one line of the recipe (``togi.recipes.rl.train``)."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from togi.algo.kl import kl_controller
from togi.config.rl import RLConfig
from togi.learn.checkpoint import HF_FOLDER, Best, BestStore, Checkpoint, better
from togi.learn.policy_objective import ADVANTAGES, OLD_LOGPROBS
from togi.model.checkpoint import written_aside
from togi.obs import names
from togi.obs.metrics import StepRecord
from togi.obs.progress import Progress, Watchdog
from togi.obs.report import write_report
from togi.obs.rollout_store import Split
from togi.obs.run_dir import RunDirectory
from togi.obs.sinks import Recorder, open_trackers
from togi.obs.way_out import tolerated, way_out
from togi.plan.placement import Role
from togi.pump import measure
from togi.pump.experience import ScoredGroup, Trainable, to_sample, trainable, with_advantages
from togi.pump.feed import Feed, RolloutFeed
from togi.pump.filtering import GroupFilter
from togi.pump.replay import replay_feed
from togi.recipes.plan import StepPlan
from togi.recipes.preflight import trackers
from togi.recipes.rl_setup import Material, best_aim, checkpoint_store, plain
from togi.reward.combine import CombinedReward, LengthPenalties
from togi.sample import Sample, with_streams
from togi.workers.phases import Phase
from togi.workers.session import Session, single_logprobs, update_metrics
from togi.workers.worker_group import StepUpdate

logger = logging.getLogger(__name__)

STALL_SECONDS = 1800.0
REPORT_SECONDS = 60.0


class Run:
    """``step`` rollouts have been trained. Use as a context manager: it closes the metric sinks."""

    def __init__(
        self,
        config: RLConfig,
        material: Material,
        reward: CombinedReward,
        plan: StepPlan,
        session: Session,
        directory: RunDirectory,
        progress: Progress,
    ) -> None:
        self.config, self.plan, self.session = config, plan, session
        self._material, self._directory, self._progress = material, directory, progress
        self.step = 0
        self._open = ExitStack()
        self._kl = kl_controller(config.init_kl_coef, config.kl_target, config.kl_horizon)
        self._values: dict[str, float] = {}
        # The shortest text that can be scored has two tokens.
        self._probe: tuple[int, ...] = (material.prompts[0].tokens * 2)[: max(2, len(material.prompts[0].tokens))]
        self._tokens_seen = 0
        self._pretrain_steps = 0
        self._report_due = 0.0
        self._store = checkpoint_store(config)
        self._aim, self._bests = best_aim(config, material), BestStore(Path(config.ckpt_path))
        self._best: Best | None = None
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
        self._episode_ended = False

    def __enter__(self) -> Self:
        self._watchdog = self._open.enter_context(Watchdog(STALL_SECONDS, self._directory.stacks_path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with way_out("closing the run's files and trackers"):
            self._open.close()

    async def resume(self, found: Checkpoint | None) -> None:
        """Go on from a checkpoint; the loader was put in its place before the models were loaded."""
        if found is not None:
            with self._progress.phase(f"loading checkpoint of step {found.step}", expected_seconds=10):
                await self.session.phases.enter(Phase.SAVE)
                await self.session.load(found.path)
            self.step = found.step
            self._kl = self._kl.restored(found.state["kl"])
            self._tokens_seen = found.state["tokens_seen"]
            if self._material.pretraining is not None:
                self._pretrain_steps = self._material.pretraining.steps_of(found.state.get("pretraining"))
            if self._aim is not None:
                self._best = self._bests.resumed(self._aim, found.state.get("best"))
        if self.config.load_checkpoint:
            # Without a checkpoint nothing of an earlier attempt counts, not even its evaluation before training.
            self._directory.truncate_after(self.step if found is not None else -1)
        self._open_recorder(first_step=self.step + 1 if found is not None else 0)
        self._progress.start_steps(self.plan.rollouts, done=self.step)

    def _open_recorder(self, first_step: int) -> None:
        """Only after a resume has moved away what was logged beyond its checkpoint."""
        settings = {name: plain(value) for name, value in self.config.model_dump().items()}
        run_id, folder = self._directory.read_info().run_id, self._directory.root
        opened = open_trackers(trackers(self.config), run_id, folder, settings, first_step)
        self._recorder = Recorder(self._directory.metrics_path, opened)
        self._open.callback(self._recorder.close)

    async def sync(self) -> None:
        """Send the weights to the engines and compare both sides on a probe text. A replay has no engines."""
        if not self.config.generates:
            return
        with self._progress.phase("syncing weights", expected_seconds=3):
            await self.session.phases.enter(Phase.SYNC)
            report = await self.session.sync(self.step)
            self._values[names.MISMATCH_PROBE_MEAN_ABS] = await self.session.probe(self._probe)
            self._values |= await self.session.routing(self._probe)
        self._values |= {
            names.WEIGHT_SYNC_BYTES: report.nbytes,
            names.WEIGHT_SYNC_RATE: report.gb_per_second,
            names.WEIGHT_SYNC_SECONDS: report.seconds,
        }

    async def generate(self) -> list[ScoredGroup]:
        """The next prompts' scored groups, made by the present weights, or in a replay as they were stored."""
        self._watchdog.beat()
        await self.session.phases.enter(Phase.GENERATE)
        generates, loader, start = self.config.generates, self._material.loader, time.perf_counter()
        episode = loader.episode
        with self._progress.phase("generating" if generates else "reading rollouts"):
            count, samples = self.config.rollout_batch_size, self.config.n_samples_per_prompt
            groups = await self._feed.take(loader, count, samples, self.step + 1)
        self._episode_ended = loader.episode > episode
        tokens = sum(len(rollout.response_tokens) for group in groups for rollout in group.rollouts)
        if generates:
            self._values[names.THROUGHPUT_GENERATE] = tokens / (time.perf_counter() - start)
        first = groups[0].rollouts[0]
        self._probe = first.prompt.tokens + first.response_tokens
        return groups

    async def score(self, groups: Sequence[ScoredGroup]) -> tuple[list[Trainable], list[Sample]]:
        """Trainable samples with the log-probs and values that the advantages need."""
        items = trainable(groups, self.config.on_reward_error)
        if not items:
            logger.warning(
                "rollout %d is not trained on: the reward abstained or failed on every response, or filtering left no group",
                self.step + 1,
            )
            return [], []
        await self.session.phases.enter(Phase.SCORE)
        start = time.perf_counter()
        with self._progress.phase("scoring"):
            samples = await self.session.score([to_sample(item) for item in items])
        scored = sum(len(sample.tokens) for sample in samples) * self.session.scoring_passes
        if scored > 0:
            self._values[names.THROUGHPUT_SCORE] = scored / (time.perf_counter() - start)
        return items, samples

    @property
    def actor_is_frozen(self) -> bool:
        """The next rollout is one of the first ``--freezing_actor_steps``."""
        return self.step < self.config.freezing_actor_steps

    def with_advantages(self, items: Sequence[Trainable], samples: Sequence[Sample]) -> list[Sample]:
        """Advantages and returns over the whole step."""
        return with_advantages(items, samples, self.config, self._kl.value)

    async def update(self, role: Role, samples: Sequence[Sample]) -> list[StepUpdate]:
        """All optimizer steps of one model on this rollout."""
        await self.session.phases.enter(Phase.TRAIN)
        start, batches = time.perf_counter(), mini_batches(samples, self.config, self.step)
        mixed = self._pretraining(len(batches)) if role is Role.ACTOR else []
        with self._progress.phase(f"training the {role}"):
            updates = await self.session.update(role, batches, self._kl.value, mixed)
        self._values |= update_metrics(role, [update.report for update in updates])
        if role is Role.ACTOR:
            tokens = sum(update.unshared_tokens for update in updates)
            self._tokens_seen += tokens
            self._values[names.THROUGHPUT_TRAIN] = tokens / (time.perf_counter() - start)
            self._values[names.SHARED_SHARE] = 1 - sum(update.tokens for update in updates) / tokens
            self._values[names.TOKENS_STEP] = tokens
        return updates

    def _pretraining(self, updates: int) -> list[list[Sample]]:
        """The next rows of ``--pretrain_data`` for each update; empty without it."""
        rows = self._material.pretraining
        if rows is None:
            return []
        first, self._pretrain_steps = self._pretrain_steps, self._pretrain_steps + updates
        return [rows.batch(first + number) for number in range(updates)]

    @property
    def is_done(self) -> bool:
        """All rollouts were made, or as filtering needs more prompts for each, all prompts are used up."""
        return self.step >= self.plan.rollouts or self._material.loader.remaining <= 0

    @property
    def evaluation_is_due(self) -> bool:
        """Every ``--eval_steps`` rollouts, or at the end of each episode; always at the end of the run."""
        if len(self._material.held_out) == 0:
            return False
        every = self.config.eval_steps
        return self.is_done or (self.step % every == 0 if every > 0 else self._episode_ended)

    async def evaluate(self) -> tuple[float, float]:
        """Mean reward on the held-out prompts and its standard error."""
        count = self.config.eval_n_samples_per_prompt
        await self.session.phases.enter(Phase.EVALUATE)
        with self._progress.phase("evaluating"):
            groups = await self._eval_feed.run(self._material.held_out, count, f"eval{self.step}")
        self._directory.rollouts.write(self.step, Split.EVAL, measure.rows(self.step, Split.EVAL, groups))
        metrics = measure.eval_metrics(groups, count)
        await self._keep_if_best(metrics)
        if self.step == 0:
            self._recorder.write(StepRecord(0, metrics, self._progress.take_seconds()))
        else:
            self._values |= metrics
        return metrics[names.EVAL_REWARD], metrics[names.EVAL_REWARD_STDERR]

    async def _keep_if_best(self, values: Mapping[str, float]) -> None:
        """Write the actor beside the checkpoints if no evaluation before was as good."""
        aim = self._aim
        if aim is None or not better(aim, values[aim.metric], self._best):
            return
        await self.session.phases.enter(Phase.SAVE)
        self._best = Best(aim, values[aim.metric], self.step)
        with self._progress.phase("writing the best model"), self._bests.write(self._best) as folder:
            await self.session.save_model(Role.ACTOR, folder)
        logger.info(
            "best so far: %s %.5g at step %d, in %s", aim.metric, self._best.value, self.step, self._bests.folder
        )

    async def log(
        self,
        groups: Sequence[ScoredGroup],
        items: Sequence[Trainable],
        samples: Sequence[Sample],
        updates: Sequence[StepUpdate],
    ) -> None:
        """Metrics, every rollout, and now and then the report."""
        self._values |= measure.rollout_metrics(groups) | await self.session.memory()
        if self.config.dynamic_filtering:
            self._values |= measure.filter_metrics(groups, self.config.rollout_batch_size)
        if self._material.rewards.remotes:
            self._values[names.REWARD_PAUSED] = self._material.rewards.take_paused_seconds()
        if updates and OLD_LOGPROBS not in samples[0].streams:
            samples = with_streams(samples, {OLD_LOGPROBS: single_logprobs(updates)})
        if samples and OLD_LOGPROBS in samples[0].streams:
            self._values |= measure.trainer_metrics(samples)
        self._values[names.TOKENS_SEEN] = self._tokens_seen
        if names.KL_REFERENCE in self._values:
            self._kl = self._kl.update(self._values[names.KL_REFERENCE], len(samples))
        details = measure.StepDetails.of(items, samples)
        self._directory.rollouts.write(self.step, Split.TRAIN, measure.rows(self.step, Split.TRAIN, groups, details))
        self._recorder.write(StepRecord(self.step, self._values, self._progress.take_seconds()))
        note = f"reward {self._values[names.REWARD_MEAN]:.3f}"
        if not any(np.any(sample.streams[ADVANTAGES][sample.loss_mask]) for sample in samples):
            note += " (all advantages are 0: no response was better than another, nothing was learnt)"
        self._progress.step(self.step, note)
        self._values = {}
        if time.monotonic() > self._report_due:
            with tolerated("writing the report page"):
                write_report(self._directory.root)
            self._report_due = time.monotonic() + REPORT_SECONDS

    async def checkpoint_if_due(self) -> None:
        """A resumable checkpoint and, if asked for, a model folder inside it."""
        config = self.config
        if config.save_steps <= 0 or self.step % config.save_steps != 0:
            return
        resumable = not config.disable_ds_ckpt
        rows = self._material.pretraining
        state = {
            "resumable": resumable,
            "rollout_batch_size": config.rollout_batch_size,
            "loader": self._material.loader.state().to_json(),
            "kl": self._kl.state,
            "tokens_seen": self._tokens_seen,
            "ema": config.enable_ema,
            "pretraining": rows.state(self._pretrain_steps) if rows is not None else None,
            "best": self._best.to_json() if self._best is not None else None,
        }
        with self._progress.phase("writing a checkpoint"):
            await self.session.phases.enter(Phase.SAVE)
            size = await self.session.checkpoint_bytes() if resumable else 0
            with self._store.write(self.step, state, size) as folder:
                if resumable:
                    await self.session.save(folder)
                if config.save_hf_ckpt:
                    await self.session.save_model(Role.ACTOR, folder / HF_FOLDER)

    async def save(self) -> None:
        """The final model (and average and critic) in plain Hugging Face format, each written aside and renamed."""
        target = self.config.save_path
        with self._progress.phase("saving the model", expected_seconds=5):
            await self.session.phases.enter(Phase.SAVE)
            with written_aside(Path(target)) as aside:
                await self.session.save_model(Role.ACTOR, aside)
            if self.config.enable_ema:
                with written_aside(Path(target + "_ema")) as aside:
                    await self.session.save_average(aside)
            if self.config.save_value_network:
                with written_aside(Path(target + "_critic")) as aside:
                    await self.session.save_model(Role.CRITIC, aside)


def mini_batches(samples: Sequence[Sample], config: RLConfig, step: int) -> list[list[Sample]]:
    """``--train_batch_size`` samples for each optimizer step, groups in a new order in each epoch of each ``step``.

    One update on everything has no order; keeping it lets results be read off in the order of the samples.
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
