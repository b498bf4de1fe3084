"""``togi report``: write report.html of a run folder again, from the content of the folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from togi.config.fields import Settings, flag
from togi.config.parse import parse
from togi.errors import ConfigError


class ReportConfig(Settings):
    """Write the report page of a run folder again."""

    run_dir: str = flag("", "The run folder. Required.")


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    config = parse(ReportConfig, argv, "report").config
    if not config.run_dir:
        raise ConfigError("--run_dir is required: the folder of a run, such as runs/rl-20260101-120000.")
    from togi.obs.report import write_report

    print(write_report(Path(config.run_dir)))
