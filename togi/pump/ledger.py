"""The ledger of a run: what became of every prompt, and the finished groups that no checkpoint has learnt from yet.

``ledger.jsonl`` in the run folder is a log: a line for each change, only ever appended. What a run resumes from is not the log but
the position in its checkpoint (``Pump.state``), which is of the same moment as the weights beside it: prompts that were not
trained then are admitted again, in the same order. So a kill at any instant loses no prompt and trains none twice. ``ledger/``
keeps each finished group until a checkpoint has learnt from it, so that a resumed run need not generate it again.

A stored group is used only if weights of this history sampled all of its tokens, with the present settings, for the prompt as it
is now. Weights after the checkpoint are lost: what they sampled is removed at the resume, since later weights will have their
numbers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

from togi.errors import DataError
from togi.obs.rollout_store import RolloutFile, RolloutStore, Split
from togi.obs.run_dir import RunDirectory
from togi.obs.way_out import tolerated, writing
from togi.pump.experience import ScoredGroup, group_of, rows
from togi.sample import Prompt

logger = logging.getLogger(__name__)


class Event(StrEnum):
    """What a line tells. The first six are the states of a prompt, the others are about the run."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    TRAINED = "trained"
    FILTERED = "filtered"
    ABANDONED = "abandoned"
    PUBLISHED = "published"
    CHECKPOINT = "checkpoint"
    RESUMED = "resumed"


# What each state of a prompt may become. A stored group is done without having run.
MAY_BECOME: dict[Event | None, frozenset[Event]] = {
    None: frozenset({Event.QUEUED}),
    Event.QUEUED: frozenset({Event.RUNNING, Event.DONE, Event.FILTERED}),
    Event.RUNNING: frozenset({Event.DONE, Event.FILTERED}),
    Event.DONE: frozenset({Event.TRAINED, Event.ABANDONED}),
}
STATES = frozenset({Event.QUEUED, Event.RUNNING, Event.DONE, Event.TRAINED, Event.FILTERED, Event.ABANDONED})


class Ledger:
    """The writer. Prompts are known by their numbers: the n-th that the run has taken from its prompts.

    ``origin``: a text of all settings that the groups depend on. The folder of a stored group is named by a digest of it and of
    all that the prompt has, so that no group of other settings, another label or another row is found. ``stores`` False: the run
    writes no checkpoints, so that nothing could be resumed.
    """

    def __init__(self, directory: RunDirectory, *, origin: str, stores: bool) -> None:
        self._path, self._folder = directory.ledger_path, directory.ledger_groups
        self._origin, self._stores = origin, stores
        self._files: dict[int, Path] = {}
        """Of the stored groups of this history, by number; those that an earlier life left are known after ``resume``."""

    def write(self, event: Event, prompts: Iterable[int] = (), **facts: object) -> None:
        """Append a line about the prompts of these numbers. Raises WriteError."""
        line = {"time": round(time.time(), 3), "event": event, "prompts": list(prompts), **facts}
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def resume(self, version: int) -> None:
        """Go on from the checkpoint of ``version``, or from the start: what these and older weights sampled may be used again.

        All else is removed: also what was stored before a run went on in another folder. Raises WriteError if it cannot be.
        """
        is_known = version == 0
        if self._path.is_file():
            with self._path.open("ab+") as log:
                log.seek(-min(1, log.tell()), os.SEEK_CUR)
                if log.read(1) not in (b"", b"\n"):
                    log.write(b"\n")  # a kill in the middle of a line
            checkpoints = (line for line in read(self._path) if line.get("event") == Event.CHECKPOINT)
            is_known |= any(line["version"] == version for line in checkpoints)
        self.write(Event.RESUMED, version=version)
        self._files = {}
        for store in map(RolloutStore, self._folder.glob("*")):
            for file in store.files():
                if is_known and _newest(store, file) <= version:
                    self._files[file.step] = file.path
                else:
                    with writing(file.path):
                        _remove(file.path)

    def keep(self, number: int, prompt: Prompt, group: ScoredGroup) -> None:
        """Store a finished group until ``forget``. A run goes on without: after a kill the group is generated again."""
        if not self._stores:
            return
        store = self._store(prompt)
        if self._files.get(number) != store.path(number, Split.TRAIN):
            self.forget([number])
        try:
            store.write(number, Split.TRAIN, rows([group]))
            self._files[number] = store.path(number, Split.TRAIN)
        except DataError as error:
            logger.warning("finished responses are not kept for a resume: %s", error)
            self._stores = False

    def kept(self, number: int, prompt: Prompt) -> ScoredGroup | None:
        """The stored group of a prompt, if it was finished before a kill by weights that still count."""
        store = self._store(prompt)
        if self._files.get(number) != store.path(number, Split.TRAIN):
            return None
        try:
            return group_of(store.read_step(number))
        except DataError as error:
            logger.warning("a finished group is generated again: %s", error)
            return None

    def stored(self) -> list[int]:
        """The numbers of the prompts whose groups are stored."""
        return sorted(self._files)

    def clear(self) -> None:
        """Remove all stored groups: the run is at its end."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._files = {}

    def forget(self, numbers: Iterable[int]) -> None:
        """Remove stored groups."""
        for path in (self._files.pop(number) for number in numbers if number in self._files):
            with tolerated("removing a stored group"):
                _remove(path)

    def _store(self, prompt: Prompt) -> RolloutStore:
        digest = hashlib.blake2b(repr((self._origin, prompt)).encode("utf-8", "surrogatepass"), digest_size=16)
        return RolloutStore(self._folder / digest.hexdigest())


def _newest(store: RolloutStore, file: RolloutFile) -> float:
    """The newest version that sampled a token of a stored group; newer than all if that cannot be read."""
    try:
        return max(int(row["policy_version"]) for row in store.read_columns(file, ["policy_version"]))
    except DataError as error:
        logger.warning("a finished group is generated again: %s", error)
        return math.inf


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    with suppress(OSError):  # other numbers of the prompt, in other episodes
        path.parent.rmdir()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a ledger. One that a kill has cut is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        with tolerated(f"reading a line of {path}"):
            yield json.loads(line)


def balance(lines: Iterable[dict[str, Any]]) -> dict[int, Event]:
    """The state of every prompt at the end of a ledger, by its number. Raises DataError for a change that cannot be.

    What comes after a checkpoint is undone where the run was resumed from it. A ledger that begins with a resume is of a run that
    goes on from another folder: of the prompts that it trained there nothing is known.
    """
    states: dict[int, Event] = {}
    saved = {0: states.copy()}
    for place, line in enumerate(lines):
        event = Event(line["event"])
        if event is Event.RESUMED and place == 0:
            saved[line["version"]] = {}
        if event is Event.CHECKPOINT:
            # in work means queued again, if the run is resumed from here
            saved[line["version"]] = states.copy()
        elif event is Event.RESUMED:
            if line["version"] not in saved:
                raise DataError(
                    f"The ledger does not have the checkpoint of version {line['version']} that it goes on from."
                )
            in_work = {Event.QUEUED, Event.RUNNING, Event.DONE}
            states = {number: state for number, state in saved[line["version"]].items() if state not in in_work}
        for number in line["prompts"] if event in STATES else ():
            before = states.get(number)
            if event not in MAY_BECOME.get(before, frozenset()):
                raise DataError(f"The ledger has prompt {number} {event} after it was {before or 'not known'}.")
            states[number] = event
    return states
