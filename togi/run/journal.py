"""The output of a run: its folder, metrics, trackers, progress and report, the same for RL and fixed data.

Only the first rank writes; other ranks have a ``Journal`` that keeps time and writes nothing.

The held-out rows in the report: those with the worst and the best values of an evaluation.
"""

import fcntl
import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from togi.config.parse import Parsed
from togi.config.shared import OutputSettings
from togi.data.chat import Tokenizer, visible
from togi.data.records import Examples
from togi.data.report import DataReport
from togi.errors import ConfigError, RunError, WorkerDied
from togi.learn.checkpoint import PREFIX, Checkpoint, left_behind
from togi.model.checkpoint import RUN_FILE
from togi.obs.metrics import StepRecord
from togi.obs.progress import Progress, Watchdog
from togi.obs.report import cause, end_run, write_report
from togi.obs.run_dir import (
    SHOWN_ROWS,
    HeldOutRow,
    Resolved,
    RunDirectory,
    State,
    default_run_dir,
    redact_argv,
    without_secrets,
    write_held_out,
)
from togi.obs.sinks import Recorder, open_trackers
from togi.obs.way_out import tolerated, way_out, write_atomically
from togi.run.preflight import absolute, trackers
from togi.sample import Sample


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The metrics on held-out rows after ``step`` steps (of RL: rollouts), by their names in the logs."""

    step: int
    metrics: Mapping[str, float]


Badness = Callable[[Sequence[tuple[Sample, float]]], float]


@dataclass(frozen=True, slots=True)
class Judged:
    """The values of one row, one per sequence, and its badness: the higher, the worse."""

    row: str
    values: tuple[float, ...]
    badness: float


def judge(samples: Sequence[Sample], values: Sequence[float], badness: Badness) -> list[Judged]:
    """Group samples into rows. ``values``: from ``Objective.judge``, one per sample.

    ``badness``: the method's (``Method.badness``), for the sequences of one row.
    """
    rows: dict[str, list[tuple[Sample, float]]] = {}
    for sample, value in zip(samples, values, strict=True):
        rows.setdefault(sample.group_id, []).append((sample, value))
    return [Judged(row, tuple(value for _, value in pairs), badness(pairs)) for row, pairs in rows.items()]


def ends(judged: Sequence[Judged]) -> list[Judged]:
    """The ``SHOWN_ROWS`` worst and best rows, worst first; all if they are few.

    Merging the ends of parts and taking the ends again gives the ends of the whole.
    """
    ranked = sorted(judged, key=lambda row: (-row.badness, row.row))
    return ranked if len(ranked) <= 2 * SHOWN_ROWS else ranked[:SHOWN_ROWS] + ranked[-SHOWN_ROWS:]


def worst_and_best(number: str, judged: Sequence[Judged], examples: Examples, tokenizer: Tokenizer) -> list[HeldOutRow]:
    """At most ``SHOWN_ROWS`` rows from each end, worst first, no row twice. ``number``: the name of their values in the report."""
    ranked = ends(judged)
    half = (len(ranked) + 1) // 2
    marked = [("worst", row) for row in ranked[:half]] + [("best", row) for row in ranked[half:]]
    # Rows are known by group id; the texts are looked up in the data again.
    places = {examples[index][0].group_id: index for index in range(len(examples))}
    return [
        HeldOutRow(place, number, tuple(as_seen(each, tokenizer) for each in examples[places[row.row]]), row.values)
        for place, row in marked
    ]


def as_seen(sample: Sample, tokenizer: Tokenizer) -> str:
    """The text of a sample with special tokens visible and trained parts between ⟦ and ⟧."""
    # Split where the loss mask changes.
    edges = np.flatnonzero(np.diff(sample.loss_mask.astype(np.int8))) + 1
    parts = []
    for ids, learned in zip(np.split(sample.tokens, edges), np.split(sample.loss_mask, edges), strict=True):
        text = visible(tokenizer, ids.tolist())
        parts.append(f"⟦{text}⟧" if learned[0] else text)
    return "".join(parts)


STALL_SECONDS = 1800.0
REPORT_SECONDS = 60.0
ENGINE_FILE = "engine.json"
Config = TypeVar("Config", bound=OutputSettings)


class Journal:
    """The silent journal of all ranks but the first."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.root, self.run_id = Path(), ""

    def announce(self, line: str) -> None:
        """Print one line for the user."""

    def beat(self) -> None:
        """Tell the watchdog that the run makes progress."""

    def write(self, step: int, values: Mapping[str, float], note: str = "") -> None:
        """Write the metrics of a step, and from time to time the report. Step 0 is before training."""

    def write_rows(self, step: int, rows: Sequence[HeldOutRow]) -> None:
        """Write the worst and best held-out rows of the evaluation after ``step``."""

    def sign(self, model: Path) -> None:
        """Write into a final model's folder which run made it, for ``togi export``."""


class RunJournal(Journal):
    """The journal that writes into a run folder. Made by ``open_journal``."""

    def __init__(
        self,
        directory: RunDirectory,
        recorder: Recorder,
        watchdog: Watchdog,
        progress: Progress,
        announce: Callable[[str], None],
    ) -> None:
        super().__init__(progress)
        self.directory, self.run_id = directory, directory.read_info().run_id
        self.root, self.rollouts = directory.root, directory.rollouts
        self._recorder, self._watchdog, self._announce = recorder, watchdog, announce
        self._report_due = 0.0
        self.advice = ""
        """How to go on after a failure, once there was one."""

    def announce(self, line: str) -> None:
        self._announce(line)

    def beat(self) -> None:
        self._watchdog.beat()

    def write(self, step: int, values: Mapping[str, float], note: str = "") -> None:
        self._recorder.write(StepRecord(step, values, self.progress.take_seconds()))
        if step > 0:
            self.progress.step(step, note)
        # The report reads all metrics, so it is written at most once a minute.
        if time.monotonic() > self._report_due:
            with tolerated("writing the report page"):
                write_report(self.root)
            self._report_due = time.monotonic() + REPORT_SECONDS

    def write_rows(self, step: int, rows: Sequence[HeldOutRow]) -> None:
        write_held_out(self.root, step, rows)

    def record_engine(self, facts: Mapping[str, str | bool]) -> None:
        """Write what computes in the generation engines, which depends on the machine, into the folder."""
        if facts:
            (self.root / ENGINE_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")

    def sign(self, model: Path) -> None:
        (model / RUN_FILE).write_text(json.dumps({"run_id": self.run_id}) + "\n", encoding="utf-8")


@contextmanager
def claimed(flag: str, folder: str) -> Iterator[None]:
    """Hold a folder that a run writes into until the block or the process ends. Raises ConfigError if another run holds it.

    The lock is on the folder itself: no file is left behind, and the system gives it back however a process ends.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"--{flag} {folder} cannot be written ({error.strerror}): give a folder that can.") from None
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"Another run is writing into --{flag} {folder}: wait for its end, or give another folder."
                ) from None
        yield
    finally:
        os.close(handle)


@contextmanager
def leaving_in_order() -> Iterator[None]:
    """Let SIGTERM end the block as an exception, with its clean-up; by default it ends the process on the spot."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def leave(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if ours:
        signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def open_journal(
    parsed: Parsed[Config],
    command: str,
    argv: Sequence[str],
    progress: Progress,
    announce: Callable[[str], None],
    reports: Mapping[str, DataReport],
    found: Checkpoint | None,
    stall_seconds: float = STALL_SECONDS,
) -> Iterator[RunJournal]:
    """Make the folder of a run, or truncate it to the checkpoint ``found`` and resume in it. Records how the run ended.

    ``reports``: of the data sets, by the name of the folder that each goes to. ``stall_seconds``: after these without a ``beat``
    the stacks of this process are written.
    """
    config, files = parsed.config, ExitStack()
    root = Path(config.run_dir) if config.run_dir is not None else default_run_dir(command)
    settings = config.model_dump(mode="json")
    # Paths are absolute, so that the folder of the run can be read from any other.
    resolved = {name: Resolved(absolute(name, value), parsed.sources[name]) for name, value in settings.items()}
    opened = RunDirectory.resume if config.load_checkpoint else RunDirectory.create
    # Without a checkpoint nothing of an earlier attempt counts, not even its evaluation before training.
    last_step = found.step if found is not None else -1
    with ExitStack() as held:
        held.enter_context(leaving_in_order())
        written = {"save_path": config.save_path}
        if config.keeps_checkpoints:
            written["ckpt_path"] = config.ckpt_path
        if os.path.realpath(root) not in map(os.path.realpath, written.values()):
            written["run_dir"] = str(root)
        for flag, folder in written.items():
            held.enter_context(claimed(flag, folder))
        # The folder with its settings.
        directory = opened(root, command, argv, resolved)
        # Sinks and watchdog; a failure on the way closes those that are open.
        journal: RunJournal | None = None
        try:
            for name, report in reports.items():
                report.write(root / "data" / name)
            if config.load_checkpoint:
                directory.truncate_after(last_step)
            sinks = open_trackers(trackers(config), directory.read_info().run_id, root, settings, last_step + 1)
            recorder = Recorder(directory.metrics_path, sinks)
            files.callback(recorder.close)
            watchdog = files.enter_context(Watchdog(stall_seconds, directory.stacks_path))
            journal = RunJournal(directory, recorder, watchdog, progress, announce)
            yield journal
            files.close()
        except BaseException as error:
            with way_out("writing the page about the failure"):
                advice = write_failure(directory, config, argv, error, progress.place())
                if isinstance(error, WorkerDied) and journal is not None:
                    journal.advice = advice  # for the case that the run does not start again by itself
                else:
                    progress.say(advice)
            end_run(directory, State.FAILED, cause(error), files.close)
            raise
        end_run(directory, State.FINISHED)


def write_failure(
    directory: RunDirectory, config: OutputSettings, argv: Sequence[str], error: BaseException, place: str
) -> str:
    """Write ``failure.md``: what ended a run, when and where, and how to go on. Returns the last in one line. No secrets."""
    why, step = cause(error), newest_step(config)
    lines = error.lines if isinstance(error, RunError) else ()
    if step is None:
        go_on = "No checkpoint was written, so the run can only start again"
        go_on += ": set --save_steps, so that it could go on." if config.save_steps <= 0 else ", in another --run_dir."
    else:
        go_on = f"The run goes on from its checkpoint of step {step} by: {resume_command(directory, argv)}"
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    parts = [f"# Run {directory.root.name} ended early", why, f"When: {now}, {place}.", go_on]
    if lines:
        parts.insert(3, "```\n" + "\n".join(lines) + "\n```")
    with tolerated("writing the page about the end"):
        write_atomically(directory.failure_path, without_secrets("\n\n".join(parts)) + "\n")
        go_on += f"\nAll that is known: {directory.failure_path}"
    return without_secrets(go_on)


def newest_step(config: OutputSettings) -> int | None:
    """The step of the newest checkpoint that this run could go on from. None if there is none, or none with that state."""
    if config.disable_ds_ckpt or not (config.save_steps > 0 or config.load_checkpoint):
        return None
    names = [name for name in left_behind(Path(config.ckpt_path)) if name.startswith(PREFIX)]
    return int(names[-1].removeprefix(PREFIX)) if names else None


def resume_command(directory: RunDirectory, argv: Sequence[str]) -> str:
    """The command of a run, with what makes it go on in its folder."""
    root = directory.root.resolve()
    if not argv:
        return f"the same call with load_checkpoint=True and run_dir={str(root)!r}"
    words, given = redact_argv(argv), {word.partition("=")[0] for word in argv}
    more = ([] if "--load_checkpoint" in given else ["--load_checkpoint"]) + (
        [] if "--run_dir" in given else ["--run_dir", str(root)]
    )
    return f"cd {shlex.quote(str(Path.cwd()))} && togi {directory.read_info().command} {shlex.join([*words, *more])}"
