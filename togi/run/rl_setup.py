"""What an RL run needs before any model is loaded: prompts, mixed-in rows, rewards, the checkpoint to resume from.

The rewards of an RL run: functions and servers start before any model is loaded, then local models; all form one reward.
"""

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from togi.config.choices import BUILTIN, RemoteMode
from togi.config.fields import Hook
from togi.config.rl import RLConfig, verifier_of
from togi.data import chat
from togi.data.precheck import RecordSpec
from togi.data.prompts import LoaderState, PromptLoader, PromptSet, PromptSpec, load_prompts
from togi.data.records import Examples, load_sft
from togi.data.report import DataReport
from togi.errors import CheckpointError, DataError, RewardError
from togi.learn.checkpoint import Aim, Checkpoint
from togi.learn.hooks import check_estimator, check_policy_loss
from togi.learn.learner_state import check_adapter
from togi.model.checkpoint import check_base_files
from togi.model.loading import known_tokens
from togi.obs.names import reward_component
from togi.obs.progress import Progress
from togi.obs.way_out import way_out
from togi.plan.placement import Role
from togi.pump.feed import ReplayFeed
from togi.reward.function import CallLimits, FunctionReward
from togi.reward.remote import TOKEN_VARIABLE, ConnectionLimits, RemoteReward
from togi.reward.scores import (
    CombinedReward,
    LengthPenalties,
    LocalModelReward,
    Reward,
    Standardization,
    Term,
    combine,
    distinct_names,
)
from togi.rollout.collect import SingleTurn
from togi.run.keep import DRIVER, newest_checkpoint
from togi.run.loading import UNLIMITED, check_start, spec_of, tokenizer_of
from togi.run.plan import EpochPlan, StepPlan, rl_aim
from togi.run.preflight import asked_context, models_of
from togi.sample import FinishReason, Outcome, Prompt, Rollout, Sample, Sampling, Score
from togi.workers.model_worker import ScorerWorker
from togi.workers.session import Session
from togi.workers.worker_group import ModelScores

COMMAND = "rl"
logger = logging.getLogger(__name__)
SHOWN_CHARACTERS = 60
Decode = Callable[[Sequence[int]], str]
# The reward is tried on at most this many kinds of labels.
TRIALS = 8


class EarlyRewards:
    """The rewards that need no worker of the run. Function processes start here, servers with ``connect_servers``.

    ``names``: of all rewards in the order of ``--reward_weights``: models, servers, functions. Empty in a replay.
    ``functions`` and ``remotes`` (the clients of servers) are by name.
    """

    def __init__(self, config: RLConfig, function: Callable[..., object] | None) -> None:
        self.names = reward_names(config, function_given=function is not None) if config.generates else []
        self.functions = dict[str, FunctionReward]()
        self.remotes = dict[str, RemoteReward]()
        self._readers: list[FunctionReward] = []  # the built-in functions that can check labels
        limits = CallLimits(config.reward_workers, config.reward_timeout, config.reward_retries)
        own = self.names[len(config.reward_models) + config.remote_sources :]
        for item, name in zip(config.reward_files, own, strict=False):
            if (verifier := verifier_of(item)) is None:
                self.functions[name] = FunctionReward.from_file(item, limits, name)
            else:
                settings = config.verifier_settings(verifier)
                self.functions[name] = FunctionReward.from_verifier(verifier, settings, limits, name)
                self._readers += [self.functions[name]] * verifier.checks_labels
        if function is not None and own:
            self.functions[own[-1]] = FunctionReward.from_callable(function, limits, own[-1])

    def connect_servers(self, config: RLConfig, visible: Decode) -> None:
        """Make the clients. ``visible`` decodes response tokens with special tokens kept."""
        token = os.environ.get(TOKEN_VARIABLE, "")
        most, timeout, pause = config.remote_rm_concurrency, config.reward_timeout, config.remote_rm_max_pause
        limits = ConnectionLimits(most, timeout, token, config.reward_retries, pause)

        def response(rollout: Rollout) -> str:
            return visible(rollout.response_tokens)

        for urls, name in zip(shared_urls(config), self.names[len(config.reward_models) :], strict=False):
            self.remotes[name] = RemoteReward(urls, limits, response, name)

    async def check_labels(self, prompts: PromptSet) -> None:
        """Have the built-in functions check every label. Raises RewardError naming the first row whose label is of no use."""
        for function in self._readers:
            await function.check_labels(prompts, prompts.place)

    async def check(self, groups: Sequence[Sequence[Rollout]]) -> Mapping[str, Sequence[Score]]:
        """Call every reward once on each group. Returns the scores of the first group by reward name.

        Raises RewardError for the first that fails, and for a built-in function that abstains on every group.
        """
        first: dict[str, Sequence[Score]] = {}
        # Functions are tried first: they answer fastest, and a wrong --label_key shows here.
        for name, function in self.functions.items():
            scores = [await function.check(group) for group in groups]
            silent = all(score.outcome is Outcome.ABSTAIN for found in scores for score in found)
            if silent and not function.is_built_in:
                # it may look at the answer, and that of a trial is made up
                logger.warning(
                    "%s abstained on every trial answer: what it returns None for is not trained on", function.shown_as
                )
            elif silent:
                prompt = groups[0][0].prompt
                raise RewardError(
                    f"{function.shown_as} can use no label of those tried (the first: {shown_label(prompt.label)} of prompt "
                    f"{prompt.id!r}): point --label_key at the field that it is made for."
                )
            first[name] = scores[0]
        for name, remote in self.remotes.items():
            first[name], *_ = [await remote.check(group) for group in groups]
        return first

    def take_paused_seconds(self) -> float:
        """The longest time since the last call, in seconds, that the run waited for a server."""
        return max(remote.take_paused_seconds() for remote in self.remotes.values())

    async def close(self) -> None:
        """Stop processes and close connections."""
        sources: list[Reward] = [*self.functions.values(), *self.remotes.values()]
        async with AsyncExitStack() as stack:  # closes all of them, even if one fails
            for source in sources:
                stack.push_async_callback(source.close)


async def connect(config: RLConfig, early: EarlyRewards, session: Session) -> CombinedReward:
    """All rewards as one. Each local model is standardised by its own statistics with ``--normalize_reward``."""
    if not config.generates:
        return CombinedReward(())
    models: list[Reward] = []
    for name, group in zip(early.names, session.reward_models, strict=False):
        mean, std = (await group.call_all(ScorerWorker.reward_statistics))[0]
        standardization = Standardization(mean, std) if config.normalize_reward else None
        models.append(LocalModelReward(ModelScores(group).score, standardization, name))
    return combined(config, early, models)


def combined(config: RLConfig, early: EarlyRewards, models: Sequence[Reward]) -> CombinedReward:
    """All rewards as one. ``models``: the local reward models."""
    sources = [*models, *early.remotes.values(), *early.functions.values()]
    weights = config.reward_weights if config.reward_weights is not None else (1.0,) * len(sources)
    terms = [Term(name, source, weight) for name, source, weight in zip(early.names, sources, weights, strict=True)]
    return CombinedReward(terms, config.reward_combine)


def describe(config: RLConfig, reward: CombinedReward) -> str:
    """One line on how rewards are combined and servers shared; "" if there is one reward and one server."""
    shared = config.remote_rm_mode is RemoteMode.BALANCE and len(config.reward_urls) > 1
    note = f"{len(config.reward_urls)} reward servers share the samples (--remote_rm_mode balance)" if shared else ""
    return "; ".join(part for part in (reward.formula if len(reward.terms) > 1 else "", note) if part)


def shared_urls(config: RLConfig) -> list[tuple[str, ...]]:
    """The server URLs of each reward: all URLs for one reward, or in ensemble mode one URL each."""
    if config.remote_rm_mode is RemoteMode.ENSEMBLE:
        return [(url,) for url in config.reward_urls]
    return [config.reward_urls] if config.reward_urls else []


def reward_names(config: RLConfig, *, function_given: bool) -> list[str]:
    """Distinct names of all rewards for the logs: the kind if there is one of it, else file, folder or host names."""
    models = [Path(path).name for path in config.reward_models]
    servers = [_host(urls[0]) for urls in shared_urls(config)]
    functions = [Path(path).stem.removeprefix(BUILTIN) for path in config.reward_files] + ["function"] * function_given
    kinds = ((models, "reward_model"), (servers, "remote"), (functions, "function"))
    return distinct_names(
        [name for names, kind in kinds for name in (names if len(names) > 1 else [kind] * len(names))]
    )


def shown_label(label: object) -> str:
    """The beginning of a label, for messages."""
    text = repr(label)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _host(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.hostname}_{parts.port}" if parts.port is not None else str(parts.hostname)


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

    def environment(self, config: RLConfig, temperature: float) -> SingleTurn:
        """A single-turn environment at the given temperature."""
        sampling = Sampling(config.generate_max_len, temperature, config.top_p, stop_token_ids=self.stop_token_ids)
        return SingleTurn(self.decode, sampling)


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
    rewards = EarlyRewards(config, function)  # processes start now and import while the prompts are read
    try:
        material = await prepare(config, rewards, progress)
        plan = StepPlan.of(config, len(material.prompts))
        announce(plan.describe(config))
        if config.replay is not None:
            announce(check_replay(config, config.replay, material, plan))
        yield material, plan, find_checkpoint(config, material, progress)
    finally:
        with way_out("closing the rewards"):
            await rewards.close()


async def prepare(config: RLConfig, rewards: EarlyRewards, progress: Progress) -> Material:
    """Load tokenizer and prompts, then check labels and try reward functions and servers on each kind. Raises UserError."""
    with progress.phase("reading prompts", expected_seconds=8):
        # Stage 1: the model's config fits the settings; no weights are read.
        check_start(config, flash_attn=config.flash_attn, asked=asked_context(config), longest=config.context_length)
        if config.generates and config.sends_adapter:
            check_base_files(config.pretrain, "bfloat16" if config.bf16 else "float32", config.trust_remote_code)
        # Stage 2: tokenizer and rows.
        tokenizer = tokenizer_of(config)
        known = known_tokens(config.pretrain, config.trust_remote_code)
        chat.check_vocabulary(tokenizer, config.pretrain, known, apply_chat_template=config.apply_chat_template)
        prompts = load_prompts(spec(config, config.prompt_data, config.prompt_split, training=True), tokenizer)
        reports = {"prompts": prompts.report}
        held_out: Sequence[Prompt] = ()
        if config.eval_dataset is not None:
            loaded = load_prompts(spec(config, config.eval_dataset, config.eval_split, training=False), tokenizer)
            held_out, reports["eval_prompts"] = loaded, loaded.report
        pretraining = None
        if config.pretrain_data is not None:
            pretraining = load_pretraining(config, config.pretrain_data, tokenizer)
            reports["pretrain_data"] = pretraining.examples.report
        # A token id beyond the embedding would fail inside a kernel, so it is found here.
        check_rows(config, tokenizer, [*prompts, *held_out], pretraining)
    # Stage 3: one real call of each reward. Two answers suffice to show whether groups work.
    rewards.connect_servers(config, partial(chat.visible, tokenizer))
    trial: Mapping[str, Sequence[Score]] = {}
    if config.generates:
        with progress.phase("trying the reward", expected_seconds=2):
            for each in (prompts, held_out):
                if isinstance(each, PromptSet):
                    await rewards.check_labels(each)
            size = min(2, config.n_samples_per_prompt)
            groups = [[example(prompt)] * size for prompt in trial_prompts((*prompts, *held_out))]
            trial = await rewards.check(groups)
            check_parts(config, rewards.names, groups[0], trial)
    # Stage 4: where answers end.
    stops = chat.stop_token_ids(tokenizer, config.pretrain, chat=config.apply_chat_template)
    if notice := chat.end_notice(tokenizer, config.pretrain, stops):
        logger.warning("%s", notice)
    loader = PromptLoader(prompts, seed=config.seed, episodes=config.num_episodes)
    decode = partial(chat.decode, tokenizer)
    aim = rl_aim(config, sorted({prompt.datasource for prompt in held_out}))
    return Material(prompts, loader, held_out, pretraining, reports, decode, stops, rewards, trial, aim)


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


def spec(config: RLConfig, data: str, split: str, *, training: bool) -> PromptSpec:
    """How to read a prompt set. Probabilities and --max_samples apply to the training set only."""
    whole = {} if training else {"prompt_data_probs": None, "max_samples": UNLIMITED}
    return spec_of(PromptSpec, config, prompt_data=data, split=split, **whole)


def trial_prompts(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The first prompt of each data source and kind of label, so that a label that a reward cannot read is found early."""
    found: dict[object, Prompt] = {}
    for prompt in prompts:
        found.setdefault((prompt.datasource, _kind(prompt.label)), prompt)
    return list(found.values())[:TRIALS]


def check_parts(
    config: RLConfig, names: Sequence[str], group: Sequence[Rollout], trial: Mapping[str, Sequence[Score]]
) -> None:
    """Name the parts of the trial's reward as the run will. Raises RewardError for one that is a length penalty or a metric."""
    untried = [Score(Outcome.SCORE, 0.0)] * len(group)  # reward models are not loaded yet
    rows = zip(*(trial.get(name, untried) for name in names), strict=True)
    scores = [combine(names, [1.0] * len(names), row) for row in rows]
    for score in LengthPenalties.of(config).applied(group, scores):
        for part in score.components:
            reward_component(part)


def _kind(label: object) -> object:
    if isinstance(label, Mapping):
        return tuple(sorted(map(str, label)))
    if isinstance(label, list):
        return list, *(_kind(item) for item in label[:1])
    return type(label), isinstance(label, str) and not label.strip()


def example(prompt: Prompt) -> Rollout:
    """A made-up answer to a real prompt, to try the reward on."""
    return Rollout(prompt, "trial", (0,), (True,), (0.0,), "A trial answer: 42", FinishReason.STOP, 0)


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
    saved = found.state["rollout_batch_size"]
    if saved != config.rollout_batch_size:
        raise CheckpointError(
            f"The checkpoint {found.path} counts rollouts of {saved} prompts: go on with --rollout_batch_size {saved}, or start "
            "anew with another --ckpt_path."
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


def check_replay(config: RLConfig, folder: str, material: Material, plan: StepPlan) -> str:
    """Check that every step of the run is stored, and that the first step has the prompts that this run would take.

    Returns a line for the log. Raises DataError.
    """
    feed = ReplayFeed.of(folder, filtering=config.dynamic_filtering)
    rollouts = plan.rollouts
    if config.dynamic_filtering:
        rollouts = min(rollouts, feed.steps_for(len(material.prompts) * config.num_episodes))
    feed.check(rollouts)
    # A loader of its own: the run's loader must not move.
    loader = PromptLoader(material.prompts, seed=config.seed, episodes=1)
    first = loader.take(feed.prompts_of(1, config.rollout_batch_size))
    feed.groups(first, config.n_samples_per_prompt, 1)
    return f"replay of {folder}: no engine runs and no reward is called"


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
