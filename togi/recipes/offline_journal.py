"""What a run tells the world: the run folder, metrics, progress, the report. Only the first rank speaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from togi.config.parse import Parsed
from togi.data.report import DataReport
from togi.methods.method import Method
from togi.obs.metrics import StepRecord
from togi.obs.progress import Progress, Watchdog
from togi.obs.report import cause, end_run, write_report
from togi.obs.run_dir import HeldOutRow, Resolved, RunDirectory, State, default_run_dir, write_held_out
from togi.obs.sinks import Recorder, open_trackers
from togi.obs.way_out import tolerated
from togi.recipes.preflight import trackers

STALL_SECONDS = 1800.0
REPORT_SECONDS = 60.0


class Journal:
    """The silent one, of every rank but the first."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.root = Path()

    def announce(self, line: str) -> None:
        """One line for the user."""

    def open(self, reports: Mapping[str, DataReport], step: int, steps: int) -> None:
        """Make the run folder, or wind it back to ``step`` and go on with it; ``steps`` are planned."""
        self.progress.start_steps(steps, done=step)

    def beat(self) -> None:
        """Something is still happening."""

    def write(self, step: int, values: Mapping[str, float], note: str) -> None:
        """The metrics of a step. Step 0 is before training."""

    def write_rows(self, step: int, rows: Sequence[HeldOutRow]) -> None:
        """Held-out rows worth a look, of the evaluation after ``step``."""

    def close(self, state: State, message: str = "") -> None:
        """The run is over; ``open`` must have been called."""


class RunJournal(Journal):
    """The one that writes."""

    def __init__(
        self,
        parsed: Parsed[Method],
        command: str,
        argv: Sequence[str],
        announce: Callable[[str], None],
        progress: Progress,
    ) -> None:
        super().__init__(progress)
        self._parsed, self._command, self._argv, self._announce = parsed, command, argv, announce
        config = parsed.config
        self.root = Path(config.run_dir) if config.run_dir is not None else default_run_dir(command)
        self._directory = RunDirectory(self.root)
        self._open = ExitStack()
        self._report_due = 0.0

    def announce(self, line: str) -> None:
        self._announce(line)

    def open(self, reports: Mapping[str, DataReport], step: int, steps: int) -> None:
        config, sources = self._parsed.config, self._parsed.sources
        settings = config.model_dump(mode="json")
        values = {name: Resolved(value, sources[name]) for name, value in settings.items()}
        opened = RunDirectory.resume if config.load_checkpoint else RunDirectory.create
        self._directory = opened(self.root, self._command, self._argv, values)
        try:
            self._fill(reports, step, settings)
        except BaseException as error:
            self.close(State.FAILED, cause(error))
            raise
        super().open(reports, step, steps)

    def _fill(self, reports: Mapping[str, DataReport], step: int, settings: Mapping[str, Any]) -> None:
        """Write what is known before the models are loaded, and open what is written to from then on."""
        config = self._parsed.config
        for name, report in reports.items():
            report.write(self.root / "data" / name)
        if config.load_checkpoint:
            self._directory.truncate_after(step)
        run_id = self._directory.read_info().run_id
        sinks = open_trackers(trackers(config), run_id, self.root, settings, step)
        self._recorder = Recorder(self._directory.metrics_path, sinks)
        self._open.callback(self._recorder.close)
        self._watchdog = self._open.enter_context(Watchdog(STALL_SECONDS, self._directory.stacks_path))

    def beat(self) -> None:
        self._watchdog.beat()

    def write(self, step: int, values: Mapping[str, float], note: str) -> None:
        self._recorder.write(StepRecord(step, values, self.progress.take_seconds()))
        if step > 0:
            self.progress.step(step, note)
        if time.monotonic() > self._report_due:
            with tolerated("writing the report page"):
                write_report(self.root)
            self._report_due = time.monotonic() + REPORT_SECONDS

    def write_rows(self, step: int, rows: Sequence[HeldOutRow]) -> None:
        write_held_out(self.root, step, rows)

    def close(self, state: State, message: str = "") -> None:
        end_run(self._directory, state, message, self._open.close)
