"""``togi rl``, also ``python -m togi.cli.train_ppo_ray``: parse, check, train, say where everything is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from togi.cli.main import run as run_module
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.recipes.start import start_rl

COMMAND = "rl"


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises UserError for the user's mistakes."""
    result = start_rl(parse(RLConfig, argv, COMMAND), argv=argv, announce=lambda line: print(line, flush=True))
    for evaluation in result.evaluations:
        when = "before training" if evaluation.step == 0 else f"after {evaluation.step} rollouts"
        print(f"held-out reward {when}: {evaluation.reward:.3f} +- {evaluation.stderr:.3f} (standard error)")
    print(f"run folder:  {result.run_dir}")
    print(f"report page: {result.report}")
    print(f"model:       {result.model}")
    program = sys.argv[0] if Path(sys.argv[0]).name == "togi" else "togi"
    print(f"talk to it:  {program} chat --pretrain {result.model}")


if __name__ == "__main__":
    sys.exit(run_module(__spec__.name if __spec__ else __name__, sys.argv[1:]))
