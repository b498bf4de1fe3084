"""The commands, each under its name in ``main.COMMANDS``.

Each takes the words after that name and raises UserError for the user's mistakes. What computes is imported once the settings are
checked.
"""

import asyncio
import gc
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from togi.config import tools
from togi.config.fields import Settings, flag
from togi.config.infer import ChatConfig, InferConfig, check_chat
from togi.config.iterate import IterateConfig
from togi.config.parse import nearest, parse
from togi.config.rl import RLConfig
from togi.data.precheck import asked_reward
from togi.errors import ConfigError, UserError
from togi.methods import METHODS
from togi.obs import names
from togi.plan.machine import this_machine
from togi.run.preflight import check_model, check_reward_file, with_local_names
from togi.run.start import offline_door, rl_door, say_ignored, start_infer, usable

CHECKED = ("rl", *METHODS)
USAGE = f"""usage: togi check COMMAND [flags of the command]

Everything that a run does before its first step: settings, rows with rendered examples, tokenizer, sizes, the reward called once,
placement, disk. Loads no weights, starts no Ray, makes no run folder; tokenised rows are kept for the run. Exit status 0, or 2
and one sentence. With rl, --sample_groups N samples from the model and says what would stop learning.

COMMAND is one of {", ".join(CHECKED)}; togi check COMMAND --help lists the flags."""


class ReportConfig(Settings):
    """Write the report page of a run folder again."""

    run_dir: str = flag("", "the folder of a run, such as runs/rl-20260101-120000.")


class DoctorConfig(Settings):
    """What this machine and environment have, which fast paths a run takes here, and what to do about the others.

    Loads no model and starts nothing. Exit status 0, or 2 if no run can start.
    """


def say(line: str) -> None:
    """Print a line at once, as a run may go on for hours."""
    print(line, flush=True)


@contextmanager
def importing() -> Iterator[None]:
    """Imports make a million objects that stay, which the collector would look through again and again: half a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _say_places(run_dir: Path, page: Path, model: Path) -> None:
    """Say where a run has left everything. There is no page if it could not be written."""
    report = f"report page: {page}\n" if page.is_file() else ""
    say(f"run folder:  {run_dir}\n{report}model:       {model}")


def rl(argv: Sequence[str]) -> None:
    """``togi rl``: check, train, print where everything is."""
    ready = rl_door(parse(RLConfig, argv, "rl"), reward_given=False, announce=say)
    with importing():
        from togi.run.rl import run

    result = asyncio.run(run(ready, argv=argv, announce=say))
    for evaluation in result.evaluations:
        when = "before training" if evaluation.step == 0 else f"after {evaluation.step} rollouts"
        reward, error = evaluation.metrics[names.EVAL_REWARD], evaluation.metrics[names.EVAL_REWARD_STDERR]
        say(f"held-out reward {when}: {reward:.3f} +- {error:.3f} (standard error)")
    program = sys.argv[0] if Path(sys.argv[0]).name == "togi" else "togi"
    _say_places(result.run_dir, result.report, result.model)
    say(f"talk to it:  {program} chat --pretrain {result.model}")


def offline(command: str, argv: Sequence[str]) -> None:
    """``togi COMMAND``: train a method on fixed data, print where everything is."""
    ready = offline_door(parse(METHODS[command], argv, command), announce=say)
    with importing():
        from togi.run.offline import launched, run

    with launched(ready.config.local_rank) as world:
        result = run(world, ready, command, argv=argv, announce=say)
    if not result.is_first:
        return
    for evaluation in result.evaluations:
        when = "before training" if evaluation.step == 0 else f"after {evaluation.step} steps"
        shown = (f"{name.removeprefix('eval/')} {value:.4g}" for name, value in evaluation.metrics.items())
        say(f"held-out, {when}: {', '.join(shown)}")
    _say_places(result.run_dir, result.report, result.model)


def infer(argv: Sequence[str]) -> None:
    """``togi infer``: outputs for prompts, scores for outputs, to a file."""
    written = start_infer(parse(InferConfig, argv, "infer"), announce=say)
    say(f"{written.rows} rows: {written.path}")


def iterate(argv: Sequence[str]) -> None:
    """``togi iterate``: rejection sampling, iterative DPO, conditional SFT, in rounds."""
    parsed = parse(IterateConfig, argv, "iterate")
    from togi.run.iterate import start_iterate

    result = start_iterate(parsed, announce=say)
    say(f"summary: {result.summary}\nmodel:   {result.model}")


def export(argv: Sequence[str]) -> None:
    """``togi export``: a run's final model, or one of its checkpoints, as a plain Hugging Face folder with a model card."""
    config = parse(tools.ExportConfig, argv, "export").config
    _require(config, "run_dir", "output_path")
    from togi.run.export import export

    for line in export(config):
        say(line)
    say(f"exported model: {Path(config.output_path)}")


def report(argv: Sequence[str]) -> None:
    """``togi report``: write report.html of a run folder again, from the content of the folder."""
    config = parse(ReportConfig, argv, "report").config
    _require(config, "run_dir")
    from togi.obs.report import write_report

    say(str(write_report(Path(config.run_dir))))


def doctor(argv: Sequence[str]) -> None:
    """``togi doctor``: what is here, and whether a run can start."""
    parse(DoctorConfig, argv, "doctor")
    from togi.run.doctor import Mark, judge, look

    findings = judge(look())
    for finding in findings:
        say(str(finding))
    if stops := [finding.topic for finding in findings if finding.mark is Mark.STOP]:
        raise UserError(f"no run can start here: mend what is marked {Mark.STOP} ({', '.join(stops)}).")
    say("ok: a run can start")


def merge_lora(argv: Sequence[str]) -> None:
    """``togi merge-lora``: merge an adapter into its base model."""
    config = parse(tools.MergeConfig, argv, "merge-lora").config
    _require(config, "lora_path", "output_path")
    from togi.run.export import merge

    merge(config)
    say(f"merged model: {Path(config.output_path)}")


def _require(config: Settings, *names: str) -> None:
    """Raise ConfigError for the first of these settings that is not given."""
    for name in names:
        if not vars(config)[name]:
            raise ConfigError(f"--{name} is required: {type(config).model_fields[name].description}")


def chat(argv: Sequence[str]) -> None:
    """``togi chat``: a streamed conversation in the terminal with its history, until "exit" or the end of input."""
    parsed = parse(ChatConfig, argv, "chat")
    # Everything that can be checked without the model.
    check_chat(parsed)
    config = usable(with_local_names(parsed), this_machine(), say).config
    check_model("pretrain", config.pretrain, adapters=True)
    asked_reward(config.csft_prompt, config.reward_template)
    from togi.run.infer import Chat

    conversation = Chat(config)
    print('Type a message; "clear" starts anew, "exit" ends.')
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line == "exit":
            return
        if line == "clear":
            conversation.clear()
        elif line:
            _answer(conversation.answer(line))


def _answer(pieces: Iterator[str]) -> None:
    """Stream an answer to the terminal. An error ends the turn, not the conversation."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except UserError as error:
        print(f"togi: {error}", end="", file=sys.stderr)
    print()


def serve_rm(argv: Sequence[str]) -> None:
    """``togi serve-rm``: a reward model or function over HTTP, until SIGTERM or SIGINT."""
    parsed = parse(tools.ServeRMConfig, argv, "serve-rm")
    token = _token(parsed.config)
    tools.check_serve_rm(parsed.config, has_token=bool(token))
    ready = with_local_names(parsed)
    if ready.config.reward_pretrain:
        ready = usable(ready, this_machine(), say)
        check_model("reward_pretrain", ready.config.reward_pretrain)
    else:
        say_ignored(ready.config, say)
        check_reward_file(Path(ready.config.reward_func))
    from togi.run.serve_rm import serve

    serve(ready.config, token, say)


def _token(config: tools.ServeRMConfig) -> str:
    """The bearer token, "" if there is none. Raises ConfigError."""
    if config.token_file is None:
        return os.environ.get("TOGI_REWARD_TOKEN", "")
    try:
        token = Path(config.token_file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            f"--token_file {config.token_file} cannot be read ({error.strerror}): give another."
        ) from None
    if not token:
        raise ConfigError(f"--token_file {config.token_file} is empty: write the token into it.")
    return token


def check(argv: Sequence[str]) -> None:
    """``togi check COMMAND flags``: everything that a run does before its first step, without the run."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0)
    command, *flags = argv
    if command not in CHECKED:
        near = nearest(command, CHECKED)
        hint = f"; did you mean {near}?" if near else ": other commands check all of that when they start."
        raise ConfigError(f"togi check looks at {', '.join(CHECKED)}, not at {command}{hint}")
    if os.environ.get("RANK", "0") != "0":  # one process of a launcher is enough
        return
    if command != "rl" and f"--{tools.SAMPLE_GROUPS}" in flags:
        raise ConfigError(f"--{tools.SAMPLE_GROUPS} samples answers to be rewarded: it is for togi check rl.")
    if command == "rl":
        settings, groups = tools.without_check(parse(tools.RLCheckConfig, flags, "check rl"))
        ready_rl = rl_door(settings, reward_given=False, announce=say)
        from togi.run.check import look_at_rl

        look_at_rl(ready_rl, groups, say)
    else:
        parsed, launched = parse(METHODS[command], flags, f"check {command}"), "WORLD_SIZE" in os.environ
        ready = offline_door(parsed, announce=say, launched=launched)
        config = ready.config
        team = math.lcm(config.ring_attn_size * config.ds_tensor_parallel_size, config.fsdp_shard_size or 1)
        if not launched and team > 1:
            say(f"processes: the run needs a multiple of {team}, started with torchrun --nproc_per_node {team}")
        from togi.run.check import look_at_offline

        look_at_offline(ready, command, say)
    say("ok: the run can start")
