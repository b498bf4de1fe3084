"""The commands without an established module name: training on fixed data, check, iterate, export, report.

Each takes the words after ``togi`` and raises UserError for the user's mistakes. What computes is imported once the settings are
checked.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from togi.cli.main import say
from togi.config.fields import Settings, flag
from togi.config.iterate import IterateConfig
from togi.config.parse import Parsed, nearest, parse
from togi.config.tools import SAMPLE_GROUPS, ExportConfig, RLCheckConfig, without_check
from togi.errors import ConfigError
from togi.methods import METHODS
from togi.methods.method import Method
from togi.run.start import offline_door, rl_door

CHECKED = ("rl", *METHODS)
USAGE = f"""usage: togi check COMMAND [flags of the command]

Everything that a run does before its first step: settings, rows with rendered examples, tokenizer, sizes, the reward called once,
placement, disk. Loads no weights, starts no Ray, makes no run folder; tokenised rows are kept for the run. Exit status 0, or 2
and one sentence. With rl, --sample_groups N samples from the model and says what would stop learning.

COMMAND is one of {", ".join(CHECKED)}; togi check COMMAND --help lists the flags."""


class ReportConfig(Settings):
    """Write the report page of a run folder again."""

    run_dir: str = flag("", "The run folder. Required.")


def offline(argv: Sequence[str]) -> None:
    """Train a method on fixed data, the one that the first word names, and print where everything is."""
    command, *flags = argv
    ready = offline_door(parse(METHODS[command], flags, command), announce=say)
    from togi.run.offline import launched, run

    with launched(ready.config.local_rank) as world:
        result = run(world, ready, command, argv=flags, announce=say)
    if not result.is_first:
        return
    for evaluation in result.evaluations:
        when = "before training" if evaluation.step == 0 else f"after {evaluation.step} steps"
        shown = {"loss": evaluation.loss, **evaluation.metrics}
        say(f"held-out, {when}: " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    say(f"run folder:  {result.run_dir}\nreport page: {result.report}\nmodel:       {result.model}")


def iterate(argv: Sequence[str]) -> None:
    """``togi iterate``: rejection sampling, iterative DPO, conditional SFT, in rounds."""
    parsed = parse(IterateConfig, argv, "iterate")
    from togi.run.iterate import start_iterate

    result = start_iterate(parsed, announce=say)
    say(f"summary: {result.summary}\nmodel:   {result.model}")


def export(argv: Sequence[str]) -> None:
    """``togi export``: a run's final model, or one of its checkpoints, as a plain Hugging Face folder with a model card."""
    config = parse(ExportConfig, argv, "export").config
    for name, value in (("run_dir", config.run_dir), ("output_path", config.output_path)):
        if not value:
            raise ConfigError(f"--{name} is required: {ExportConfig.model_fields[name].description}")
    from togi.run.export import export

    for line in export(config):
        say(line)
    say(f"exported model: {Path(config.output_path)}")


def report(argv: Sequence[str]) -> None:
    """``togi report``: write report.html of a run folder again, from the content of the folder."""
    config = parse(ReportConfig, argv, "report").config
    if not config.run_dir:
        raise ConfigError("--run_dir is required: the folder of a run, such as runs/rl-20260101-120000.")
    from togi.obs.report import write_report

    say(str(write_report(Path(config.run_dir))))


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
    if command != "rl" and f"--{SAMPLE_GROUPS}" in flags:
        raise ConfigError(f"--{SAMPLE_GROUPS} samples answers to be rewarded: it is for togi check rl.")
    if command == "rl":
        parsed, groups = without_check(parse(RLCheckConfig, flags, "check rl"))
        ready = rl_door(parsed, reward_given=False, announce=say)
        from togi.run.check import look_at_rl

        look_at_rl(ready, groups, say)
    else:
        _check_offline(parse(METHODS[command], flags, f"check {command}"), command)
    say("ok: the run can start")


def _check_offline(parsed: Parsed[Method], command: str) -> None:
    config, launched = parsed.config, "WORLD_SIZE" in os.environ
    ready = offline_door(parsed, announce=say, launched=launched)
    if not launched and (team := config.ring_attn_size * config.ds_tensor_parallel_size) > 1:
        say(f"processes: the run needs a multiple of {team}, started with torchrun --nproc_per_node {team}")
    from togi.run.check import look_at_offline

    look_at_offline(ready, command, say)
