"""``togi rl``, also ``python -m togi.cli.train_ppo_ray``: parse, check, train, print where everything is."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from togi.cli.main import main as run_togi
from togi.cli.main import say
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.run.start import rl_door


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises UserError for the user's mistakes."""
    ready = rl_door(parse(RLConfig, argv, "rl"), reward_given=False, announce=say)
    from togi.run.rl import run

    result = asyncio.run(run(ready, argv=argv, announce=say))
    for evaluation in result.evaluations:
        when = "before training" if evaluation.step == 0 else f"after {evaluation.step} rollouts"
        say(f"held-out reward {when}: {evaluation.reward:.3f} +- {evaluation.stderr:.3f} (standard error)")
    program = sys.argv[0] if Path(sys.argv[0]).name == "togi" else "togi"
    say(f"run folder:  {result.run_dir}\nreport page: {result.report}\nmodel:       {result.model}")
    say(f"talk to it:  {program} chat --pretrain {result.model}")


if __name__ == "__main__":
    sys.exit(run_togi(["rl", *sys.argv[1:]]))
