"""The command of every method of training on fixed data: parse, check, train, say where everything is."""

from __future__ import annotations

from collections.abc import Sequence

from togi.config.parse import parse
from togi.methods import METHODS
from togi.recipes.offline_start import start_offline


def main(argv: Sequence[str]) -> None:
    """Run the command that the first word names. Raises UserError for the user's mistakes."""
    command, *flags = argv
    parsed = parse(METHODS[command], flags, command)
    result = start_offline(parsed, command, argv=flags, announce=lambda line: print(line, flush=True))
    if not result.is_first:
        return
    for evaluation in result.evaluations:
        when = "before training" if evaluation.step == 0 else f"after {evaluation.step} steps"
        shown = {"loss": evaluation.loss, **evaluation.metrics}
        print(f"held-out, {when}: " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    print(f"run folder:  {result.run_dir}")
    print(f"report page: {result.report}")
    print(f"model:       {result.model}")
