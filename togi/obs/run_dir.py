"""The folder of a run: the places of its parts, the resolved configuration, and truncation on resume.

    run.json        what was run: command, versions, every value with its source (for the report and for tools)
    config.yaml     the same values, to read or to give to ``--config``; secrets are left out
    engine.json     what computes in the generation engines of RL: versions, and vLLM's model runner and scheduling
    status.json     running | finished | failed, and since when
    metrics.jsonl   one line per step (``metrics``)
    rollouts/       one Parquet file per step (``rollout_store``)
    held_out/       the worst and best held-out rows of each evaluation
    reference/      logprobs of the reference, with ``--precompute_ref``
    report.html     the page (``report``)
    failure.md      of a failed run: what happened, where, and the command that goes on
    stacks/         of a stalled run: what each process was doing, and whom the run waited for
    discarded/      what steps after a checkpoint had written before the run was resumed from it

Checkpoints (``--ckpt_path``) and the final model (``--save_path``) are elsewhere.

Removes secrets from what a run writes: configuration files, reports, trackers and log lines.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from togi.errors import ConfigError, DataError, WriteError
from togi.obs.metrics import read_records
from togi.obs.rollout_store import RolloutStore
from togi.obs.way_out import left_out, write_atomically, writing
from togi.version import __version__

SECRET_FLAGS = frozenset({"use_wandb", "wandb_api_key", "hf_token", "api_key"})
REDACTED = "<redacted>"
_URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
_SECRET_NAME = re.compile("TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
_MIN_WANDB_KEY = 32


def redact_value(name: str, value: object) -> object:
    """``value`` of the flag ``name`` as it may be shown. Logins inside URLs are removed for every flag."""
    if name in SECRET_FLAGS:
        return REDACTED if value not in (None, "", False) else value
    if isinstance(value, str):
        return _URL_LOGIN.sub(f"{REDACTED}@", value)
    if isinstance(value, list | tuple):
        return [redact_value(name, item) for item in value]
    return value


def redact_argv(argv: Sequence[str]) -> list[str]:
    """A command line with the values of secret flags replaced, in both forms: ``--flag value`` and ``--flag=value``."""
    shown: list[str] = []
    secret_next = False
    for word in argv:
        flag, equals, _ = word.removeprefix("--").partition("=")
        secret = word.startswith("--") and flag in SECRET_FLAGS
        if secret_next and not word.startswith("--"):
            shown.append(REDACTED)
        elif secret and equals:
            shown.append(f"--{flag}={REDACTED}")
        else:
            shown.append(str(redact_value("", word)))
        secret_next = secret and not equals
    return shown


def scrub(text: str, secrets: Iterable[str]) -> str:
    """``text`` without any of ``secrets``. Words shorter than eight characters are not treated as secrets."""
    for secret in secrets:
        if len(secret) >= 8:
            text = text.replace(secret, REDACTED)
    return text


def without_secrets(text: str) -> str:
    """``text`` without logins in URLs, and without the values of environment variables whose names speak of secrets."""
    secrets = [value for name, value in os.environ.items() if _SECRET_NAME.search(name)]
    return _URL_LOGIN.sub(f"{REDACTED}@", scrub(text, secrets))


def looks_like_wandb_key(word: str) -> bool:
    """Whether ``--use_wandb`` was given a key instead of a word such as "true": W&B keys have 40 or more characters."""
    return len(word) >= _MIN_WANDB_KEY and not any(character.isspace() for character in word)


@dataclass(frozen=True, slots=True)
class Resolved:
    """One configuration value as the run uses it. ``value``: JSON-like (str, number, bool, None, list).

    ``source``: where it came from: "default", "file", "command line", "auto", ...
    """

    value: object
    source: str


class State(StrEnum):
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Status:
    """``message``: the reason of a failure, or "". Times in seconds since 1970."""

    state: State
    started: float
    updated: float
    message: str = ""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """The content of ``run.json``. ``values``: flag to {"value", "source"}; ``run_id``: kept on resume."""

    run_id: str
    command: str
    argv: list[str]
    started: float
    togi_version: str
    python_version: str
    host: str
    values: dict[str, dict[str, object]]


def default_run_dir(command: str, now: time.struct_time | None = None, parent: Path = Path("runs")) -> Path:
    """``runs/<command>-<date>-<time>``, with a number appended while that folder exists."""
    name = f"{command}-{time.strftime('%Y%m%d-%H%M%S', now or time.localtime())}"
    path, number = parent / name, 2
    while path.exists():
        path, number = parent / f"{name}-{number}", number + 1
    return path


class RunDirectory:
    """The paths of a run's parts. Create it with ``create`` or ``resume`` (writers) or directly (readers)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.info_path = root / "run.json"
        self.config_path = root / "config.yaml"
        self.status_path = root / "status.json"
        self.metrics_path = root / "metrics.jsonl"
        self.report_path = root / "report.html"
        self.failure_path = root / "failure.md"
        # where a stalled process writes its Python stacks (``progress.Watchdog``)
        self.stacks_path = root / "stacks.txt"
        self.rollouts = RolloutStore(root / "rollouts")
        # what became of every prompt of online RL, and groups that no checkpoint has learnt from yet (``pump.ledger``)
        self.ledger_path, self.ledger_groups = root / "ledger.jsonl", root / "ledger"

    def check_unused(self) -> None:
        """Raise ``ConfigError`` if the folder already holds a run."""
        if self.info_path.exists() or self.metrics_path.exists():
            raise ConfigError(
                f"--run_dir {self.root} already holds a run: give another folder, or go on with it by --load_checkpoint."
            )

    @classmethod
    def create(cls, root: Path, command: str, argv: Sequence[str], values: Mapping[str, Resolved]) -> RunDirectory:
        """The folder of a new run, with its configuration written.

        Raises ``ConfigError`` if the folder already holds a run or cannot be written.
        """
        run = cls(root)
        run.check_unused()
        run._write_info(uuid.uuid4().hex[:12], command, argv, values)
        return run

    @classmethod
    def resume(cls, root: Path, command: str, argv: Sequence[str], values: Mapping[str, Resolved]) -> RunDirectory:
        """The folder of a resumed run (a new one if there is none), with the current configuration.

        The previous configuration is kept in ``discarded/``. Call ``truncate_after`` with the checkpoint's step next.
        """
        run, run_id = cls(root), uuid.uuid4().hex[:12]
        if run.info_path.exists():
            run_id = run.read_info().run_id
            kept = run._discard_folder("config")
            for path in (run.info_path, run.config_path):
                if path.exists():
                    (kept / path.name).write_bytes(path.read_bytes())
            if run.failure_path.exists():
                run.failure_path.replace(kept / run.failure_path.name)
        run._write_info(run_id, command, argv, values)
        return run

    def _write_info(self, run_id: str, command: str, argv: Sequence[str], values: Mapping[str, Resolved]) -> None:
        # No secret may reach a file, neither from the settings nor from the command line.
        shown = {name: Resolved(redact_value(name, item.value), item.source) for name, item in values.items()}
        entries = {name: {"value": item.value, "source": str(item.source)} for name, item in shown.items()}
        python, host = platform.python_version(), platform.node()
        info = RunInfo(run_id, command, redact_argv(argv), time.time(), __version__, python, host, entries)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            write_atomically(self.info_path, json.dumps(asdict(info), indent=2, ensure_ascii=False) + "\n")
            write_atomically(self.config_path, _as_yaml(command, shown))
        except (OSError, WriteError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            raise ConfigError(
                f"--run_dir {self.root} cannot be written ({getattr(cause, 'strerror', cause)}): give a folder that can."
            ) from error
        self.write_status(State.RUNNING)

    def read_info(self) -> RunInfo:
        """The content of ``run.json``. Raises ``DataError`` if this folder holds no run."""
        if not self.info_path.is_file():
            raise DataError(f"{self.root} is not the folder of a run: it has no {self.info_path.name}.")
        try:
            return RunInfo(**json.loads(self.info_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{self.root} is not the folder of a run: {self.info_path.name}: {error}.") from error

    def write_status(self, state: State, message: str = "") -> None:
        status = Status(state, self.read_info().started, time.time(), message)
        write_atomically(self.status_path, json.dumps(asdict(status), indent=2) + "\n")

    def read_status(self) -> Status:
        """The status. A run whose status cannot be read counts as failed."""
        try:
            record = json.loads(self.status_path.read_text(encoding="utf-8"))
            return Status(State(record["state"]), record["started"], record["updated"], record["message"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            started = self.read_info().started
            return Status(State.FAILED, started, started, f"{self.status_path} cannot be read ({error})")

    def truncate_after(self, step: int) -> tuple[int, ...]:
        """Move everything of steps after ``step`` into ``discarded/``, so that each step will exist exactly once.

        For a resume from the checkpoint of ``step``. Returns the moved steps, ascending. If it is interrupted, a second
        call finishes it: nothing is removed from the run before its copy is in place.
        """
        records = read_records(self.metrics_path)
        late_records = [record for record in records if record.step > step]
        late_files = [file for file in self.rollouts.files() if file.step > step]
        late_rows = [(number, path) for number, path in _held_out_files(self.root) if number > step]
        # First copy what is moved, and only then shorten the metrics.
        if late_records or late_files or late_rows:
            folder = self._discard_folder(f"after-step-{step:06d}")
            text = "".join(record.to_json() + "\n" for record in late_records)
            write_atomically(folder / self.metrics_path.name, text)
            (folder / "rollouts").mkdir(exist_ok=True)
            for file in late_files:
                file.path.replace(folder / "rollouts" / file.path.name)
            (folder / HELD_OUT_FOLDER).mkdir(exist_ok=True)
            for _, path in late_rows:
                path.replace(folder / HELD_OUT_FOLDER / path.name)
        if self.metrics_path.exists():
            kept = "".join(record.to_json() + "\n" for record in records if record.step <= step)
            write_atomically(self.metrics_path, kept)
        steps = {record.step for record in late_records} | {file.step for file in late_files}
        return tuple(sorted(steps | {number for number, _ in late_rows}))

    def _discard_folder(self, name: str) -> Path:
        """A new folder for one resume; its number gives the order."""
        parent = self.root / "discarded"
        parent.mkdir(exist_ok=True)
        folder = parent / f"{len(list(parent.iterdir())) + 1:03d}-{name}"
        folder.mkdir()
        return folder


def _as_yaml(command: str, values: Mapping[str, Resolved]) -> str:
    lines = [f"# togi {command}, resolved configuration; after each value: where it came from"]
    for name, item in values.items():
        if item.value == REDACTED:
            lines.append(f"# {name}: not shown  # {item.source}")
            continue
        style = '"' if "\n" in str(item.value) else None  # quoted, a text of several lines stays on one line
        text = yaml.safe_dump(item.value, default_flow_style=True, default_style=style, width=10**9, allow_unicode=True)
        shown = text.removesuffix("\n").removesuffix("\n...")
        lines.append(f"{name}: {shown}  # {item.source}")
    return "\n".join(lines) + "\n"


# Second part: held-out rows of an evaluation with their values on disk, ``held_out/step_00000012.json``: the worst and the
# best of each evaluation. Metrics over all rows are in ``metrics.jsonl``.

HELD_OUT_FOLDER = "held_out"
SHOWN_ROWS = 4


@dataclass(frozen=True, slots=True)
class HeldOutRow:
    """One row as the model saw it. ``texts`` and ``values``: of its one sequence, or of the chosen and the rejected one.

    ``place``: "worst" or "best". ``number``: what the values are, such as "nats a token".
    """

    place: str
    number: str
    texts: tuple[str, ...]
    values: tuple[float, ...]


def write_held_out(root: Path, step: int, rows: Sequence[HeldOutRow]) -> None:
    """Write the rows of the evaluation after ``step`` into the run folder ``root``. Raises WriteError."""
    folder = root / HELD_OUT_FOLDER
    text = json.dumps([asdict(row) for row in rows], ensure_ascii=False)
    path = folder / f"step_{step:08d}.json"
    with writing(path):
        folder.mkdir(exist_ok=True)
    write_atomically(path, text)


def read_held_out(root: Path) -> dict[int, list[HeldOutRow]]:
    """The rows by step, ascending; empty if there are none. A file that cannot be read is left out and logged."""
    rows = {}
    for step, path in _held_out_files(root):
        with left_out(path):
            rows[step] = [
                HeldOutRow(row["place"], row["number"], tuple(row["texts"]), tuple(row["values"]))
                for row in json.loads(path.read_text(encoding="utf-8"))
            ]
    return rows


def _held_out_files(root: Path) -> list[tuple[int, Path]]:
    return [
        (int(path.stem.removeprefix("step_")), path) for path in sorted((root / HELD_OUT_FOLDER).glob("step_*.json"))
    ]


def read_data_reports(root: Path) -> dict[str, dict[str, Any]]:
    """The data reports of the run folder ``root`` by name. A file that cannot be read is left out and logged."""
    reports = {}
    for path in sorted((root / "data").glob("*.json")):
        with left_out(path):
            reports[path.stem] = dict(json.loads(path.read_text(encoding="utf-8")))
    return reports
