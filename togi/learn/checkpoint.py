"""A folder of checkpoints that a crash cannot spoil.

A checkpoint is written aside, listed in a manifest (sizes and SHA-256), flushed to disk, renamed in one go, and only
then pointed to by ``latest``; older ones are pruned last and the newest never. A reader takes the newest complete one
and names what it skipped. Only one process writes through this class; what goes inside (``learner_state``) is not its
business.
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
"""Where a checkpoint has its model in Hugging Face format, if it has."""
POINTER = "latest"
SCHEMA = 1
# File systems hold back some space, and tensors are not all that is written.
SPACE_MARGIN = 1.05


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint. ``state`` is what the driver saved with it."""

    path: Path
    step: int
    state: Mapping[str, Any]


class CheckpointStore:
    """The checkpoints under ``root``, at most ``max_num`` of them and ``max_gb`` (10^9 bytes) together."""

    def __init__(self, root: Path, max_num: int = 3, max_gb: float = math.inf) -> None:
        assert max_num >= 1
        self.root = root
        self.max_num = max_num
        self.max_gb = max_gb

    @contextmanager
    def write(self, step: int, state: Mapping[str, Any], expected_bytes: int) -> Iterator[Path]:
        """Yields a folder to write into and makes it checkpoint ``step`` when the block ends; else leaves nothing.

        ``state`` must be JSON. Raises CheckpointError when ``expected_bytes`` do not fit or the disk fails.
        """
        folder = self.begin(step, expected_bytes)
        try:
            yield folder
            self.commit(folder, step, state)
        except Exception as error:
            if not isinstance(error, OSError) and not disk_reason(error):
                raise
            raise CheckpointError(
                f"The checkpoint of step {step} cannot be written to {self.root} ({disk_reason(error) or error}): "
                f"{advice(error)}, and go on with --load_checkpoint."
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def begin(self, step: int, expected_bytes: int) -> Path:
        """An empty folder beside the checkpoints, after removing what killed runs left behind."""
        self.root.mkdir(parents=True, exist_ok=True)
        for left_over in self.root.glob(f"{UNFINISHED}*"):
            logger.warning("removing an unfinished checkpoint: %s", left_over)
            if left_over.is_dir():
                shutil.rmtree(left_over)
            else:  # the pointer, of a run killed between writing and renaming it
                left_over.unlink()
        free, needed = shutil.disk_usage(self.root).free, expected_bytes * SPACE_MARGIN
        if free < needed:
            raise CheckpointError(
                f"checkpoint of step {step} needs {needed / 1e9:.1f} GB and {self.root} has {free / 1e9:.1f} GB free: "
                "make room, or set --ckpt_path to a larger disk"
            )
        folder = self.root / f"{UNFINISHED}{step}"
        folder.mkdir()
        return folder

    def commit(self, folder: Path, step: int, state: Mapping[str, Any]) -> Path:
        """Turn a folder from ``begin``, written by any process that sees it, into checkpoint ``step``."""
        _write_json(folder / STATE, dict(state))
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        listing = {str(path.relative_to(folder)): {"bytes": _size(path), "sha256": _digest(path)} for path in files}
        _write_json(folder / MANIFEST, {"schema": SCHEMA, "step": step, "files": listing})
        flush_tree(folder)
        target = self.root / f"{PREFIX}{step:08d}"
        if target.exists():
            # A run that resumed from an earlier step, because this one was damaged, has come here again.
            shutil.rmtree(target)
        folder.rename(target)
        _flush(self.root)
        pointer = self.root / f"{UNFINISHED}{POINTER}"
        pointer.write_text(target.name, encoding="utf-8")
        _flush(pointer)
        pointer.replace(self.root / POINTER)
        self._prune(target)
        return target

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, every file checked against its hash; None where there is none.

        What is newer but damaged or unfinished is skipped and named in the log.
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
        folders = (path for path in self.root.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit())
        return sorted(folders, key=_step)

    def _prune(self, newest: Path) -> None:
        """Remove the oldest until both limits hold, never ``newest``."""
        kept = [(path, _folder_size(path)) for path in self._all() if path != newest]
        total = _folder_size(newest) + sum(size for _, size in kept)
        while kept and (len(kept) + 1 > self.max_num or total > self.max_gb * 1e9):
            path, size = kept.pop(0)
            shutil.rmtree(path)
            total -= size


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises CheckpointError where it is damaged."""
    problem = damage(path)
    if problem:
        raise CheckpointError(f"The checkpoint {path} is damaged ({problem}): take another.")
    return _read(path)


def _read(path: Path) -> Checkpoint:
    step = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["step"]
    return Checkpoint(path, step, json.loads((path / STATE).read_text(encoding="utf-8")))


def damage(path: Path) -> str:
    """What is wrong with a checkpoint folder, in words; "" if it is complete."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if manifest["schema"] != SCHEMA:
        return f"its schema is {manifest['schema']}, this version reads {SCHEMA}"
    problems = (_file_damage(path, name, entry) for name, entry in manifest["files"].items())
    return next((problem for problem in problems if problem), "")


def _file_damage(path: Path, name: str, entry: Mapping[str, Any]) -> str:
    file = path / name
    if not file.is_file():
        return f"{name} is missing"
    if _size(file) != entry["bytes"]:
        return f"{name} has {_size(file)} bytes, expected {entry['bytes']}"
    return "" if _digest(file) == entry["sha256"] else f"{name} does not match its hash"


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def _size(path: Path) -> int:
    return path.stat().st_size


def _folder_size(path: Path) -> int:
    return sum(_size(file) for file in path.rglob("*") if file.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_tree(folder: Path) -> None:
    """Wait until everything in a folder is on disk."""
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    """Wait until a file or a folder's entries are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# The best model so far by a named metric, in plain Hugging Face format, in a folder that a crash cannot spoil.
#
# A new best is written aside, and the old one is removed only when the new one is in its place. Beside the model lies a
# record of the value and the step. The same record belongs into every checkpoint's state: after a resume from any of them
# a worse evaluation cannot replace a better model. Not here: checkpoints, whose pruning never touches this folder.

BEST_FOLDER = "best"
BEST_RECORD = "best.json"
_NEW, _OLD = ".best_new", ".best_old"


@dataclass(frozen=True, slots=True)
class Aim:
    """Which value is looked at, by its name in the logs, and whether the highest or the lowest is the best."""

    metric: str
    highest: bool


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far: its value and after how many steps it was."""

    aim: Aim
    value: float
    step: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Best:
        return cls(Aim(**record["aim"]), record["value"], record["step"])


def better(aim: Aim, value: float, best: Best | None) -> bool:
    """Whether ``value`` is better than all before. What is not finite never is; an equal one neither."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return value > best.value if aim.highest else value < best.value


class BestStore:
    """The folder ``root``/best. Only one process writes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def folder(self) -> Path:
        return self.root / BEST_FOLDER

    @contextmanager
    def write(self, best: Best) -> Iterator[Path]:
        """Yields a folder to write the model into; it takes the place of the old best when the block ends well."""
        self._mend()
        new, old = self.root / _NEW, self.root / _OLD
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            yield new
            flush_tree(new)
            (new / BEST_RECORD).write_text(json.dumps(best.to_json(), indent=1), encoding="utf-8")
            flush_tree(new)
            if self.folder.exists():
                self.folder.rename(old)
            new.rename(self.folder)
            shutil.rmtree(old, ignore_errors=True)
        except Exception as error:
            if not isinstance(error, OSError) and not disk_reason(error):
                raise
            shutil.rmtree(new, ignore_errors=True)
            raise CheckpointError(
                f"The best model cannot be written to {self.folder} ({disk_reason(error) or error}): {advice(error)}, and go "
                "on with --load_checkpoint."
            ) from error

    def read(self) -> Best | None:
        """The record of the model that is there; None where there is none."""
        self._mend()
        path = self.folder / BEST_RECORD
        if not path.is_file():
            return None
        try:
            return Best.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): remove its folder {self.folder}.") from error

    def resumed(self, aim: Aim, saved: Mapping[str, Any] | None) -> Best | None:
        """What to go on from: the better of a checkpoint's record and of that in the folder, which may be newer.

        Raises CheckpointError when they are about another metric.
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
        """Finish what a killed process had begun between two renames: a folder with a record is complete."""
        if not self.folder.exists():
            for name in (_NEW, _OLD):
                if (self.root / name / BEST_RECORD).is_file():
                    (self.root / name).rename(self.folder)
                    break
        shutil.rmtree(self.root / _OLD, ignore_errors=True)


def _said(aim: Aim) -> str:
    return f"the {'highest' if aim.highest else 'lowest'} {aim.metric}"
