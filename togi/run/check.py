"""The part of ``togi check`` that needs tokenizer and rows: it runs the opening of the run and reports what it found.

The lines that ``togi check`` prints.

A few groups sampled from the policy in this process: no Ray, no vLLM, one copy of the weights.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence

from togi.config.choices import EngineName, WorkersKind
from togi.config.model_facts import position_limit
from togi.config.parse import C as Config
from togi.config.parse import Parsed, Source
from togi.config.rl import RLConfig
from togi.config.shared import PromptText
from togi.data.chat import Tokenizer, visible
from togi.data.prompts import PromptLoader
from togi.data.report import DataReport
from togi.errors import ConfigError, UserError
from togi.learn.schedule import standing_still
from togi.methods.method import Method
from togi.model.checkpoint import Sizes
from togi.obs.progress import Progress
from togi.obs.run_dir import redact_value
from togi.obs.way_out import way_out
from togi.parallel.process import World
from togi.plan.machine import joins_cluster, this_machine
from togi.plan.placement import IN_PROCESS, arithmetic, plan_groups
from togi.pump.experience import GroupFilter, ScoredGroup
from togi.pump.feed import RolloutFeed
from togi.reward.scores import LengthPenalties, LocalModelReward
from togi.rollout import create_engine
from togi.rollout.engine import RolloutEngine, end_token_ids
from togi.run import offline, rewards, rl_setup, signs
from togi.run.keep import check_room, offline_writing, rl_writing, size_of
from togi.run.loading import RewardModel, engine_settings, tokenizer_of
from togi.run.plan import StepPlan
from togi.run.preflight import asked_context, model_settings
from togi.run.rewards import combined, reward_names
from togi.run.rl_setup import Material
from togi.sample import Outcome, Score
from togi.weights.files import local_folder

LONGEST = 2000
SHOWN_FAULTS = 3
SHOWN_GROUPS = 3
SHOWN = 200
PAIR = ("chosen", "rejected")


def settings_text(parsed: Parsed[Config]) -> Iterator[str]:
    """Every setting that was given, with its source. Settings derived from this machine are reported elsewhere."""
    values = parsed.config.model_dump(mode="json")
    given = {name: value for name, value in values.items() if parsed.sources[name] not in (Source.DEFAULT, Source.AUTO)}
    yield "settings (all others are at their defaults):"
    for name, value in given.items():
        words = " ".join(map(str, value)) if isinstance(value, list) else value
        shown = " ".join(str(redact_value(name, words)).split())
        yield f"  --{name} {shown if len(shown) <= SHOWN else shown[:SHOWN] + ' ...'} ({parsed.sources[name]})"


def model_text(path: str, found: Sizes, asked: str, tokenizer: Tokenizer, stops: Sequence[int]) -> Iterator[str]:
    """The size of the model, its lengths, and of its tokenizer type, size and special tokens.

    ``asked``: the flags of the longest sequence. ``stops``: the tokens that end an answer.
    """
    adapter = f", {found.trained:,} of an adapter are trained" if found.adapter else ""
    yield (
        f"model: --pretrain {path} has {found.weights:,} weights in {found.layers} layers of width {found.hidden}{adapter}; "
        f"its embedding has {found.embedding:,} rows"
    )
    positions = position_limit(model_settings(path))
    yield f"lengths: {asked}" + ("" if positions is None else f", of {positions} positions that the model has")
    names = {"BOS": tokenizer.bos_token, "EOS": tokenizer.eos_token, "padding": tokenizer.pad_token}
    special = ", ".join(f"{name} {token!r}" for name, token in names.items() if token is not None)
    ends = ", ".join(repr(visible(tokenizer, [stop])) for stop in stops)
    yield f"tokenizer: {type(tokenizer).__name__} with {len(tokenizer):,} tokens ({special}); answers end at {ends}"


def template_text(config: PromptText, found: Tokenizer) -> str:
    """How a prompt becomes text."""
    if config.apply_chat_template:
        own = config.tokenizer_chat_template is None
        return f"template: {'the chat template of the tokenizer' if own else '--tokenizer_chat_template'}"
    rest = "; the tokenizer has a chat template, which is not used" if found.chat_template else ""
    given = config.input_template
    return f"template: {'none, rows are taken as they are' if given is None else f'--input_template {given!r}'}{rest}"


def rows_text(name: str, report: DataReport, *, width: int = 1) -> Iterator[str]:
    """How many rows are used and dropped, their lengths, and the first examples as the model sees them.

    ``width``: examples of one row (2 for pairs).
    """
    title, at = report.title[0].lower() + report.title[1:], report.lengths
    yield f"{name}: {title}, {report.kept} of {report.picked} are used; dropped: {report.drop_reasons()}"
    yield f"  tokens: shortest {at.min}, median {at.median}, 90% up to {at.p90}, 99% up to {at.p99}, longest {at.max}"
    for fault in report.faults.first[:SHOWN_FAULTS]:
        yield f"  faulty: {fault.reason}"
    for number, example in enumerate(report.examples):
        which = f", {PAIR[number % width]}" if width == len(PAIR) else ""
        yield f"  example {number // width + 1}{which}:"
        yield indented(example)


def indented(text: str) -> str:
    """A text indented under its heading; the middle of a long text is left out."""
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half:,} characters ...\n{text[-half:]}"
    return "\n".join(f"    {line}" for line in text.splitlines())


def score_text(found: Score) -> str:
    """A reward in words, with its parts."""
    if found.outcome is not Outcome.SCORE:
        return str(found.outcome)
    parts = [f"{name} {value:g}" for name, value in found.components.items()]
    return f"{found.value:g}" + (f" ({', '.join(parts)})" if len(parts) > 1 else "")


def samples_text(groups: Sequence[ScoredGroup]) -> Iterator[str]:
    """The first answers of the first groups with their rewards."""
    for group in groups[:SHOWN_GROUPS]:
        rollout, found = group.rollouts[0], group.scores[0]
        text = rollout.response_text if len(rollout.response_text) <= SHOWN else f"{rollout.response_text[:SHOWN]}..."
        tokens = len(rollout.response_tokens)
        yield f"sample: {text!r} ({tokens} tokens, {rollout.finish_reason}), reward {score_text(found)}"


async def sample(config: RLConfig, material: Material, groups: int, progress: Progress) -> list[ScoredGroup]:
    """The groups of the first prompts that the run would take, scored as in its first rollout.

    Any number of reward errors is allowed; they are among the scores. Raises UserError.
    """
    with progress.phase("loading the model to sample from", expected_seconds=10):
        engine = _engine(config)
        reward = combined(config, material.rewards, [local_reward(config, i) for i in range(len(config.reward_models))])
    acting = material.environment(config, config.temperature)
    penalties = LengthPenalties.of(config) if config.uses_length_penalties else None
    feed = RolloutFeed(acting, engine.generate, reward, config.seed, 1.0, penalties, GroupFilter.of(config))
    try:
        with progress.phase("sampling"):
            prompts = PromptLoader(material.prompts, seed=config.seed, episodes=1).take(groups)
            return await feed.run(prompts, config.n_samples_per_prompt, "step1")
    finally:
        with way_out("shutting the engine down"):
            await engine.shutdown()


def _engine(config: RLConfig) -> RolloutEngine:
    try:
        return create_engine(EngineName.TRANSFORMERS, engine_settings(config, config, config.context_length))
    except ConfigError as error:  # its advice is another engine, but sampling has only this one
        reason = str(error).partition(":")[0]
        raise ConfigError(f"--sample_groups samples with Transformers, but {reason}: leave it out.") from None


def local_reward(config: RLConfig, number: int) -> LocalModelReward:
    """One of ``--reward_pretrain``, loaded into this process, under its name in the run."""
    model = RewardModel(config.reward_models[number], config)

    async def scores(sequences: Sequence[Sequence[int]]) -> list[float]:
        return model.scores(sequences, config.max_tokens_per_gpu)

    return LocalModelReward(scores, model.standardize, reward_names(config, function_given=False)[number])


Say = Callable[[str], None]


def look_at_offline(parsed: Parsed[Method], command: str, say: Say) -> None:
    """Do everything that ``togi <command>`` does before it loads a model, and report it. Raises UserError."""
    config, sizes = parsed.config, size_of(parsed.config)
    _say_all(settings_text(parsed), say)
    with Progress() as progress:
        data, plan, _ = offline.opening(config, command, World.solo(), progress, say)
    asked, model = f"--max_len {config.max_len}", sizes(config.pretrain, config.is_scalar)
    _say_all(model_text(config.pretrain, model, asked, data.tokenizer, data.stop_token_ids), say)
    if config.learns_every_token:
        say("template: none, every token is learnt (--pretrain_mode)")
    elif config.prompt_text is not None:
        say(template_text(config.prompt_text, data.tokenizer))
    for name, report in data.reports.items():
        _say_all(rows_text(name, report, width=config.width), say)
    say(f"disk: {check_room(config, offline_writing(config, plan.steps, sizes))}")
    # For RL, `setting_signs` makes these checks.
    if config.learning_rate == 0:
        text = "--learning_rate 0 changes no weight: give a rate above 0, unless that is meant."
        conclude([signs.warning(text)], say)
    if still := standing_still(config, config.learning_rate, plan.steps):
        conclude([signs.stops(still)], say)


def look_at_rl(parsed: Parsed[RLConfig], sample_groups: int, say: Say) -> None:
    """Do everything that ``togi rl`` does before its processes start, and report it.

    ``sample_groups``: how many groups the policy also answers as a sample; 0 for none. Raises UserError.
    """
    _say_all(settings_text(parsed), say)
    with Progress() as progress:
        asyncio.run(_look_at_rl(parsed.config, sample_groups, progress, say))


async def _look_at_rl(config: RLConfig, sample_groups: int, progress: Progress, say: Say) -> None:
    async with rl_setup.opening(config, None, progress, say) as (material, plan, _):
        tokenizer = tokenizer_of(config)
        _describe(config, material, plan, tokenizer, say)
        # Signs from settings and prompts cost nothing; sampled answers need the model, so they are optional.
        found = [*signs.setting_signs(config, plan), *signs.prompt_signs(config, material, tokenizer)]
        if sample_groups > 0:
            groups = await sample(config, material, sample_groups, progress)
            _say_all(samples_text(groups), say)
            stops = tuple(sorted({*material.stop_token_ids, *end_token_ids(local_folder(config.pretrain))}))
            found += signs.reward_signs(config, groups)
            found += signs.answer_signs(config, groups, tokenizer, stops)
            if not config.acts:  # an episode is tokenised turn by turn
                found += signs.template_signs(config, groups, tokenizer, stops)
    conclude(found, say)


def _describe(config: RLConfig, material: Material, plan: StepPlan, tokenizer: Tokenizer, say: Say) -> None:
    """Report model, lengths, tokenizer, template, rows, reward, placement and disk space."""
    sizes = size_of(config)
    model, stops = sizes(config.pretrain, False), material.stop_token_ids
    _say_all(model_text(config.pretrain, model, asked_context(config), tokenizer, stops), say)
    say(template_text(config, tokenizer))
    for name, report in material.reports.items():
        _say_all(rows_text(name, report), say)
    # The reward was called once by the opening; reward models are too large to load here.
    for name, scores in material.trial.items():
        answer = rewards.example(material.prompts[0]).response_text
        say(f"reward: {name} says {score_text(scores[0])} of the answer {answer!r} to the first prompt")
    for path in config.scoring_models:
        say(f"reward: the model {path} is loaded by the run, not here")
    # Without GPUs and without a Ray cluster the groups are placed on processes.
    unit = "GPUs" if this_machine().gpus > 0 or joins_cluster() else "worker processes"
    unit = IN_PROCESS if config.workers is WorkersKind.LOCAL else unit
    say(f"placement: {arithmetic(plan_groups(config), unit)}")
    say(f"disk: {check_room(config, rl_writing(config, plan.rollouts, sizes))}")


def conclude(found: Sequence[signs.Sign], say: Say) -> None:
    """Say every sign, and raise UserError if one of them stops learning."""
    for sign in found:
        say(f"{sign.verdict}: {sign.sentence}")
    for sign in found:
        if sign.verdict is signs.Verdict.STOPS:
            raise UserError(f"The run would not learn. {sign.sentence}")


def _say_all(lines: Iterable[str], say: Say) -> None:
    for line in lines:
        say(line)
