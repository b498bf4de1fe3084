"""The part of ``togi check`` that needs tokenizer and rows: it runs the opening of the run and reports what it found."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from togi.config.choices import WorkersKind
from togi.config.model_facts import position_limit
from togi.config.parse import Parsed
from togi.config.rl import RLConfig
from togi.data.chat import Tokenizer, load_tokenizer
from togi.errors import UserError
from togi.methods.method import Method
from togi.obs.progress import Progress
from togi.parallel.process import World
from togi.plan.machine import joins_cluster, this_machine
from togi.plan.placement import IN_PROCESS, arithmetic, plan_groups
from togi.recipes.disk import check_room, offline_writing, rl_writing, size_of
from togi.recipes.preflight import model_settings
from togi.run import check_text, offline, rl_setup
from togi.run.rl_setup import Material, Opening
from togi.run.signs import Sign, Verdict, prompt_signs, setting_signs

Say = Callable[[str], None]


def look_at_offline(parsed: Parsed[Method], command: str, say: Say) -> None:
    """Do everything that ``togi <command>`` does before it loads a model, and report it. Raises UserError."""
    config, sizes = parsed.config, size_of(parsed.config)
    _say_all(check_text.settings(parsed), say)
    with Progress() as progress:
        opened = offline.opening(config, command, World.solo(), progress, say)
    # Facts of the run: model, lengths, tokenizer, template, rows, disk space.
    say(check_text.model("pretrain", config.pretrain, sizes(config.pretrain, config.is_scalar)))
    say(_lengths(f"--max_len {config.max_len}", config.pretrain))
    say(check_text.tokenizer(opened.data.tokenizer, opened.data.stop_token_ids))
    if config.learns_every_token:
        say("template: none, every token is learnt (--pretrain_mode)")
    elif config.prompt_text is not None:
        say(check_text.template(config.prompt_text, opened.data.tokenizer))
    for name, report in opened.data.reports.items():
        _say_all(check_text.rows(name, report, width=config.width), say)
    say(f"disk: {check_room(config, offline_writing(config, opened.plan.steps, sizes))}")
    # For RL, `setting_signs` makes this check.
    if config.learning_rate == 0:
        conclude(
            [Sign(Verdict.WARNING, "--learning_rate 0 changes no weight: give a rate above 0, unless that is meant.")],
            say,
        )


def look_at_rl(parsed: Parsed[RLConfig], sample_groups: int, say: Say) -> None:
    """Do everything that ``togi rl`` does before its processes start, and report it.

    ``sample_groups``: how many groups the policy also answers as a sample; 0 for none. Raises UserError.
    """
    _say_all(check_text.settings(parsed), say)
    with Progress() as progress:
        asyncio.run(_look_at_rl(parsed.config, sample_groups, progress, say))


async def _look_at_rl(config: RLConfig, sample_groups: int, progress: Progress, say: Say) -> None:
    async with rl_setup.opening(config, None, progress, say) as opened:
        tokenizer = load_tokenizer(
            config.pretrain, chat_template=config.tokenizer_chat_template, trust_remote_code=config.trust_remote_code
        )
        _describe(config, opened, tokenizer, say)
        # Signs from settings and prompts cost nothing; sampled answers need the model, so they are optional.
        signs = [*setting_signs(config, opened.plan), *prompt_signs(config, opened.material, tokenizer)]
        if sample_groups > 0:
            signs += await _sampled(config, opened.material, tokenizer, sample_groups, progress, say)
    conclude(signs, say)


def _describe(config: RLConfig, opened: Opening, tokenizer: Tokenizer, say: Say) -> None:
    """Report model, lengths, tokenizer, template, rows, reward, placement and disk space."""
    material, sizes = opened.material, size_of(config)
    say(check_text.model("pretrain", config.pretrain, sizes(config.pretrain, False)))
    asked = f"--prompt_max_len {config.prompt_max_len} + --generate_max_len {config.generate_max_len}"
    say(_lengths(asked if config.max_len is None else f"--max_len {config.max_len}", config.pretrain))
    say(check_text.tokenizer(tokenizer, material.stop_token_ids))
    say(check_text.template(config, tokenizer))
    for name, report in material.reports.items():
        _say_all(check_text.rows(name, report), say)
    # The reward was called once by the opening; reward models are too large to load here.
    if material.trial:
        answer = rl_setup.example(material.prompts[0]).response_text
        _say_all(check_text.reward(material.trial, answer), say)
    for path in config.scoring_models:
        say(f"reward: the model {path} is loaded by the run, not here")
    # Without GPUs and without a Ray cluster the groups are placed on processes.
    unit = "GPUs" if this_machine().gpus > 0 or joins_cluster() else "worker processes"
    unit = IN_PROCESS if config.workers is WorkersKind.LOCAL else unit
    say(f"placement: {arithmetic(plan_groups(config), unit)}")
    say(f"disk: {check_room(config, rl_writing(config, opened.plan.rollouts, sizes))}")


async def _sampled(
    config: RLConfig, material: Material, tokenizer: Tokenizer, groups: int, progress: Progress, say: Say
) -> Sequence[Sign]:
    """Let the policy answer a few groups and return the signs in the answers and rewards."""
    from togi.model.hub import local_folder
    from togi.rollout.stops import end_token_ids
    from togi.run.signs import answer_signs, reward_signs, template_signs
    from togi.run.trial import sample

    found = await sample(config, material, groups, progress)
    _say_all(check_text.samples(found), say)
    stops = tuple(sorted({*material.stop_token_ids, *end_token_ids(local_folder(config.pretrain))}))
    return [
        *reward_signs(config, found),
        *answer_signs(config, found, tokenizer, stops),
        *template_signs(config, found, tokenizer, stops),
    ]


def conclude(signs: Sequence[Sign], say: Say) -> None:
    """Say every sign, and raise UserError if one of them stops learning."""
    for sign in signs:
        say(f"{sign.verdict}: {sign.sentence}")
    stopping = [sign for sign in signs if sign.verdict is Verdict.STOPS]
    if stopping:
        raise UserError(f"The run would not learn. {stopping[0].sentence}")


def _lengths(asked: str, path: str) -> str:
    positions = position_limit(model_settings(path))
    return f"lengths: {asked}" + ("" if positions is None else f", of {positions} positions that the model has")


def _say_all(lines: Iterable[str], say: Say) -> None:
    for line in lines:
        say(line)
