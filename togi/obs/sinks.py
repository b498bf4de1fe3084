"""The sinks of step records: ``metrics.jsonl`` always (the authority), TensorBoard and W&B if configured (best effort).

A tracker runs on its own background thread: if it fails or hangs, one warning is logged, it is dropped, and the run
continues. Only this file imports trackers. A W&B key is passed to it through a pipe: it is never logged, written or put
into the tracked configuration. ``python -m togi.obs.sinks`` is the process that talks to W&B.
"""

import contextlib
import faulthandler
import importlib.util
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from togi.errors import ConfigError
from togi.obs.metrics import StepRecord, all_values
from togi.obs.run_dir import looks_like_wandb_key, redact_value, scrub
from togi.obs.way_out import writing

log = logging.getLogger(__name__)

_FSYNC_SECONDS = 5.0
_QUEUE_RECORDS = 1000
_READY = "ready"
_WANDB_CLOSE_SECONDS = 60


class Sink(Protocol):
    """A receiver of the record of each step, in order."""

    def write(self, record: StepRecord) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """Appends to ``metrics.jsonl``. Each line is flushed at once, and synced to disk at most every five seconds."""

    def __init__(self, path: Path) -> None:
        # Half a line that a killed process left: otherwise the next record would be appended to it.
        text = path.read_bytes() if path.exists() else b""
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            log.warning("%s ended in half a line, which was dropped", path)
            os.truncate(path, whole)
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        self._synced = time.monotonic()

    def write(self, record: StepRecord) -> None:
        with writing(self._path):
            self._file.write(record.to_json() + "\n")
            self._file.flush()
            if time.monotonic() - self._synced >= _FSYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def close(self) -> None:
        with writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


class TensorBoardSink:
    """Scalars for TensorBoard, written without TensorFlow or torch. Steps from ``first_step`` on hide older ones."""

    def __init__(self, directory: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(directory))
        # A start marker tells TensorBoard that a resumed run writes these steps again.
        start = Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START))
        self._writer.add_event(start)

    def write(self, record: StepRecord) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in tracker_names(record).items()]
        self._writer.add_event(Event(wall_time=record.time, step=record.step, summary=Summary(value=scalars)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbProcess:
    """W&B in its own process, which reads one JSON line per record and can be killed.

    In this process, a dead network would delay its end for as long as W&B retries. The key goes through a pipe, not on a
    command line or in the environment, where other processes can read it.
    """

    def __init__(self, key: str, run: Mapping[str, object]) -> None:
        """``key`` "": the user is logged in. ``run``: arguments of ``wandb.init``; ``id`` connects a resumed run."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "togi.obs.sinks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C reaches only the run, and the whole group can be killed
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert self._process.stdin is not None and self._process.stdout is not None, "opened as pipes"
        self._records, self._answers = self._process.stdin, self._process.stdout
        self._send(json.dumps({"key": key, "run": run}))

    def connect(self) -> Sink:
        """Wait until W&B has accepted the run. Raises ``ConnectionError`` with its message otherwise."""
        answer = self._answer("its process ended without a word")
        if answer != _READY:
            raise ConnectionError(answer)
        return self

    def write(self, record: StepRecord) -> None:
        try:
            self._send(record.to_json())
        except BrokenPipeError as error:
            raise ConnectionError(self._answer("its process ended")) from error

    def close(self) -> None:
        self._records.close()
        if self._process.wait() != 0:
            raise ConnectionError(self._answer("its process failed"))

    def kill(self) -> None:
        """Kill the process and everything it started. Its local files stay, for ``wandb sync``."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _send(self, line: str) -> None:
        self._records.write(line + "\n")
        self._records.flush()

    def _answer(self, otherwise: str) -> str:
        return self._answers.readline().strip() or otherwise


def _wandb_main() -> None:
    """The body of ``WandbProcess``: reads settings, then records; answers with one line, or with an error."""
    lines, answers = sys.stdin, sys.stdout
    try:
        settings = json.loads(lines.readline())
        key, offline = settings["key"], os.environ.get("WANDB_MODE", "online") != "online"
        import wandb

        if not key and not offline and not wandb.login(prompt=False):
            raise ConfigError("not logged in; give a key (--use_wandb KEY), set WANDB_API_KEY or run `wandb login`")
        # x_disable_meta: otherwise W&B stores the command line and paths of the environment. No console capture either.
        how = wandb.Settings(api_key=key or None, console="off", silent=True, x_disable_meta=True, save_code=False)
        run = wandb.init(**settings["run"], resume=None if offline else "allow", settings=how)
        # Training and evaluation have step axes of their own.
        for family in ("train", "eval"):
            run.define_metric(f"{family}/global_step")
            run.define_metric(f"{family}/*", step_metric=f"{family}/global_step")
        answers.write(_READY + "\n")
        answers.flush()
        for line in lines:
            named: dict[str, float] = {}
            record = StepRecord.from_json(line)
            for name, value in tracker_names(record).items():
                named[f"{name.partition('/')[0]}/global_step"] = record.step
                named[name] = value
            run.log(named)
        faulthandler.dump_traceback_later(_WANDB_CLOSE_SECONDS, exit=True)  # the run may be gone: do not outlive it
        run.finish()
    except Exception as error:  # noqa: BLE001 - the edge of this process; the run turns this line into a warning
        answers.write(" ".join(f"{type(error).__name__}: {error}".split()) + "\n")
        sys.exit(1)


def tracker_names(record: StepRecord) -> dict[str, float]:
    """Values and phase seconds by their names in trackers: ``eval/<k>`` unchanged, everything else ``train/<k>``."""
    return {name if name.startswith("eval/") else f"train/{name}": value for name, value in all_values(record).items()}


class Background:
    """A tracker behind a thread. ``open_sink`` runs on that thread too, because connecting may hang.

    ``every``: only each so many steps are passed on (``--logging_steps``); records with evaluation results always are.
    ``abandon``: called when the tracker is dropped. ``patience``: seconds to wait for it at the end.
    """

    def __init__(
        self,
        name: str,
        open_sink: Callable[[], Sink],
        *,
        every: int = 1,
        secrets: tuple[str, ...] = (),
        abandon: Callable[[], None] = lambda: None,
        patience: float = 15.0,
    ) -> None:
        self._name, self._every, self._secrets = name, every, secrets
        self._abandon, self._patience = abandon, patience
        self._records: queue.Queue[StepRecord | None] = queue.Queue(_QUEUE_RECORDS)
        self._dropped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(open_sink,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, record: StepRecord) -> None:
        if record.step % self._every == 0 or any(name.startswith("eval/") for name in record.values):
            self._put(record)

    def close(self) -> None:
        """Wait until everything is sent, at most ``patience`` seconds."""
        self._put(None)
        if not self._dropped.is_set():
            self._thread.join(self._patience)
            if self._thread.is_alive():
                self._drop(f"it did not finish within {self._patience:g} s")

    def _put(self, record: StepRecord | None) -> None:
        if not self._dropped.is_set():
            try:
                self._records.put_nowait(record)
            except queue.Full:
                self._drop(f"it is more than {_QUEUE_RECORDS} records behind")

    def _work(self, open_sink: Callable[[], Sink]) -> None:
        try:
            sink = open_sink()
            # None is the mark of the end.
            while (record := self._records.get()) is not None:
                sink.write(record)
            sink.close()
        except Exception as error:  # noqa: BLE001 - a tracker is foreign code, and no failure of it may end a run
            self._drop(f"{type(error).__name__}: {error}")

    def _drop(self, reason: str) -> None:
        if not self._dropped.is_set():
            self._dropped.set()
            shown = scrub(reason, self._secrets)
            log.warning("%s is off for the rest of this run (%s); metrics.jsonl has everything", self._name, shown)
            self._abandon()


@dataclass(frozen=True, slots=True)
class TrackerOptions:
    """The tracker flags; an empty ``use_tensorboard`` or ``use_wandb`` means not configured."""

    use_tensorboard: str = ""
    use_wandb: str = ""
    wandb_org: str = ""
    wandb_group: str = ""
    wandb_project: str = "togi"
    wandb_run_name: str = ""
    logging_steps: int = 1


def check_trackers(options: TrackerOptions) -> None:
    """Raise ``ConfigError`` for a configured tracker that is not installed. Imports nothing: usable in the preflight."""
    for flag, package, wanted in (
        ("--use_tensorboard", "tensorboard", options.use_tensorboard),
        ("--use_wandb", "wandb", options.use_wandb),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{flag} needs the package {package}, which is not installed: `pip install {package}`, or drop {flag}."
            )


def open_trackers(
    options: TrackerOptions, run_id: str, folder: Path, config: Mapping[str, object], first_step: int = 0
) -> list[Background]:
    """The configured trackers, already connecting in the background. ``config`` may hold secrets, which are redacted.

    ``folder``: for W&B's local files. ``first_step``: the first step that this process logs. Raises ``ConfigError`` like
    ``check_trackers``.
    """
    check_trackers(options)
    name, every = options.wandb_run_name or folder.name, options.logging_steps
    trackers = []
    if options.use_tensorboard:
        board = Path(options.use_tensorboard) / name
        trackers.append(Background("TensorBoard", lambda: TensorBoardSink(board, first_step), every=every))
    if options.use_wandb:
        key = options.use_wandb if looks_like_wandb_key(options.use_wandb) else ""
        run = {"project": options.wandb_project, "name": name, "dir": str(folder), "id": run_id}
        team = {"entity": options.wandb_org or None, "group": options.wandb_group or None}
        shown = {name: redact_value(name, value) for name, value in config.items()}
        process = WandbProcess(key, {**run, **team, "config": shown})
        secrets = (key, os.environ.get("WANDB_API_KEY", ""))
        trackers.append(Background("W&B", process.connect, every=every, secrets=secrets, abandon=process.kill))
    return trackers


class Recorder:
    """All sinks of a run: the local file first, then the trackers. Steps only increase."""

    def __init__(self, metrics_path: Path, trackers: list[Background], last_step: int = -1) -> None:
        self._local, self._trackers, self._last_step = JsonlSink(metrics_path), trackers, last_step

    def write(self, record: StepRecord) -> None:
        """Log one step. A record without a ``time`` gets the current time."""
        assert record.step > self._last_step, f"step {record.step} logged after step {self._last_step}"
        self._last_step = record.step
        stamped = record if record.time else replace(record, time=time.time())
        self._local.write(stamped)
        for tracker in self._trackers:
            tracker.write(stamped)

    def close(self) -> None:
        try:
            self._local.close()
        finally:
            for tracker in self._trackers:
                tracker.close()


if __name__ == "__main__":
    _wandb_main()
