"""Crash-safe checkpoints: a folder of checkpoints, and the folder of the best model.

A checkpoint is written to a temporary folder, listed in a manifest (sizes and SHA-256), flushed to disk and renamed in one
operation. Then ``latest`` points to it. Old checkpoints are pruned last, the newest never. A reader loads the checkpoint that
``latest`` names, or the newest complete one before it, and logs what it skipped. Only one process writes. Not here: the contents
of a checkpoint (``learner_state``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from togi.errors import CheckpointError
from togi.obs.way_out import advice, disk_reason

logger = logging.getLogger(__name__)

PREFIX = "step_"
UNFINISHED = ".unfinished_"
MANIFEST = "manifest.json"
STATE = "state.json"
HF_FOLDER = "hf"
"""The subfolder of a checkpoint with the model in Hugging Face format, if it was saved."""
POINTER = "latest"
SCHEMA = 1
# File systems reserve some space, and a checkpoint also holds small files beside the tensors.
SPACE_MARGIN = 1.05


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint. ``state`` is what the driver saved with it."""

    path: Path
    step: int
    state: Mapping[str, Any]


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints under ``root``, at most ``max_num`` of them and ``max_gb`` (10^9 bytes) together."""

    root: Path
    max_num: int = 3
    max_gb: float = math.inf

    def __post_init__(self) -> None:
        assert self.max_num >= 1

    @contextmanager
    def write(self, step: int, state: Mapping[str, object], expected_bytes: int) -> Iterator[Path]:
        """Yield a folder to write into, and commit it as checkpoint ``step`` when the block ends. An error leaves no checkpoint.

        ``state`` must be JSON. Raises CheckpointError if ``expected_bytes`` do not fit on the disk or the disk fails.
        """
        folder = self.begin(step, expected_bytes)
        with _writing(f"The checkpoint of step {step} cannot be written to {self.root}"):
            try:
                yield folder
                self.commit(folder, step, state)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def begin(self, step: int, expected_bytes: int) -> Path:
        """Make an empty folder beside the checkpoints, after removing unfinished ones of killed runs. Raises CheckpointError."""
        self.root.mkdir(parents=True, exist_ok=True)
        for left_over in self.root.glob(f"{UNFINISHED}*"):
            logger.warning("removing an unfinished checkpoint: %s", left_over)
            if left_over.is_dir():
                shutil.rmtree(left_over)
            else:  # the pointer, of a run killed between writing and renaming it
                left_over.unlink()
        # check the space before writing gigabytes
        free, needed = shutil.disk_usage(self.root).free, expected_bytes * SPACE_MARGIN
        if free < needed:
            raise CheckpointError(
                f"checkpoint of step {step} needs {size(round(needed))} and {self.root} has {size(free)} free: "
                "make room, or set --ckpt_path to a larger disk"
            )
        folder = self.root / f"{UNFINISHED}{step}"
        folder.mkdir()
        return folder

    def commit(self, folder: Path, step: int, state: Mapping[str, object]) -> None:
        """Turn a folder from ``begin`` into checkpoint ``step``. Any process may have written the files."""
        # list and flush all files before the folder gets its name: a rename must not overtake the data
        _write_json(folder / STATE, dict(state))
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        listing = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in files
        }
        _write_json(folder / MANIFEST, {"schema": SCHEMA, "step": step, "files": listing})
        flush_tree(folder)
        target = self.root / f"{PREFIX}{step:08d}"
        if target.exists():
            # A run resumed from an earlier step, because this checkpoint was damaged, and has reached the step again.
            shutil.rmtree(target)
        folder.rename(target)
        _flush(self.root)
        # the pointer too is written aside and renamed, so that it is never half written
        pointer = self.root / f"{UNFINISHED}{POINTER}"
        pointer.write_text(target.name, encoding="utf-8")
        _flush(pointer)
        pointer.replace(self.root / POINTER)
        self._prune(target)

    def latest(self) -> Checkpoint | None:
        """The checkpoint written last that is complete, with every file checked against its hash. None if there is none.

        Later ones that are damaged or unfinished are skipped and logged.
        """
        for left_over in sorted(self.root.glob(f"{UNFINISHED}*/")):
            logger.warning("skipping %s: it was never finished", left_over)
        for path in reversed(self._all()):
            problem = damage(path)
            if not problem:
                return _read(path)
            logger.warning("skipping checkpoint %s: %s", path, problem)
        return None

    def _all(self) -> list[Path]:
        """All checkpoints in the order of their age, the one that the pointer names last.

        Those of later steps are older than it: the run that wrote it has left them behind, as they were damaged or by hand.
        """
        names = (path.name.removeprefix(PREFIX) for path in self.root.glob(f"{PREFIX}*"))
        folders = {self.root / f"{PREFIX}{digits}": int(digits) for digits in names if digits.isdigit()}
        pointer = self.root / POINTER
        named = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
        last = folders.get(self.root / named, math.inf)
        return sorted(folders, key=lambda path: (folders[path] <= last, folders[path]))

    def _prune(self, newest: Path) -> None:
        """Remove the oldest checkpoints until both limits hold, but never ``newest``."""
        kept = [(path, _folder_size(path)) for path in self._all() if path != newest]
        total = _folder_size(newest) + sum(size for _, size in kept)
        while kept and (len(kept) + 1 > self.max_num or total > self.max_gb * 1e9):
            path, size = kept.pop(0)
            shutil.rmtree(path)
            total -= size


@contextmanager
def _writing(failed: str) -> Iterator[None]:
    """If the block cannot write, raise CheckpointError with ``failed``, the reason and the way out."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not disk_reason(error):
            raise
        raise CheckpointError(
            f"{failed} ({disk_reason(error) or error}): {advice(error)}, and go on with --load_checkpoint."
        ) from error


def left_behind(root: Path) -> list[str]:
    """The names of what an earlier run has left in a checkpoint folder: its checkpoints and the folder of its best model."""
    return [path.name for path in CheckpointStore(root)._all()] + [BEST_FOLDER] * (root / BEST_FOLDER).exists()


def read_checkpoint(path: Path) -> Checkpoint:
    """Load the checkpoint in a folder. Raises CheckpointError if it is damaged."""
    problem = damage(path)
    if problem:
        raise CheckpointError(f"The checkpoint {path} is damaged ({problem}): take another.")
    return _read(path)


def _read(path: Path) -> Checkpoint:
    step = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["step"]
    return Checkpoint(path, step, json.loads((path / STATE).read_text(encoding="utf-8")))


def damage(path: Path) -> str:
    """Say what is wrong with a checkpoint folder. Returns "" if it is complete."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if manifest["schema"] != SCHEMA:
        return f"its schema is {manifest['schema']}, this version reads {SCHEMA}"
    problems = (_file_damage(path, name, entry) for name, entry in manifest["files"].items())
    return next((problem for problem in problems if problem), "")


def _file_damage(path: Path, name: str, entry: Mapping[str, object]) -> str:
    file = path / name
    if not file.is_file():
        return f"{name} is missing"
    if file.stat().st_size != entry["bytes"]:
        return f"{name} has {file.stat().st_size} bytes, expected {entry['bytes']}"
    return "" if _digest(file) == entry["sha256"] else f"{name} does not match its hash"


def size(nbytes: int) -> str:
    """A number of bytes in TB, GB, MB or kB, with three digits."""
    for unit, step in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= step:
            return f"{nbytes / step:.3g} {unit}"
    return f"{nbytes} B"


def _folder_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_tree(folder: Path) -> None:
    """Wait until all files of a folder are on disk (fsync)."""
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    """Wait until a file, or the list of files of a folder, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# The best model so far by a named metric, in plain Hugging Face format.
#
# A new best model is written to a temporary folder. The old one is removed only after the new one is in its place. A file beside
# the model records the value and the step. The same record is part of every checkpoint's state: so after a resume from any of
# them a worse evaluation cannot replace a better model. Pruning checkpoints never touches this folder.

BEST_FOLDER = "best"
BEST_RECORD = "best.json"
_NEW, _OLD = ".best_new", ".best_old"


@dataclass(frozen=True, slots=True)
class Aim:
    """The metric that selects the best model, by its name in the logs, and whether the highest or the lowest value is best."""

    metric: str
    highest: bool


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far: its value and the number of steps before it."""

    aim: Aim
    value: float
    step: int

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Best:
        return cls(Aim(**record["aim"]), record["value"], record["step"])


def better(aim: Aim, value: float, best: Best | None) -> bool:
    """Whether ``value`` is strictly better than ``best``. A value that is not finite never is."""
    beats = best is None or (value > best.value if aim.highest else value < best.value)
    return beats and math.isfinite(value)


@dataclass(frozen=True)
class BestStore:
    """The folder ``root``/best. Only one process writes."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / BEST_FOLDER

    @contextmanager
    def write(self, best: Best) -> Iterator[Path]:
        """Yield a folder to write the model into. It replaces the old best when the block ends without an error."""
        self._mend()
        new, old = self.root / _NEW, self.root / _OLD
        with _writing(f"The best model cannot be written to {self.folder}"):
            try:
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir(parents=True)
                yield new
                # the record is written last: a folder that has one is complete (``_mend``)
                flush_tree(new)
                (new / BEST_RECORD).write_text(json.dumps(asdict(best), indent=1), encoding="utf-8")
                flush_tree(new)
                if self.folder.exists():
                    self.folder.rename(old)
                new.rename(self.folder)
                shutil.rmtree(old, ignore_errors=True)
            except Exception:
                shutil.rmtree(new, ignore_errors=True)
                raise

    def read(self) -> Best | None:
        """The record of the model in the folder. None if there is none. Raises CheckpointError if it cannot be read."""
        self._mend()
        path = self.folder / BEST_RECORD
        if not path.is_file():
            return None
        try:
            return Best.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): remove its folder {self.folder}.") from error

    def resumed(self, aim: Aim, saved: Mapping[str, Any] | None) -> Best | None:
        """The best evaluation to resume from: the better of a checkpoint's record and the folder's, which may be newer.

        Raises CheckpointError if one of them is for another metric.
        """
        best: Best | None = None
        for found in (Best.from_json(saved) if saved is not None else None, self.read()):
            if found is None:
                continue
            if found.aim != aim:
                raise CheckpointError(
                    f"{self.root} keeps the best model by {_said(found.aim)}, this run asks for {_said(aim)}: go on with "
                    "the same --best_metric_key and --best_metric_mode, or choose another --ckpt_path."
                )
            if better(aim, found.value, best):
                best = found
        return best

    def _mend(self) -> None:
        """Finish the renames of a process that was killed between them. A folder with a record is complete."""
        if not self.folder.exists():
            # killed between the two renames: the new model is complete, the old one is the fallback
            for name in (_NEW, _OLD):
                if (self.root / name / BEST_RECORD).is_file():
                    (self.root / name).rename(self.folder)
                    break
        shutil.rmtree(self.root / _OLD, ignore_errors=True)


def _said(aim: Aim) -> str:
    return f"the {'highest' if aim.highest else 'lowest'} {aim.metric}"
