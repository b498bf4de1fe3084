"""What an iteration has done: one file in its folder, rewritten after every step.

A step that is in the file is never done again; one that is not starts or goes on, which its own command knows how to do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from togi.errors import CheckpointError
from togi.obs.run_dir import write_atomically

STATE = "iterate.json"
SUMMARY = "summary.json"
Facts = dict[str, Any]


class IterateState:
    """``identity``: settings by flag, as text, that every step depends on."""

    def __init__(self, root: Path, identity: Mapping[str, str]) -> None:
        self.root = root
        self._identity = dict(identity)
        self._done: dict[str, Facts] = {}

    def open(self) -> int:
        """Make the folder, or read what was done there: the number of finished steps.

        Raises CheckpointError if it was done with other settings.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        file = self.root / STATE
        if not file.is_file():
            if any(self.root.iterdir()):
                raise CheckpointError(
                    f"--run_dir {self.root} is not empty and holds no iteration: choose another folder."
                )
            self._write()
            return 0
        record = json.loads(file.read_text(encoding="utf-8"))
        before = record["identity"]
        different = [name for name in {**before, **self._identity} if before.get(name) != self._identity.get(name)]
        if different:
            changes = "; ".join(f"{name} was {before.get(name)}, is {self._identity.get(name)}" for name in different)
            raise CheckpointError(
                f"--run_dir {self.root} holds an iteration with other settings ({changes}): go on with the same, or choose "
                "another folder."
            )
        self._done = record["done"]
        return len(self._done)

    def once(self, round_number: int, step: str, work: Callable[[], Facts]) -> Facts:
        """The facts of a step: those of the past, or of ``work`` done now."""
        name = f"round {round_number}: {step}"
        if name not in self._done:
            self._done[name] = work()
            self._write()
        return self._done[name]

    def summarize(self, rounds: list[Facts]) -> Path:
        """Write what every round came to, for people and programs."""
        path = self.root / SUMMARY
        write_atomically(path, json.dumps({"rounds": rounds}, indent=2, ensure_ascii=False) + "\n")
        return path

    def _write(self) -> None:
        record = {"identity": self._identity, "done": self._done}
        write_atomically(self.root / STATE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
