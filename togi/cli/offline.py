"""What ``togi sft | rm | dpo | kto | prm | kd`` have in common: parse, check, train, say where everything is."""

from __future__ import annotations

from collections.abc import Sequence

from togi.config.offline import OfflineConfig
from togi.config.parse import parse
from togi.run.start import offline_door


def train(config_class: type[OfflineConfig], command: str, argv: Sequence[str]) -> None:
    """Run a command. Raises UserError for the user's mistakes."""
    ready = offline_door(parse(config_class, argv, command), announce=_say)
    from togi.run.offline import launched, run

    with launched(ready.config.local_rank) as world:
        result = run(world, ready, command, argv=argv, announce=_say)
    if not result.is_first:
        return
    for evaluation in result.evaluations:
        when = "before training" if evaluation.step == 0 else f"after {evaluation.step} steps"
        shown = {"loss": evaluation.loss, **evaluation.metrics}
        _say(f"held-out, {when}: " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    _say(f"run folder:  {result.run_dir}\nreport page: {result.report}\nmodel:       {result.model}")


def _say(line: str) -> None:
    print(line, flush=True)
