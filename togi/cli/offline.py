"""The command of every method on fixed data: parse, check, train, print where everything is."""

from __future__ import annotations

from collections.abc import Sequence

from togi.config.parse import parse
from togi.methods import METHODS
from togi.run.start import offline_door


def main(argv: Sequence[str]) -> None:
    """Run the command named by the first word. Raises UserError for the user's mistakes."""
    command, *flags = argv
    ready = offline_door(parse(METHODS[command], flags, command), announce=_say)
    from togi.run.offline import launched, run

    with launched(ready.config.local_rank) as world:
        result = run(world, ready, command, argv=flags, announce=_say)
    if not result.is_first:
        return
    for evaluation in result.evaluations:
        when = "before training" if evaluation.step == 0 else f"after {evaluation.step} steps"
        shown = {"loss": evaluation.loss, **evaluation.metrics}
        _say(f"held-out, {when}: " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    _say(f"run folder:  {result.run_dir}\nreport page: {result.report}\nmodel:       {result.model}")


def _say(line: str) -> None:
    print(line, flush=True)
