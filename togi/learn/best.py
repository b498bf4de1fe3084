"""The best model so far by a named metric, in plain Hugging Face format, in a folder that a crash cannot spoil.

A new best is written aside, and the old one is removed only when the new one is in its place. Beside the model lies a
record of the value and the step. The same record belongs into every checkpoint's state: after a resume from any of them
a worse evaluation cannot replace a better model. Not here: checkpoints, whose pruning never touches this folder.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from togi.errors import CheckpointError
from togi.learn.checkpoint import flush_tree
from togi.obs.way_out import advice, disk_reason

FOLDER = "best"
RECORD = "best.json"
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
        return self.root / FOLDER

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
            (new / RECORD).write_text(json.dumps(best.to_json(), indent=1), encoding="utf-8")
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
        path = self.folder / RECORD
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
                    f"{self.root} keeps the best model by {_words(found.aim)}, this run asks for {_words(aim)}: go on with "
                    "the same --best_metric_key and --best_metric_mode, or choose another --ckpt_path."
                )
            if better(aim, found.value, best):
                best = found
        return best

    def _mend(self) -> None:
        """Finish what a killed process had begun between two renames: a folder with a record is complete."""
        if not self.folder.exists():
            for name in (_NEW, _OLD):
                if (self.root / name / RECORD).is_file():
                    (self.root / name).rename(self.folder)
                    break
        shutil.rmtree(self.root / _OLD, ignore_errors=True)


def _words(aim: Aim) -> str:
    return f"the {'highest' if aim.highest else 'lowest'} {aim.metric}"
