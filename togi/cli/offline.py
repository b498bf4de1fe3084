"""What ``togi sft | rm | dpo | kto | prm | kd`` have in common: parse, check, train, say where everything is."""

from __future__ import annotations

from collections.abc import Sequence

from togi.config.offline import OfflineConfig
from togi.config.parse import parse
from togi.recipes.offline_start import start_offline


def train(config_class: type[OfflineConfig], command: str, argv: Sequence[str]) -> None:
    """Run a command. Raises UserError for the user's mistakes."""
    parsed = parse(config_class, argv, command)
    result = start_offline(parsed, command, argv=argv, announce=lambda line: print(line, flush=True))
    if not result.is_first:
        return
    for evaluation in result.evaluations:
        when = "before training" if evaluation.step == 0 else f"after {evaluation.step} steps"
        shown = {"loss": evaluation.loss, **evaluation.metrics}
        print(f"held-out, {when}: " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    print(f"run folder:  {result.run_dir}")
    print(f"report page: {result.report}")
    print(f"model:       {result.model}")
