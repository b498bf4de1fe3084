"""Online RL: generate, score, advantages, update, sync, log. ``train`` is the loop.

The phases of an RL run, and its state between them. ``togi.run.rl.train`` calls each in one line.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from togi.algo.kl import KLController
from togi.config.parse import Parsed
from togi.config.rl import RLConfig
from togi.errors import WorkerDied, WorkerError
from togi.learn.checkpoint import HF_FOLDER, Checkpoint
from togi.learn.learner import Divergence, UpdateReport
from togi.learn.objective import ADVANTAGES, KL_COEF, OLD_LOGPROBS
from togi.model.checkpoint import written_aside
from togi.obs import names
from togi.obs.progress import Progress
from togi.obs.rollout_store import Split
from togi.obs.way_out import way_out
from togi.plan.machine import this_machine
from togi.plan.placement import LEARNERS, Role
from togi.plan.slots import Rules
from togi.pump import experience
from togi.pump.experience import GroupFilter, Place, ScoredGroup, mini_batches, to_sample, trainable, with_advantages
from togi.pump.feed import Feed, ReplayFeed, RolloutFeed
from togi.pump.ledger import Ledger
from togi.pump.pump import Pump
from togi.reward.scores import CombinedReward, LengthPenalties
from togi.run.healing import again, leaving_a_checkpoint, watched
from togi.run.journal import Evaluation, RunJournal, open_journal
from togi.run.keep import DRIVER, Keep, every
from togi.run.plan import StepPlan
from togi.run.rewards import describe
from togi.run.rl_setup import COMMAND, Material, connect, frozen_weights, opening, origin
from togi.run.signs import Verdict, setting_signs
from togi.sample import Prompt, Sample, with_streams
from togi.workers import start
from togi.workers.protocol import Health
from togi.workers.session import Phase, Session, update_metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """The output of a finished run. ``evaluations`` are in the order of training."""

    run_dir: Path
    report: Path
    model: Path
    rollouts: int
    evaluations: tuple[Evaluation, ...]


async def run(
    parsed: Parsed[RLConfig],
    *,
    argv: Sequence[str] = (),
    reward: Callable[..., object] | None = None,
    announce: Callable[[str], None] = logger.info,
) -> Result:
    """Train with settings from ``start.rl_door``.

    ``reward``: a Python function that replaces ``--reward_func``. Raises UserError for faults that only show with the tokenizer,
    with a call of the reward function or with a loaded model.
    """
    config = parsed.config
    with Progress() as progress:
        # Each block owns what it opens, and closes it also after an error: data and rewards, run folder, workers.
        async with opening(config, reward, progress, announce) as (material, plan, begun):
            for sign in setting_signs(config, plan):
                if sign.verdict in (Verdict.STOPS, Verdict.WARNING):
                    announce(f"warning: {sign.sentence}")
            health, begin, found = Health(config.max_restarts, announce), material.loader.state(), begun
            evaluations: list[Evaluation] | None = None
            while evaluations is None:
                health.step = 0 if found is None else found.step
                try:
                    with open_journal(
                        parsed, COMMAND, argv, progress, announce, material.reports, found, config.stall_timeout
                    ) as journal:
                        async with workers(config, plan, journal, health) as session:
                            combined = await connect(config, material.rewards, session)
                            if line := describe(config, combined):
                                announce(f"reward: {line}")
                            state = RLRun(config, material, combined, plan, session, journal)
                            async with leaving_a_checkpoint(state.last_checkpoint), aclosing(state):
                                evaluations = await train(state, found)
                except WorkerDied as died:
                    # A model worker cannot be replaced alone: the run starts again from its last checkpoint.
                    parsed, found = again(parsed, journal, material, (begun, begin), died, health)
                    config = parsed.config
    return Result(journal.root, journal.root / "report.html", Path(config.save_path), state.step, tuple(evaluations))


@asynccontextmanager
async def workers(config: RLConfig, plan: StepPlan, journal: RunJournal, health: Health) -> AsyncIterator[Session]:
    """Start all engines and models of a run. They stop with the block: in order, or at once after an error."""
    with journal.progress.phase("starting engines and loading models", expected_seconds=25):
        updates = {Role.ACTOR: plan.actor_updates, Role.CRITIC: plan.updates}
        health.stacks = journal.root.resolve() / "stacks"
        session = await start(config, this_machine(), updates, journal.announce, health)
    try:
        async with watched(session, journal.progress, config.stall_timeout):
            journal.record_engine(await session.engine_facts())
            yield session
        await session.close()
    except BaseException as error:
        # Those that computed with a worker that died may have failed first.
        is_consequence = isinstance(error, WorkerError) and not isinstance(error, WorkerDied)
        died = await session.processes.find_dead() if is_consequence else None
        with way_out("ending the workers"):
            session.abandon()
        if died is not None:
            raise died from error
        raise


async def train(run: RLRun, checkpoint: Checkpoint | None) -> list[Evaluation]:
    """The RL loop. With ``--max_staleness`` 0 every rollout is generated by the weights that learn from it; else the pump works on
    beside all stages.

    ``metrics``: the measurements of each phase of a step.
    """
    config, evaluations = run.config, list[Evaluation]()
    # Resume first, then sync: the engines start from --pretrain, not from the checkpoint.
    await run.resume(checkpoint)
    await run.sync(run.first_probe)
    if config.eval_at_start and run.step == 0:
        evaluations.append(await run.evaluate())
        run.journal.write(0, evaluations[-1].metrics)
    while not run.is_done:
        episode = run.episode
        # Stage 1: answers and their rewards.
        groups, metrics = await run.generate()
        if not groups:
            run.journal.announce("the last groups were dropped: tokens of all of them were older than --max_token_lag")
            if len(run.held_out) > 0:
                evaluations.append(await run.evaluate())
            break
        places, samples, scored = await run.score(groups)
        metrics |= scored
        # Stage 2: updates. No samples: every group was filtered out, and the step counts without an update.
        updates: list[UpdateReport] = []
        if samples:
            samples = run.with_advantages(groups, places, samples)
            places, samples, staleness = run.without_stale(groups, places, samples)
            metrics |= staleness
        if samples:
            if Role.CRITIC in run.session.learners:
                metrics |= (await run.update(Role.CRITIC, samples))[1]
            if run.step >= config.freezing_actor_steps:
                updates, updated = await run.update(Role.ACTOR, samples)
                metrics |= updated
        run.step += 1
        # Stage 3: the engines get the new weights before the evaluation uses them.
        # The probe text is the first sequence of this rollout.
        metrics |= await run.sync(groups[0].rollouts[0].row)
        run.feed.published(run.step)
        if run.evaluation_is_due(episode):
            evaluations.append(await run.evaluate())
            metrics |= evaluations[-1].metrics
        await run.log(groups, places, samples, updates, metrics)
        await run.checkpoint_if_due()
    await run.save()
    return evaluations


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
        self._kl = KLController(config.init_kl_coef, config.kl_target, config.kl_horizon)
        self._tokens_seen = 0
        self._divergence = {role: Divergence(f"--{role}_learning_rate") for role in LEARNERS}
        self._pretrain_steps = 0
        self._keep = Keep(config, material.aim, DRIVER, journal)
        # The state of the last finished step, while the models are as they were after it and no checkpoint has it.
        self._resumable: dict[str, object] | None = None
        # Feeds: a live one generates and scores, a replay reads stored rollouts. Evaluation samples at its own
        # temperature.
        generate = session.engines.generate
        seed = config.seed if config.full_determinism else None
        acting, trying = (material.environment(config, t) for t in (config.temperature, config.eval_temperature))
        errors = config.allowed_reward_errors
        penalties = LengthPenalties.of(config) if config.uses_length_penalties else None
        live = RolloutFeed(acting, generate, reward, seed, errors, penalties, GroupFilter.of(config))
        samples = config.n_samples_per_prompt
        self.feed: Feed
        self._pump: Pump | None = None
        if config.replay is not None:
            self.feed = ReplayFeed.of(config.replay, material.loader, samples)
        else:
            rules = Rules(config.rollout_batch_size, config.max_staleness, config.on_stale, config.token_lag)
            ledger = Ledger(
                journal.directory, origin=origin(config), stores=config.save_steps > 0 and not config.disable_ds_ckpt
            )
            self.feed = self._pump = Pump(live, material.loader, rules, samples, plan.rollouts, ledger)
        # Of the time since the last step: what the loop waited for groups. Tokens and responses that were trained on so far.
        self._stepped, self._waited = time.perf_counter(), 0.0
        self._trained = [0, 0]
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
        if self._pump is not None and self.config.load_checkpoint:
            self._pump.resume(self.step, None if found is None else found.state.get("pump"))
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
            report = await self.session.weights.send(self.step)
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
        generates, start = self.config.generates, time.perf_counter()
        with self.journal.progress.phase("generating" if generates else "reading rollouts"):
            groups = await self.feed.take(self.step + 1)
        now = time.perf_counter()
        self._waited += now - start
        tokens = sum(len(rollout.response_tokens) for group in groups for rollout in group.rollouts)
        # Beside training, a rollout takes as long as a step.
        seconds = now - (start if self.config.max_staleness == 0 else self._stepped)
        return groups, {names.THROUGHPUT_GENERATE: tokens / seconds} if generates else {}

    async def score(self, groups: Sequence[ScoredGroup]) -> tuple[list[Place], list[Sample], dict[str, float]]:
        """Trainable samples and their places, with all that the advantages need. Empty if no response has a reward."""
        places = trainable(groups, self.config.on_reward_error)
        if not places:
            logger.warning(
                "rollout %d is not trained on: the reward abstained or failed on every response, or filtering left no group",
                self.step + 1,
            )
            return [], [], {}
        await self.session.phases.enter(Phase.SCORE)
        start = time.perf_counter()
        with self.journal.progress.phase("scoring"):
            # Reference, critic and old logprobs, whichever this run uses.
            samples = await self.session.score([to_sample(groups[g].rollouts[i]) for g, i in places])
        scored = sum(len(sample.tokens) for sample in samples) * self.session.scoring_passes
        rate = {names.THROUGHPUT_SCORE: scored / (time.perf_counter() - start)} if scored > 0 else {}
        return places, samples, rate

    def with_advantages(
        self, groups: Sequence[ScoredGroup], places: Sequence[Place], samples: Sequence[Sample]
    ) -> list[Sample]:
        """Add advantages and returns, computed over the whole step, and the coefficient of a KL in the loss."""
        samples = with_advantages(groups, places, samples, self.config, self._kl.value)
        if not (self.config.uses_reference and self.config.use_kl_loss):
            return samples
        return [replace(sample, values={**sample.values, KL_COEF: self._kl.value}) for sample in samples]

    def without_stale(
        self, groups: Sequence[ScoredGroup], places: Sequence[Place], samples: Sequence[Sample]
    ) -> tuple[list[Place], list[Sample], dict[str, float]]:
        """Leave the tokens that are older than ``--max_token_lag`` out of the loss, and samples without any other.

        Returns places, samples and what was measured; as they are without ``--max_staleness``.
        """
        if self.config.max_staleness == 0:
            return list(places), list(samples), {}
        ages, most = experience.ages(groups, places, self.step), self.config.token_lag
        masked = experience.without_stale(samples, ages, most)
        left = [(place, sample) for place, sample in zip(places, masked, strict=True) if sample.loss_mask.any()]
        self._trained[0] += sum(len(age) for age in ages)
        self._trained[1] += len(samples)
        return [p for p, _ in left], [s for _, s in left], experience.staleness_metrics(groups, places, ages, most)

    async def update(self, role: Role, samples: Sequence[Sample]) -> tuple[list[UpdateReport], dict[str, float]]:
        """All optimizer steps of one model on this rollout. Returns their reports and metrics."""
        await self.session.phases.enter(Phase.TRAIN)
        self._resumable = None
        start, batches = time.perf_counter(), mini_batches(samples, self.config, self.step)
        # The next rows of --pretrain_data are mixed into the actor's updates only.
        mixed, rows = list[list[Sample]](), self._material.pretraining
        if role is Role.ACTOR and rows is not None:
            mixed = [rows.batch(self._pretrain_steps + number) for number in range(len(batches))]
            self._pretrain_steps += len(batches)
        with self.journal.progress.phase(f"training the {role}"):
            updates = await self.session.learners[role].update(batches, mixed)
        self._divergence[role].watch(self.step + 1, updates)
        metrics = update_metrics(role, updates)
        # Tokens are counted once per step, on the actor.
        if role is Role.ACTOR:
            tokens = sum(update.packed.unshared_tokens for update in updates)
            self._tokens_seen += tokens
            metrics |= {
                names.THROUGHPUT_TRAIN: tokens / (time.perf_counter() - start),
                names.SHARED_SHARE: 1 - sum(update.packed.tokens for update in updates) / tokens,
                names.TOKENS_STEP: tokens,
            }
        return updates, metrics

    @property
    def is_done(self) -> bool:
        """Whether all rollouts are made, or, as filtering needs more prompts for each, all prompts are used up."""
        return self.step >= self.plan.rollouts or self.feed.is_empty

    @property
    def held_out(self) -> Sequence[Prompt]:
        """The prompts of an evaluation."""
        return self._material.held_out

    @property
    def episode(self) -> int:
        """The number of the current pass over the prompts."""
        return self.feed.episode

    def evaluation_is_due(self, episode: int) -> bool:
        """Every ``--eval_steps`` rollouts, or without it when ``episode`` has ended; always at the end of the run."""
        if len(self.held_out) == 0:
            return False
        steps = self.config.eval_steps
        return self.is_done or (every(steps, self.step) if steps > 0 else self.episode > episode)

    async def evaluate(self) -> Evaluation:
        """Answer and score the held-out prompts with the current weights. The model is saved if it is the best so far."""
        count = self.config.eval_n_samples_per_prompt
        await self.session.phases.enter(Phase.EVALUATE)
        with self.journal.progress.phase("evaluating"):
            groups = await self._eval_feed.run(self.held_out, count, f"eval{self.step}")
        self.journal.rollouts.write(self.step, Split.EVAL, experience.rows(groups))
        metrics = experience.eval_metrics(groups, count)
        if self._keep.is_best(metrics):
            await self.session.phases.enter(Phase.SAVE)
            with self._keep.best(self.step, metrics) as folder:
                await self.session.save_model(Role.ACTOR, folder)
        return Evaluation(self.step, metrics)

    async def log(
        self,
        groups: Sequence[ScoredGroup],
        places: Sequence[Place],
        samples: Sequence[Sample],
        updates: Sequence[UpdateReport],
        measured: Mapping[str, float],
    ) -> None:
        """Write metrics and samples of a rollout, and adapt the KL coefficient. ``measured``: metrics of the phases."""
        # Metrics of the rollout itself.
        values = {**measured, **experience.rollout_metrics(groups), **await self.session.memory()}
        if self.config.dynamic_filtering:
            values |= experience.filter_metrics(groups, self.config.rollout_batch_size)
        if self._material.rewards.remotes:
            values[names.REWARD_PAUSED] = self._material.rewards.take_paused_seconds()
        # With a single update there was no separate pass for old logprobs: the update's own forward gave them.
        if updates and OLD_LOGPROBS not in samples[0].streams:
            (update,) = updates
            samples = with_streams(samples, {OLD_LOGPROBS: update.logprobs})
        if samples and OLD_LOGPROBS in samples[0].streams:
            values |= experience.trainer_metrics(samples)
        values[names.TOKENS_SEEN] = self._tokens_seen
        values |= self._measure_pump()
        # An adaptive KL controller follows the measured KL.
        if names.KL_REFERENCE in values:
            self._kl = self._kl.update(values[names.KL_REFERENCE], len(samples))
        # Samples, then the line of progress. A step without a gradient says so.
        trained = dict(zip(places, samples, strict=True))
        self.journal.rollouts.write(self.step, Split.TRAIN, experience.rows(groups, trained))
        note = f"reward {values[names.REWARD_MEAN]:.3f}"
        if not any(np.any(sample.streams[ADVANTAGES][sample.loss_mask]) for sample in samples):
            note += " (all advantages are 0: no response was better than another, nothing was learnt)"
        self.journal.write(self.step, values, note)

    def _measure_pump(self) -> dict[str, float]:
        """Who waited for whom since the last step, and what asynchronous training loses."""
        now, waited = time.perf_counter(), self._waited
        seconds, self._stepped, self._waited = now - self._stepped, now, 0.0
        if self._pump is None or self.config.max_staleness == 0:
            return {}
        occupancy, dropped = self._pump.measures()
        trained, offered = (tokens / max(1, responses) for tokens, responses in (self._trained, self._pump.offered))
        return {
            names.PUMP_OCCUPANCY: occupancy,
            names.PUMP_ENGINES_IDLE: self.session.engines.take_idle_share(),
            names.PUMP_TRAINER_IDLE: waited / seconds,
            names.STALENESS_DROPPED: float(dropped),
            names.STALENESS_LENGTH: trained / offered if offered > 0 else 1.0,
        }

    async def checkpoint_if_due(self) -> None:
        """Write a resumable checkpoint and, with --save_hf_ckpt, a model folder inside it."""
        self._resumable = self._state()
        if self._keep.checkpoint_is_due(self.step, self._divergence.values()):
            await self.session.phases.enter(Phase.SAVE)
            await self._write_checkpoint(self._resumable)

    async def last_checkpoint(self) -> None:
        """Write a checkpoint of the last finished step, if the run keeps any, and no update has begun since."""
        config = self.config
        diverged = any(model.in_a_row > 0 for model in self._divergence.values())
        keeps = config.save_steps > 0 and not config.disable_ds_ckpt
        if self._resumable is None or not keeps or diverged or self.session.health.has_stalled:
            return
        self.session.processes.kill_engines()  # whatever they are doing, and their memory is free
        await self.session.wake_learners()
        await self._write_checkpoint(self._resumable)
        self.journal.announce(f"a checkpoint of step {self.step} is written")

    def _state(self) -> dict[str, object]:
        """What a run resumes from after this step, but the models."""
        config, rows = self.config, self._material.pretraining
        return {
            "rollout_batch_size": config.rollout_batch_size,
            "loader": self._material.loader.state().to_json(),
            "pump": None if self._pump is None else self._pump.state(),
            "kl": self._kl.value,
            "tokens_seen": self._tokens_seen,
            "ema": config.enable_ema,
            "lora_alpha": config.lora_alpha,
            "pretraining": rows.state(self._pretrain_steps) if rows is not None else None,
        }

    async def _write_checkpoint(self, state: dict[str, object]) -> None:
        state["frozen"] = frozen_weights(self.config)
        with self._keep.checkpoint(self.step, state, await self.session.checkpoint_bytes()) as folder:
            if not self.config.disable_ds_ckpt:
                await self.session.save(folder)
            if self.config.save_hf_ckpt:
                await self.session.save_model(Role.ACTOR, folder / HF_FOLDER)
        if self._pump is not None:
            self._pump.saved()
        self._resumable = None

    async def aclose(self) -> None:
        """End the work on prompts."""
        if self._pump is not None:
            with way_out("ending the work on prompts"):
                await self._pump.close()

    async def save(self) -> None:
        """Write the final model (also moving average and critic, if set) in Hugging Face format, each aside and then renamed."""
        target = self.config.save_path
        with self.journal.progress.phase("saving the model", expected_seconds=5):
            await self.session.phases.enter(Phase.SAVE)
            with written_aside(Path(target)) as aside:
                await self.session.save_model(Role.ACTOR, aside)
                self.journal.sign(aside)
            if self.config.enable_ema:
                with written_aside(Path(target + "_ema")) as aside:
                    await self.session.save_average(aside)
                    self.journal.sign(aside)
            if self.config.save_value_network:
                with written_aside(Path(target + "_critic")) as aside:
                    await self.session.save_model(Role.CRITIC, aside)
                    self.journal.sign(aside)
        if self._pump is not None:
            self._pump.end()
