"""The ledger of a run: what became of every prompt, and the finished groups that no checkpoint has learnt from yet.

``ledger.jsonl`` in the run folder is a log: a line for each change, only ever appended. What a run resumes from is not the log but
the position in its checkpoint (``Pump.state``), which is of the same moment as the weights beside it: prompts that were not
trained then are admitted again, in the same order. So a kill at any instant loses no prompt and trains none twice. ``ledger/``
keeps each finished group until a checkpoint has learnt from it, so that a resumed run need not generate it again.

A stored group is used only if weights of this history sampled all of its tokens. Weights after the checkpoint are lost, and
what they sampled is generated again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

from togi.errors import DataError
from togi.obs.rollout_store import RolloutStore, Split
from togi.obs.run_dir import RunDirectory
from togi.obs.way_out import tolerated, writing
from togi.pump.experience import ScoredGroup, group_of, rows

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

    ``origin``: a text of all settings that the groups depend on; stored groups of another origin are not used. ``stores`` False:
    the run writes no checkpoints, so that nothing could be resumed.
    """

    def __init__(self, directory: RunDirectory, *, origin: str, stores: bool) -> None:
        self._path, self._stores = directory.ledger_path, stores
        self._folder = directory.ledger_groups
        self._store = RolloutStore(self._folder / hashlib.blake2b(origin.encode(), digest_size=8).hexdigest())
        self._newest = -1
        """The newest version whose groups may be used again; -1 before ``resume``."""

    def write(self, event: Event, prompts: Iterable[int] = (), **facts: object) -> None:
        """Append a line about the prompts of these numbers. Raises WriteError."""
        line = {"time": round(time.time(), 3), "event": event, "prompts": list(prompts), **facts}
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def resume(self, version: int) -> None:
        """Go on from the checkpoint of ``version``, or from the start: what these and older weights sampled may be used again."""
        if self._path.is_file():
            with self._path.open("ab+") as file:
                file.seek(-min(1, file.tell()), os.SEEK_CUR)
                if file.read(1) not in (b"", b"\n"):
                    file.write(b"\n")  # a kill in the middle of a line
        self.write(Event.RESUMED, version=version)
        self._newest = version

    def keep(self, number: int, group: ScoredGroup) -> None:
        """Store a finished group until ``forget``. A run goes on without: after a kill the group is generated again."""
        try:
            if self._stores:
                self._store.write(number, Split.TRAIN, rows([group]))
        except DataError as error:
            logger.warning("finished responses are not kept for a resume: %s", error)
            self._stores = False

    def kept(self, number: int, prompt_id: str) -> ScoredGroup | None:
        """The stored group of a prompt, if it was finished before a kill by weights that still count."""
        if self._newest < 0 or not self._store.path(number, Split.TRAIN).is_file():
            return None
        try:
            group = group_of(self._store.read_step(number))
        except DataError as error:
            logger.warning("a finished group is generated again: %s", error)
            return None
        is_of_prompt = group.rollouts[0].prompt.id == prompt_id
        newest = max(rollout.policy_version for rollout in group.rollouts)
        return group if is_of_prompt and newest <= self._newest else None

    def stored(self) -> list[int]:
        """The numbers of the prompts whose groups are stored."""
        return self._store.steps()

    def clear(self) -> None:
        """Remove all stored groups: the run is at its end."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def forget(self, numbers: Iterable[int]) -> None:
        """Remove stored groups."""
        for number in numbers:
            with tolerated("removing a stored group"):
                self._store.path(number, Split.TRAIN).unlink(missing_ok=True)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a ledger. One that a kill has cut is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        with tolerated(f"reading a line of {path}"):
            yield json.loads(line)


def balance(lines: Iterable[dict[str, Any]]) -> dict[int, Event]:
    """The state of every prompt at the end of a ledger, by its number. Raises DataError for a change that cannot be.

    What comes after a checkpoint is undone where the run was resumed from it.
    """
    states: dict[int, Event] = {}
    saved = {0: states.copy()}
    for line in lines:
        event = Event(line["event"])
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
