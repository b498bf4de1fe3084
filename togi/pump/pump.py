"""The pump: it keeps so many prompts in work as the rules of staleness allow, and gives the loop whole scored groups.

``togi.plan.slots`` has the rules, ``ledger`` the record. With a staleness of 0 prompts are admitted only while the loop waits in
``take``, and only those of its own step: the synchronous loop. Otherwise the pump works on while the models train.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from togi.data.prompts import PromptLoader
from togi.errors import RunError
from togi.plan.slots import Round, Rules, Slot, Slots
from togi.pump.experience import ScoredGroup
from togi.pump.feed import MAX_IN_FLIGHT, RolloutFeed
from togi.pump.ledger import Event, Ledger
from togi.reward.scores import ErrorLimit
from togi.sample import Prompt


@dataclass(eq=False, slots=True)
class _Work:
    """A prompt in work. ``task``: what works on it, none right after a resume. ``group``: once it is scored."""

    slot: Slot
    prompt: Prompt
    task: asyncio.Task[None] | None = None
    group: ScoredGroup | None = None


class Pump:
    """A ``Feed`` that generates. ``samples``: of a group. ``steps``: of the whole run, at most. Call ``close`` at the end.

    No wait is without end: ``take`` waits only while a group is at work, and each group that ends wakes it. When none is at work
    and no prompt may be admitted, it returns what is left, even if that is nothing.
    """

    def __init__(
        self, source: RolloutFeed, loader: PromptLoader, rules: Rules, samples: int, steps: int, ledger: Ledger
    ) -> None:
        self._source, self._loader, self._rules, self._ledger = source, loader, rules, ledger
        self._samples, self._steps = samples, steps
        self._slots, self._work = Slots(rules), dict[int, _Work]()
        self._limits: dict[int, ErrorLimit] = {}  # of each round
        self._free = asyncio.Semaphore(max(1, MAX_IN_FLIGHT // samples))
        # Prompts are admitted while this is open. A loop that waits for groups waits for a change.
        self._is_open, self._changed = False, asyncio.Event()
        self._failure: BaseException | None = None
        self._filtered: dict[int, ScoredGroup] = {}  # not reported to the loop yet
        self._dropped = 0
        # Groups that no checkpoint has learnt from yet: those before the last ``state``, and those since.
        self._saving: list[int] = []
        self._learnt: list[int] = []
        self._occupied, self._since = np.zeros(2), time.perf_counter()
        self.offered = [0, 0]
        """Tokens and responses that were ready to be trained on, since the start."""

    @property
    def episode(self) -> int:
        """The pass over the prompts that the next groups belong to, from 0."""
        return min((work.slot.episode for work in self._work.values()), default=self._loader.episode)

    @property
    def is_empty(self) -> bool:
        """Whether no group is left to take."""
        return self._is_idle and not self._filtered

    async def take(self, step: int) -> list[ScoredGroup]:
        """The groups of the next rollout in the order of their admission, with those that were filtered out meanwhile.

        None at all if everything that was left has been dropped as too old.
        Raises RewardError if more rewards fail than allowed, ConfigError if filtering keeps too few groups, and whatever else
        ended the work on a prompt.
        """
        episode, resumed = self.episode, [work for work in self._work.values() if work.task is None]
        self._is_open = True
        self._begin(resumed)
        while (taken := self._next(episode)) is None:
            self._changed.clear()
            await self._changed.wait()
        self._is_open = self._rules.staleness > 0
        groups = {slot.number: self._work.pop(slot.number).group for slot in taken} | self._filtered
        self._filtered = {}
        self._ledger.write(Event.TRAINED, [slot.number for slot in taken], step=step, version=self._slots.version)
        self._learnt += groups
        return [group for _, group in sorted(groups.items()) if group is not None]

    def published(self, version: int) -> None:
        """The weights that learnt from all groups taken so far are in the engines: the next prompts may come."""
        self._count_time()
        self._slots.published(version)
        self._ledger.write(Event.PUBLISHED, version=version)
        self._admit()

    def measures(self) -> tuple[float, int]:
        """Since the last call: the mean share of the slots in use, and the groups dropped as too old."""
        self._count_time()
        (used, seconds), dropped = self._occupied, self._dropped
        self._occupied, self._dropped = np.zeros(2), 0
        return float(used / max(seconds, 1e-9)), dropped

    def state(self) -> dict[str, Any]:
        """The position, as JSON: it belongs to a checkpoint of the weights that learnt from all groups taken so far."""
        self._ledger.write(Event.CHECKPOINT, version=self._slots.version)
        self._saving, self._learnt = self._saving + self._learnt, []
        prompts = {str(number): work.prompt.id for number, work in self._work.items()}
        filtered = {str(number): group.rollouts[0].prompt.id for number, group in self._filtered.items()}
        return {
            "staleness": self._rules.staleness,
            "max_lag": self._rules.max_lag,
            "next": self._slots.next_number,
            "slots": [asdict(slot) for slot in self._slots.outstanding],
            "rounds": [asdict(each) for each in self._slots.rounds],
            "prompts": prompts,
            "filtered": filtered,
        }

    def saved(self) -> None:
        """A checkpoint with the last ``state`` is complete."""
        self._ledger.forget(self._saving)
        self._saving = []

    def end(self) -> None:
        """The run has trained on all that it was to: nothing is kept for a resume."""
        self._ledger.clear()

    def resume(self, version: int, state: Mapping[str, Any] | None) -> None:
        """Go on from ``state`` of the checkpoint of ``version``; the loader is at its position already.

        ``state`` None: the loader's position is all that is known, as in the checkpoint of a replay.
        """
        self._ledger.resume(version)
        prompts, batch = self._loader.prompts, self._rules.batch
        if state is None:
            rounds = [asdict(Round(version, 0, batch, batch))] if version > 0 else []
            state = {"next": version * batch, "slots": [], "rounds": rounds, "prompts": {}, "filtered": {}}
        slots = [Slot(**each | {"is_ready": False}) for each in state["slots"]]
        known = [Round(**each) for each in state["rounds"]]
        self._slots = Slots(self._rules, version=version, slots=slots, next_number=state["next"], rounds=known)
        # The rewards that may fail are a share of all of a round, of which a part is trained.
        for each in known:
            trained = each.admitted - sum(slot.round == each.number for slot in slots)
            self._limits[each.number] = ErrorLimit(self._source.max_errors, trained * self._samples)
        self._work = {slot.number: _Work(slot, prompts[state["prompts"][str(slot.number)]]) for slot in slots}
        # What was filtered out and not yet reported is a row less if it is not stored any more.
        filtered = {int(n): self._ledger.kept(int(n), prompts[prompt]) for n, prompt in state["filtered"].items()}
        self._filtered = {number: group for number, group in filtered.items() if group is not None}
        # What a checkpoint has learnt from and a kill has left.
        self._saving = [n for n in self._ledger.stored() if n < state["next"] and n not in self._work | self._filtered]
        self.saved()

    async def close(self) -> None:
        """End all work. What is not trained yet stays in the ledger."""
        self._is_open = False
        tasks = [work.task for work in self._work.values() if work.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _next(self, episode: int) -> list[Slot] | None:
        """The slots of the next rollout; None while it is not complete, and then a group is at work."""
        if self._failure is not None:
            raise self._failure
        for slot in self._slots.drop():
            self._left(slot, Event.ABANDONED)
            self._learnt.append(slot.number)
            self._dropped += 1
        self._admit(None if self._rules.staleness > 0 else episode)
        if not self._work:
            self._slots.skip()  # a rollout without a group to train on
            return []
        # If all groups are ready, no prompt can come any more, not even of the loader's episode.
        are_ready = all(work.slot.is_ready for work in self._work.values())
        taken = self._slots.take(exhausted=self._loader.episode + are_ready)
        assert taken is not None or not are_ready, "a wait without end"
        return taken

    @property
    def _is_idle(self) -> bool:
        """Whether every prompt has left its slot and none is to come."""
        return not self._work and self._loader.remaining <= 0

    def _admit(self, only: int | None = None) -> None:
        """Take prompts into work while slots are free. ``only``: of this episode. Raises ConfigError of the filter."""
        admitted, filtering = list[_Work](), self._source.filtering
        while self._is_open and self._loader.remaining > 0:
            episode = self._loader.episode
            if only not in (None, episode) or not self._slots.may_admit(episode, self._steps):
                break
            own = self._slots.round_of_next(episode)
            if filtering is not None:
                kept = sum(work.slot.round == own.number and work.slot.is_ready for work in self._work.values())
                filtering.check_budget(own.admitted, kept, self._rules.batch)
            slot = self._slots.admit(episode)
            work = self._work[slot.number] = _Work(slot, self._loader.take(1)[0])
            admitted.append(work)
        self._begin(admitted)

    def _begin(self, works: Sequence[_Work]) -> None:
        """Start the work on prompts that have been admitted."""
        if not works:
            return
        self._count_time()
        shown = [(work.slot.number, work.prompt.id, work.slot.round) for work in works]
        numbers, prompts, rounds = zip(*shown, strict=True)
        self._ledger.write(Event.QUEUED, numbers, ids=prompts, rounds=rounds, version=self._slots.version)
        for work in works:
            limit = self._limits.setdefault(work.slot.round, ErrorLimit(self._source.max_errors, 0))
            limit.total += self._samples
            work.task = asyncio.create_task(self._run(work, limit))
            work.task.add_done_callback(self._ended)

    async def _run(self, work: _Work, limit: ErrorLimit) -> None:
        """Generate and score a group, unless it is stored, and find it its place."""
        slot, number, source = work.slot, work.slot.number, self._source
        facts: dict[str, object] = {"stored": True}
        group = self._ledger.kept(number, work.prompt)
        # A prompt that comes later than before the kill has a slot that is younger than the stored group.
        if group is None or _versions(group, slot.oldest)[0] < slot.oldest:
            async with self._free:
                self._ledger.write(Event.RUNNING, [number])
                name = f"step{slot.round}/{slot.place}/{work.prompt.id}"
                rollouts = await source.generated(work.prompt, name, self._samples)
                facts = {"generated": round(time.time(), 3)}
            group = await source.scored(rollouts, limit)
            # The group first, then the line that says so.
            self._ledger.keep(number, work.prompt, group)
        versions, lengths = _versions(group, slot.oldest), [len(rollout.versions) for rollout in group.rollouts]
        facts |= {"versions": versions, "lengths": lengths}
        if group.filtered:
            self._slots.filtered(slot)
            self._left(slot, Event.FILTERED, **facts)
            self._filtered[number] = group
            self._admit(None if self._rules.staleness > 0 else slot.episode)
        else:
            self._ledger.write(Event.DONE, [number], **facts)
            self._slots.ready(slot, versions[0])
            work.group = group
            self.offered[0] += sum(lengths)
            self.offered[1] += len(lengths)
        self._changed.set()

    def _left(self, slot: Slot, event: Event, **facts: object) -> None:
        """A prompt that is not trained on has left its slot."""
        self._ledger.write(event, [slot.number], **facts)
        del self._work[slot.number]

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = RunError("The work on a prompt was cancelled.") if task.cancelled() else task.exception()
        if error is not None:
            self._failure = self._failure or error
            self._changed.set()

    def _count_time(self) -> None:
        """Add the time since the last change to what the slots were used."""
        now = time.perf_counter()
        whole = (self._rules.staleness + 1) * self._rules.batch
        self._occupied += np.array([len(self._slots) / whole, 1.0]) * (now - self._since)
        self._since = now


def _versions(group: ScoredGroup, default: int) -> list[int]:
    """The oldest and the newest version that sampled a token of a group. ``default``: if there is no such token."""
    pairs = (pair for each in group.rollouts for pair in zip(each.versions, each.response_mask, strict=True))
    versions = [version for version, is_sampled in pairs if is_sampled] or [default]
    return [min(versions), max(versions)]
