"""``togi check COMMAND flags``: everything that a run does before its first step, without the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from togi.config.check import SAMPLE_GROUPS, RLCheckConfig, without_check
from togi.config.parse import Parsed, nearest, parse
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


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises UserError for the user's mistakes."""
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
        ready = rl_door(parsed, reward_given=False, announce=_say)
        from togi.run.check import look_at_rl

        look_at_rl(ready, groups, _say)
    else:
        _check_offline(parse(METHODS[command], flags, f"check {command}"), command)
    _say("ok: the run can start")


def _check_offline(parsed: Parsed[Method], command: str) -> None:
    config, launched = parsed.config, "WORLD_SIZE" in os.environ
    ready = offline_door(parsed, announce=_say, launched=launched)
    if not launched and (team := config.ring_attn_size * config.ds_tensor_parallel_size) > 1:
        _say(f"processes: the run needs a multiple of {team}, started with torchrun --nproc_per_node {team}")
    from togi.run.check import look_at_offline

    look_at_offline(ready, command, _say)


def _say(line: str) -> None:
    print(line, flush=True)
