"""What an RL run needs before any model is loaded: prompts, mixed-in rows, rewards, the checkpoint to resume from."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from togi.config.choices import OnStale
from togi.config.fields import Hook, hook_of
from togi.config.rl import (
    EnvironmentSettings,
    PromptSettings,
    RewardSettings,
    RLConfig,
    RolloutSettings,
    SampleSettings,
)
from togi.data import chat
from togi.data.precheck import RecordSpec
from togi.data.prompts import LoaderState, PromptLoader, PromptSet, load_prompts
from togi.data.records import Examples, load_sft
from togi.data.report import DataReport
from togi.errors import CheckpointError, DataError
from togi.learn.checkpoint import Aim, Checkpoint
from togi.learn.hooks import check_estimator, check_policy_loss
from togi.learn.learner_state import check_adapter
from togi.model.checkpoint import check_base_files
from togi.model.loading import known_tokens
from togi.obs.names import reward_component
from togi.obs.progress import Progress
from togi.obs.run_dir import RunDirectory
from togi.obs.way_out import way_out
from togi.plan.placement import Role
from togi.pump.feed import ReplayFeed
from togi.reward.scores import (
    CombinedReward,
    LengthPenalties,
    LocalModelReward,
    Reward,
    Standardization,
    combine,
)
from togi.rollout.collect import Environment, SingleTurn
from togi.run.keep import DRIVER, check_room, newest_checkpoint, rl_writing, size_of
from togi.run.loading import check_start, prompt_spec, tokenizer_of
from togi.run.plan import EpochPlan, StepPlan, rl_aim
from togi.run.preflight import asked_context, models_of
from togi.run.rewards import Decode, EarlyRewards, combined, example
from togi.sample import Outcome, Prompt, Sample, Sampling, Score
from togi.weights.files import stamp
from togi.workers.model_worker import ScorerWorker
from togi.workers.session import Session
from togi.workers.worker_group import ModelScores

if TYPE_CHECKING:
    from togi.run.worlds import Worlds

COMMAND = "rl"
logger = logging.getLogger(__name__)


async def connect(config: RLConfig, early: EarlyRewards, session: Session) -> CombinedReward:
    """All rewards as one. Each local model is standardised by its own statistics with ``--normalize_reward``."""
    if not config.generates:
        return CombinedReward(())
    models: list[Reward] = []
    for name, group in zip(early.names, session.reward_models, strict=False):
        mean, std = (await group.call_all(ScorerWorker.reward_statistics))[0]
        standardization = Standardization(mean, std) if config.normalize_reward else None
        models.append(LocalModelReward(ModelScores(group, alone=config.full_determinism).score, standardization, name))
    return combined(config, early, models)


@dataclass(frozen=True, slots=True)
class Pretraining:
    """Supervised rows that are mixed into the actor's updates against forgetting.

    PPO-ptx of InstructGPT (Ouyang et al. 2022, arXiv 2203.02155, equation 2): their language-model loss times ``--ptx_coef`` is
    added to the policy loss in every optimizer step. The rows of a step depend only on the seed and the step number; there are as
    many epochs as the steps need.
    """

    examples: Examples
    plan: EpochPlan

    def batch(self, step: int) -> list[Sample]:
        """The rows of optimizer step ``step``, counted from 0."""
        return [sample for row in self.plan.rows_of(step) for sample in self.examples[row]]

    def state(self, steps: int) -> dict[str, object]:
        """The checkpoint state after ``steps`` optimizer steps."""
        return {"steps": steps, "batch": self.plan.batch, "fingerprint": self.examples.fingerprint()}

    def steps_of(self, state: Mapping[str, object] | None) -> int:
        """The number of steps in a checkpoint state. Raises CheckpointError if it was made with other rows or none."""
        if state is None:
            raise CheckpointError(
                "The checkpoint was made without --pretrain_data: leave it out, or start anew with another --ckpt_path."
            )
        steps = state["steps"]
        if not isinstance(steps, int) or state != self.state(steps):
            raise CheckpointError(
                "The checkpoint was made with other rows of --pretrain_data, or another number of them a step: go on with the "
                "same ones, or start anew with another --ckpt_path."
            )
        return steps


@dataclass(frozen=True, slots=True)
class Material:
    """Prompts, held-out prompts (empty without ``--eval_dataset``), and the rewards that need no worker of the run.

    ``pretraining`` is None without ``--pretrain_data``. ``trial``: the scores of a made-up answer, by reward name. ``aim``: the
    metric of the best model, None if none is kept.
    """

    prompts: PromptSet
    loader: PromptLoader
    held_out: Sequence[Prompt]
    pretraining: Pretraining | None
    reports: Mapping[str, DataReport]
    decode: Decode
    stop_token_ids: tuple[int, ...]
    rewards: EarlyRewards
    trial: Mapping[str, Sequence[Score]] = field(default_factory=dict)
    aim: Aim | None = None
    worlds: Worlds | None = None

    def environment(self, config: RLConfig, temperature: float) -> Environment:
        """What the policy acts in at the given temperature: a single turn, or the run's environments."""
        sampling = Sampling(config.generate_max_len, temperature, config.top_p, stop_token_ids=self.stop_token_ids)
        return SingleTurn(self.decode, sampling) if self.worlds is None else self.worlds.environment(sampling)


@asynccontextmanager
async def opening(
    config: RLConfig, function: Callable[..., object] | None, progress: Progress, announce: Callable[[str], None]
) -> AsyncIterator[tuple[Material, StepPlan, Checkpoint | None]]:
    """Everything that comes before a process or a folder of a run, with the checkpoint to resume from.

    The rewards close with the block. Raises UserError.
    """
    # Try the user's own advantage estimator and policy loss on a made-up batch.
    if isinstance(config.advantage_estimator, Hook):
        check_estimator(config.advantage_estimator, penalised=config.uses_reference and not config.use_kl_loss)
    if isinstance(config.policy_loss_type, Hook):
        clips = bool(config.changed("eps_clip", "eps_clip_low_high"))
        check_policy_loss(config.policy_loss_type, *config.clip_range, clips=clips)
    # Processes start now and import while the prompts are read.
    rewards = EarlyRewards(config, function)
    worlds: Worlds | None = None
    if config.acts and config.generates:
        # What environments and agents need is loaded for them alone.
        from togi.run.worlds import Worlds

        worlds = Worlds(config)
    try:
        material = await prepare(config, rewards, worlds, progress)
        plan = StepPlan.of(config, len(material.prompts))
        announce(plan.describe(config))
        check_room(config, rl_writing(config, plan.rollouts, size_of(config)))
        if config.replay is not None:
            announce(check_replay(config, config.replay, material, plan))
        yield material, plan, find_checkpoint(config, material, progress)
    finally:
        with way_out("closing the rewards"):
            await rewards.close()
        with way_out("closing the environments"):
            if worlds is not None:
                await worlds.close()


async def prepare(config: RLConfig, rewards: EarlyRewards, worlds: Worlds | None, progress: Progress) -> Material:
    """Load tokenizer and prompts, then check labels and try reward functions and servers on each kind. Raises UserError."""
    with progress.phase("reading prompts", expected_seconds=8):
        # Stage 1: the model's config fits the settings; no weights are read.
        flash = config.flash_attn and config.bf16
        check_start(config, flash_attn=flash, asked=asked_context(config), longest=config.context_length)
        if config.generates and config.sends_adapter:
            check_base_files(config.pretrain, "bfloat16" if config.bf16 else "float32", config.trust_remote_code)
        # Stage 2: tokenizer and rows.
        tokenizer = tokenizer_of(config)
        known = known_tokens(config.pretrain, config.trust_remote_code)
        chat.check_vocabulary(tokenizer, config.pretrain, known, apply_chat_template=config.apply_chat_template)
        prompts = load_prompts(prompt_spec(config, config.prompt_data, config.prompt_split, training=True), tokenizer)
        reports = {"prompts": prompts.report}
        held_out: Sequence[Prompt] = ()
        if config.eval_dataset is not None:
            loaded = load_prompts(
                prompt_spec(config, config.eval_dataset, config.eval_split, training=False), tokenizer
            )
            held_out, reports["eval_prompts"] = loaded, loaded.report
        pretraining = None
        if config.pretrain_data is not None:
            pretraining = load_pretraining(config, config.pretrain_data, tokenizer)
            reports["pretrain_data"] = pretraining.examples.report
        # A token id beyond the embedding would fail inside a kernel, so it is found here.
        check_rows(config, tokenizer, [*prompts, *held_out], pretraining)
    # Stage 3: one real call of each reward.
    rewards.connect_servers(config, partial(chat.visible, tokenizer))
    trial: Mapping[str, Sequence[Score]] = {}
    if config.generates:
        with progress.phase("trying the reward", expected_seconds=2):
            for each in (prompts, held_out):
                if isinstance(each, PromptSet):
                    await rewards.check_labels(each, each.place)
            trial = await rewards.check((*prompts, *held_out), config.n_samples_per_prompt)
            check_parts(config, rewards.names, prompts[0], trial)
    # Stage 4: where answers end, and how episodes begin.
    stops = chat.stop_token_ids(tokenizer, config.pretrain, chat=config.apply_chat_template)
    if notice := chat.end_notice(tokenizer, config.pretrain, stops):
        logger.warning("%s", notice)
    if worlds is not None:
        with progress.phase("trying the environment", expected_seconds=2):
            for each in (prompts, held_out):
                if isinstance(each, PromptSet):
                    await worlds.check(each, each.place, tokenizer, stops)
    loader = PromptLoader(prompts, seed=config.seed, episodes=config.num_episodes)
    decode = partial(chat.decode, tokenizer)
    aim = rl_aim(config, sorted({prompt.datasource for prompt in held_out}))
    return Material(prompts, loader, held_out, pretraining, reports, decode, stops, rewards, trial, aim, worlds)


def check_rows(
    config: RLConfig, tokenizer: chat.Tokenizer, prompts: Sequence[Prompt], pretraining: Pretraining | None
) -> None:
    """Check that every model has an embedding row for every token: the policy for the tokens of the data, other models for all
    tokens that the policy may write. Raises ModelError.
    """

    def largest() -> int:
        mixed = -1 if pretraining is None else pretraining.examples.largest_token()
        return max(mixed, *(max(prompt.tokens, default=-1) for prompt in prompts))

    known = known_tokens(config.pretrain, config.trust_remote_code)
    chat.check_tokens(tokenizer, config.pretrain, known, largest)
    # The policy cannot write a token beyond its embedding or beyond its tokenizer.
    written = min(known - 1, max(tokenizer.get_vocab().values()))
    for _, path in models_of(config)[1:]:
        chat.check_tokens(tokenizer, path, known_tokens(path, config.trust_remote_code), lambda: written)


def check_parts(config: RLConfig, names: Sequence[str], prompt: Prompt, trial: Mapping[str, Sequence[Score]]) -> None:
    """Name the parts of the trial's reward as the run will. Raises RewardError for one that is a length penalty or a metric."""
    # reward models are not loaded yet
    row = [trial[name][0] if name in trial else Score(Outcome.SCORE, 0.0) for name in names]
    for score in LengthPenalties.of(config).applied([example(prompt)], [combine(names, [1.0] * len(names), row)]):
        for part in score.components:
            reward_component(part)


def find_checkpoint(config: RLConfig, material: Material, progress: Progress) -> Checkpoint | None:
    """The newest complete checkpoint with ``--load_checkpoint``, else None. Sets the loader to its position.

    Raises DataError if the prompts have changed and CheckpointError if there is no resumable state.
    """
    if not config.load_checkpoint:
        return None
    with progress.phase("looking for a checkpoint", expected_seconds=5):
        found = newest_checkpoint(config, DRIVER)
    if found is None:
        return None
    # What the checkpoint must agree on with this run: adapter, critic, prompts per rollout, prompts, average, mixed-in rows.
    check_adapter(found, Role.ACTOR, config)
    if config.uses_critic and not (found.path / Role.CRITIC).is_dir():
        raise CheckpointError(
            f"The checkpoint {found.path} has no critic, which --advantage_estimator {config.advantage_estimator} needs: go on "
            "with the estimator that it was written with, or start anew with another --ckpt_path."
        )
    now = frozen_weights(config)
    for flag, weights in found.state.get("frozen", {}).items():
        if now.get(flag, weights) != weights:
            raise CheckpointError(
                f"The checkpoint {found.path} was written with other weights in --{flag} {dict(models_of(config))[flag]}, "
                "of which the run uses a frozen copy: give the same model, or start anew with another --ckpt_path."
            )
    saved = found.state["rollout_batch_size"]
    if saved != config.rollout_batch_size:
        raise CheckpointError(
            f"The checkpoint {found.path} counts rollouts of {saved} prompts: go on with --rollout_batch_size {saved}, or start "
            "anew with another --ckpt_path."
        )
    work = found.state.get("pump") or {"slots": []}
    if work["slots"] and (config.max_staleness < work["staleness"] or config.token_lag < work["max_lag"]):
        raise CheckpointError(
            f"The checkpoint {found.path} has prompts in work that may become as old as --max_staleness {work['staleness']} "
            f"--max_token_lag {work['max_lag']} allow: go on with these, or larger ones, or start anew with another --ckpt_path."
        )
    material.loader.load_state(LoaderState(**found.state["loader"]))
    if config.enable_ema and not found.state.get("ema", False):
        raise CheckpointError(
            f"The checkpoint {found.path} has no moving average, as it was written without --enable_ema: leave --enable_ema out, "
            "or start anew with another --ckpt_path."
        )
    if material.pretraining is not None:
        material.pretraining.steps_of(found.state.get("pretraining"))
    return found


def frozen_weights(config: RLConfig) -> dict[str, str]:
    """The stamp of each model that the run uses frozen and no checkpoint holds, by its flag: the reference and bases of adapters.

    Reward models may change, as reward functions and servers may: the metrics show it.
    """
    flags = {path: flag for flag, path in reversed(models_of(config))}
    frozen = {config.pretrain} if config.uses_reference or config.lora is not None else set()
    if config.uses_critic and config.lora is not None:
        frozen.add(config.critic_source)
    return {flags[path]: stamp(path) for path in frozen}


def check_replay(config: RLConfig, folder: str, material: Material, plan: StepPlan) -> str:
    """Check that every step of the run is stored, and that the first step has the prompts that this run would take.

    Returns a line for the log. Raises DataError.
    """
    feed, rollouts = ReplayFeed.of(folder, material.loader, config.n_samples_per_prompt), plan.rollouts
    if config.dynamic_filtering:
        rollouts = min(rollouts, feed.steps_for(len(material.prompts) * config.num_episodes))
    if config.on_stale is OnStale.DROP:  # the last groups may have been dropped, and their steps with them
        rollouts = min(rollouts, feed.last_step)
    feed.check(rollouts)
    if config.max_staleness == 0 and (step := feed.first_stale_step()) > 0:
        raise DataError(
            f"--replay: step {step} of {feed.store.folder} has tokens of older weights: give the --max_staleness and "
            "--max_token_lag of that run."
        )
    taken, wanted = feed.prompts_of(1), plan.prompts[0]
    if taken != wanted and not config.dynamic_filtering:
        raise DataError(
            f"--replay: step 1 of {feed.store.folder} has {taken} prompts, but this run takes {wanted}: give the prompts and the "
            "--rollout_batch_size of that run."
        )
    feed.groups(1)
    line, values = (
        f"replay of {folder}: no engine runs and no reward is called",
        RunDirectory(Path(folder)).read_info().values,
    )
    names = ("max_staleness", "max_token_lag")
    before = config.model_copy(update={str(name): values[name]["value"] for name in names if name in values})
    then, now = before.token_lag, config.token_lag
    if then != now and config.max_staleness > 0:
        line += f"; tokens older than {now} updates are left out of the loss, in that run those older than {then}"
    return line


def load_pretraining(config: RLConfig, data: str, tokenizer: chat.Tokenizer) -> Pretraining:
    """Read ``--pretrain_data``: plain texts, learned as a whole, or prompts and responses. Raises DataError."""
    rows = RecordSpec(
        dataset=data,
        dataset_probs=config.pretrain_data_probs,
        split=config.pretrain_split,
        max_samples=config.pretrain_max_samples,
        max_len=config.pretrain_max_len or config.prompt_max_len + config.generate_max_len,
        input_key=config.pretrain_input_key,
        output_key=config.pretrain_output_key,
        input_template=config.input_template,
        apply_chat_template=config.apply_chat_template and config.pretrain_output_key is not None,
        pretrain_mode=config.pretrain_output_key is None,
        seed=config.seed,
        max_bad_rows=config.max_bad_rows,
    )
    try:
        examples = load_sft(rows, tokenizer)
    except DataError as error:
        raise DataError(f"--pretrain_data: {error}") from None
    # One epoch suffices: ``rows_of`` continues after the last epoch of a plan, in new permutations.
    return Pretraining(examples, EpochPlan(len(examples), config.pretrain_rows, epochs=1, seed=config.seed))


def origin(config: RLConfig) -> str:
    """All that a scored group depends on, beside weights and prompt: only where this is the same is it used again."""
    sources = (PromptSettings, RewardSettings, RolloutSettings, EnvironmentSettings, SampleSettings)
    values, named = dict(config), [name for source in sources for name in source.model_fields]
    acting = [*(config.environment or {}).values(), *filter(None, [hook_of(config.agent or "")])]
    files = [Path(file) for file in (*config.reward_files, *(hook.path for hook in acting))]
    code = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    return repr([(name, values[name]) for name in (*named, "pretrain", "seed", "full_determinism")] + code)
