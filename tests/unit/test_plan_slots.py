"""The scheduling rules of asynchronous RL under random schedules, against a world that keeps its own books."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count, groupby, islice, pairwise

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from togi.config.choices import OnStale
from togi.errors import ConfigError
from togi.plan.slots import Round, Rules, Slot, Slots

FATES = ("trained", "filtered", "abandoned")


def rules(batch: int, staleness: int, on_stale: OnStale = OnStale.MASK, max_lag: int = 9) -> Rules:
    return Rules(batch, staleness, on_stale, max_lag)


@dataclass(frozen=True)
class Job:
    """``episodes``: for each prompt of each episode what becomes of its group. ``moves``: the choices of the schedule, again and
    again. ``slow``: whether a group, by its number, again and again, ends only when nothing else can go on. ``publishes_late``:
    so many batches may be trained and not published."""

    rules: Rules
    episodes: tuple[tuple[str, ...], ...]
    moves: tuple[int, ...]
    slow: tuple[bool, ...] = (False,)
    publishes_late: int = 1
    restarts: int = 0


def modes(*allowed: OnStale) -> st.SearchStrategy[Rules]:
    return st.builds(
        lambda batch, staleness, mode, more: Rules(batch, staleness, mode, staleness + more),
        st.integers(1, 4),
        st.integers(0, 3),
        st.sampled_from(allowed),
        st.integers(0, 2),
    )


def jobs(of: st.SearchStrategy[Rules]) -> st.SearchStrategy[Job]:
    # a third of the groups of an episode is lost, or none
    fate = st.sampled_from((FATES[0], FATES[0], FATES[0], FATES[0], FATES[1], FATES[2]))
    episode = st.lists(fate, min_size=1, max_size=16).map(tuple) | st.integers(1, 16).map(lambda n: FATES[:1] * n)
    return st.builds(
        Job,
        of,
        st.lists(episode, min_size=1, max_size=3).map(tuple),
        st.lists(st.integers(0, 59), min_size=1, max_size=60).map(tuple),
        st.lists(st.sampled_from((True, False, False)), min_size=1, max_size=9).map(tuple),
        st.integers(1, 2),
        st.integers(0, 3),
    )


@dataclass
class World:
    """Runs a job to its end, with books of its own, and checks each move of ``Slots`` against them.

    The fields from ``running`` on are these books: ``taken`` batches are not published yet, ``ended`` counts how often each prompt
    was trained, filtered or abandoned, ``episode`` and ``position`` are those of the next prompt.
    """

    job: Job
    slots: Slots = field(init=False)
    running: list[Slot] = field(default_factory=list)
    ready: list[Slot] = field(default_factory=list)
    taken: list[list[Slot]] = field(default_factory=list)
    batches: list[list[Slot]] = field(default_factory=list)
    admitted: list[Slot] = field(default_factory=list)
    ended: Counter[int] = field(default_factory=Counter)
    dropped: set[int] = field(default_factory=set)
    episode: int = 0
    position: int = 0
    version: int = 0
    waits: int = 0
    restarts: int = 0

    def __post_init__(self) -> None:
        self.slots = Slots(self.job.rules)

    @property
    def trained(self) -> int:
        """The number of updates so far: the trained version of the next batch."""
        return len(self.batches)

    def run(self) -> World:
        """A move that nobody can make any more, while prompts are left, is a deadlock."""
        for number in count():
            assert number < 100 * (1 + sum(map(len, self.job.episodes))), "no end"
            if self.is_finished:
                return self
            moves = list(self.moves()) or [("end_group", place) for place in range(len(self.running))]
            assert moves, "a deadlock"
            name, place = moves[self.job.moves[number % len(self.job.moves)] % len(moves)]
            getattr(self, name)(place)
            self.check_books()
        raise AssertionError

    @property
    def is_finished(self) -> bool:
        return self.episode == len(self.job.episodes) and not self.running and not self.ready and not self.taken

    def moves(self) -> Iterator[tuple[str, int]]:
        """What can be done now. ``take`` is among it only if it gives something, so the trainer may wait as long as it likes."""
        if self.episode < len(self.job.episodes) and self.slots.may_admit(self.episode):
            yield "admit", 0
        yield from (("end_group", place) for place in range(len(self.running)) if not self.is_slow(place))
        if self.taken:
            yield "publish", 0
        if len(self.taken) < self.job.publishes_late and self.can_take():
            yield "take", 0
        if self.restarts < self.job.restarts:
            yield "restart", 0

    def is_slow(self, place: int) -> bool:
        return self.job.slow[self.running[place].number % len(self.job.slow)]

    def can_take(self) -> bool:
        twin = restored(self.slots, self.trained)
        dropped = twin.drop()
        batch = twin.take(exhausted=self.episode)
        if self.job.rules.on_stale is OnStale.WAIT:
            self.check_wait(batch)
        return batch is not None or bool(dropped)

    def check_wait(self, batch: list[Slot] | None) -> None:
        """A batch that is held back would make some group late even if every other group were ready from now on."""
        plain = Slots(replace(self.job.rules, on_stale=OnStale.MASK), version=self.trained, slots=copies(self.slots))
        possible = plain.take(exhausted=self.episode)
        if batch is not None or possible is None:
            return
        self.waits += 1
        for slot in plain.outstanding:
            slot.is_ready = True
        late = False
        while plain.outstanding:
            rest = plain.take(exhausted=99)
            late |= any(slot.trained - slot.oldest > self.job.rules.max_lag for slot in rest)
        assert late

    def admit(self, _: int) -> None:
        slot = self.slots.admit(self.episode)
        assert (slot.number, slot.episode, slot.oldest) == (len(self.admitted), self.episode, self.version)
        self.running.append(slot)
        self.admitted.append(slot)
        self.position += 1
        if self.position == len(self.job.episodes[self.episode]):
            self.episode, self.position = self.episode + 1, 0

    def fate(self, slot: Slot) -> str:
        return self.job.episodes[slot.episode][slot.number - sum(map(len, self.job.episodes[: slot.episode]))]

    def end_group(self, place: int) -> None:
        slot = self.running.pop(place)
        match self.fate(slot):
            case "trained":
                # its first token came at its admission, or later
                oldest = slot.oldest + slot.number * 7 % 5 * (self.version - slot.oldest) // 4
                self.slots.ready(slot, oldest)
                self.ready.append(slot)
                return
            case "filtered":
                self.slots.filtered(slot)
            case "abandoned":
                self.slots.abandon(slot)
        self.ended[slot.number] += 1

    def take(self, _: int) -> None:
        limit = self.job.rules.max_lag
        for slot in self.slots.drop():
            assert self.job.rules.on_stale is OnStale.DROP and self.trained - slot.oldest > limit
            self.ready.remove(slot)
            self.dropped.add(slot.number)
            self.ended[slot.number] += 1
        batch = self.slots.take(exhausted=self.episode)
        if batch is None:
            return
        self.check_batch(batch)
        for slot in batch:
            assert slot.trained == self.trained
            # every token was sampled by a version from the slot's own up to that which is published now
            lags = [slot.trained - sampled for sampled in range(slot.oldest, self.version + 1)]
            assert self.job.rules.on_stale is OnStale.MASK or max(lags) <= limit
            self.ready.remove(slot)
            self.ended[slot.number] += 1
        self.taken.append(batch)
        self.batches.append(batch)

    def check_batch(self, batch: list[Slot]) -> None:
        """Whole, of the oldest episode there is, and the oldest ready groups of it; short only where the episode ends."""
        at_work = [slot.episode for slot in self.running + self.ready]
        [episode] = {slot.episode for slot in batch}
        assert episode == min(at_work)
        own = sorted((slot for slot in self.ready if slot.episode == episode), key=lambda slot: slot.number)
        assert batch == own[: self.job.rules.batch]
        if len(batch) < self.job.rules.batch:
            assert self.episode > episode and at_work.count(episode) == len(batch)

    def publish(self, _: int) -> None:
        self.taken.pop(0)
        self.version += 1
        self.slots.published(self.version)

    def restart(self, _: int) -> None:
        """A checkpoint, a kill and a resume: what was ready stays so, what ran starts again, what was trained is done."""
        self.restarts += 1
        self.version, self.taken = self.trained, []
        self.slots = restored(self.slots, self.trained)
        new = {slot.number: slot for slot in self.slots.outstanding}
        self.running = [new[slot.number] for slot in self.running]
        self.ready = [new[slot.number] for slot in self.ready]

    def check_books(self) -> None:
        """Slots are conserved, and no more than there is room for."""
        held = self.running + self.ready + [slot for batch in self.taken for slot in batch]
        assert len(self.slots) == len(held)
        assert self.slots.outstanding == sorted(self.running + self.ready, key=lambda slot: slot.number)
        groups = Counter(slot.episode for slot in held)
        room = self.job.rules.staleness + 1
        assert len(self.slots.rounds) <= room * self.job.rules.batch + 1, "old rounds are forgotten"
        assert sum(-(-number // self.job.rules.batch) for number in groups.values()) <= room
        if len(groups) == 1:
            assert len(held) <= room * self.job.rules.batch


def copies(slots: Slots) -> list[Slot]:
    """In any order, as from a file."""
    return [replace(slot) for slot in reversed(slots.outstanding)]


def restored(slots: Slots, version: int) -> Slots:
    """As from a checkpoint of weights with ``version`` updates, all that were made."""
    rounds = [replace(found) for found in slots.rounds]
    return Slots(slots.rules, version=version, slots=copies(slots), next_number=slots.next_number, rounds=rounds)


@settings(max_examples=400, deadline=None)
@given(jobs(modes(*OnStale)))
def test_every_prompt_ends_once_and_no_bound_is_exceeded(job: Job) -> None:
    """``World`` checks each move; here is what holds at the end."""
    world = World(job).run()
    assert len(world.admitted) == sum(map(len, job.episodes))
    assert world.ended == Counter(range(len(world.admitted)))
    assert len(world.slots) == 0
    offered = {slot.number for slot in world.admitted if world.fate(slot) == "trained"}
    trained = Counter(slot.number for batch in world.batches for slot in batch)
    assert trained == Counter(offered - world.dropped)
    if job.rules.on_stale is not OnStale.DROP:
        assert trained == Counter(offered), "trained = offered"
    event(f"waited: {world.waits > 0}; dropped: {bool(world.dropped)}")


@settings(max_examples=400, deadline=None)
@given(jobs(modes(OnStale.WAIT)))
def test_waiting_bounds_the_lag_and_waits_only_where_it_must(job: Job) -> None:
    world = World(job).run()
    lags = [slot.trained - slot.oldest for batch in world.batches for slot in batch]
    assert max(lags, default=0) <= job.rules.max_lag
    event(f"waited: {world.waits > 0}")


@settings(max_examples=200, deadline=None)
@given(jobs(modes(*OnStale)))
def test_rounds_hold_a_step_of_kept_groups_and_never_cross_an_episode(job: Job) -> None:
    world = World(job).run()
    lost = {slot.number for slot in world.admitted if world.fate(slot) != "trained"} | world.dropped
    rounds = [
        list(slots)
        for _, slots in groupby(sorted(world.admitted, key=lambda s: (s.round, s.number)), lambda s: s.round)
    ]
    assert [own[0].round for own in rounds] == list(range(1, len(rounds) + 1))
    for own in rounds:
        assert len({slot.episode for slot in own}) == 1
        assert [slot.place for slot in own] == list(range(len(own)))
        assert sum(slot.number not in lost for slot in own) <= job.rules.batch
    for own, following in pairwise(rounds):
        if own[0].episode == following[0].episode:
            # a round opens when the one before it was full
            assert sum(slot.number < following[0].number for slot in own) >= job.rules.batch
    if not lost:
        sizes = [
            min(job.rules.batch, size - at) for size in map(len, job.episodes) for at in range(0, size, job.rules.batch)
        ]
        assert [len(own) for own in rounds] == sizes


def synchronous(job: Job) -> list[tuple[int, list[tuple[int, int]]]]:
    """The plain loop: (round, [(place, number) of each kept group]) for each step that trains."""
    steps, number, step = [], count(), 0
    for episode in job.episodes:
        fates = iter(episode)
        while tried := list(islice_kept(fates, job.rules.batch)):
            step += 1
            kept = [(place, next(number), fate) for place, fate in enumerate(tried)]
            steps.append((step, [(place, n) for place, n, fate in kept if fate == "trained"]))
    return [(step, kept) for step, kept in steps if kept]


def islice_kept(fates: Iterator[str], wanted: int) -> Iterator[str]:
    """The next prompts, one after the other until ``wanted`` are kept."""
    while wanted:
        for fate in islice(fates, 1):
            wanted -= fate == "trained"
            yield fate
            break
        else:
            return


@settings(max_examples=200, deadline=None)
@given(jobs(st.builds(rules, st.integers(1, 4), st.just(0), st.sampled_from(OnStale), st.integers(0, 2))))
def test_no_staleness_is_the_synchronous_loop(job: Job) -> None:
    """Whatever finishes first: the same steps of the same groups in the same order, of the weights that they train."""
    world = World(job).run()
    found = [(batch[0].round, [(slot.place, slot.number) for slot in batch]) for batch in world.batches]
    assert found == synchronous(job)
    assert all(
        slot.round == batch[0].round and slot.oldest == slot.trained for batch in world.batches for slot in batch
    )


@settings(max_examples=100, deadline=None)
@given(jobs(st.builds(rules, st.integers(1, 4), st.integers(0, 3), st.just(OnStale.WAIT), st.just(99))))
def test_a_bound_that_nothing_reaches_changes_nothing(job: Job) -> None:
    batches = [World(replace(job, rules=replace(job.rules, on_stale=mode))).run().batches for mode in OnStale]
    numbers = [[[slot.number for slot in batch] for batch in found] for found in batches]
    assert numbers[0] == numbers[1] == numbers[2]


def admit(slots: Slots, episode: int = 0) -> list[Slot]:
    """As many as there is room for."""
    found = []
    while slots.may_admit(episode):
        found.append(slots.admit(episode))
    return found


def step(slots: Slots) -> list[int] | None:
    """The numbers of the next batch, trained and published."""
    slots.drop()
    batch = slots.take(exhausted=0)
    if batch is None:
        return None
    slots.published(slots.version + 1)
    return [slot.number for slot in batch]


def test_a_slot_is_released_when_its_weights_are_published_and_not_before() -> None:
    slots = Slots(rules(2, 1))
    first = admit(slots)
    assert [slot.number for slot in first] == [0, 1, 2, 3]
    for slot in (first[3], first[1]):
        slots.ready(slot, slot.oldest)
    assert slots.take(exhausted=0) == [first[1], first[3]]
    assert not slots.may_admit(0)
    slots.published(1)
    later = admit(slots)
    assert [(slot.number, slot.oldest, slot.round) for slot in later] == [(4, 1, 3), (5, 1, 3)]


def test_a_short_last_batch_takes_the_room_of_a_whole_one() -> None:
    """P 4, S 1: one group of episode 0 and four of episode 1 are two batches, though eight slots are not used up."""
    slots = Slots(rules(4, 1))
    last = slots.admit(0)
    later = admit(slots, 1)
    assert [slot.number for slot in later] == [1, 2, 3, 4]
    for slot in later:
        slots.ready(slot, slot.oldest)
    assert slots.take(exhausted=1) is None, "the older episode first"
    slots.ready(last, last.oldest)
    assert slots.take(exhausted=0) is None, "more of it may come"
    assert slots.take(exhausted=1) == [last]


def slow_first_group(mode: OnStale) -> tuple[Slots, list[list[int] | None]]:
    """P 2, S 1, K 2: group 0 takes for ever, all others are ready at once."""
    slots = Slots(rules(2, 1, mode, 2))
    steps = []
    for _ in range(5):
        for slot in admit(slots):
            if slot.number:
                slots.ready(slot, slot.oldest)
        steps.append(step(slots))
    return slots, steps


def test_waiting_holds_a_step_back_for_an_old_group() -> None:
    """Group 0 of version 0 may be in batch 2 at the latest. Batches 0 and 1 can go without it, batch 2 cannot."""
    slots, steps = slow_first_group(OnStale.WAIT)
    assert steps == [[1, 2], [3, 4], None, None, None]
    slots.ready(slots.outstanding[0], slots.outstanding[0].oldest)
    assert step(slots) == [0, 5]


def test_waiting_looks_ahead() -> None:
    """P 1, S 2, K 2: groups 0, 1 and 2 of version 0 must be batches 0, 1 and 2; group 2 can be first, group 3 not second."""
    slots = Slots(rules(1, 2, OnStale.WAIT, 2))
    old = admit(slots)
    slots.ready(old[2], old[2].oldest)
    assert step(slots) == [2]
    slots.ready(slots.admit(0), 1)
    assert step(slots) is None, "groups 0 and 1 need both batches that are left to them"
    slots.ready(old[1], old[1].oldest)
    assert step(slots) == [1]
    assert step(slots) is None
    slots.ready(old[0], old[0].oldest)
    assert step(slots) == [0]
    assert step(slots) == [3]


def test_masking_waits_for_nobody() -> None:
    slots, steps = slow_first_group(OnStale.MASK)
    assert steps == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]
    slots.ready(slots.outstanding[0], slots.outstanding[0].oldest)
    assert step(slots) == [0, 11]


def test_dropping_gives_up_a_group_that_came_too_late() -> None:
    slots, steps = slow_first_group(OnStale.DROP)
    assert steps == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]
    late = slots.outstanding[0]
    slots.ready(late, late.oldest)
    room = len(slots)
    assert slots.drop() == [late] and len(slots) == room - 1
    assert slots.take(exhausted=0) is None
    assert late.round == 1
    # another prompt comes in its place
    assert (slots.admit(0).round, slots.outstanding[0].number) == (1, 11)


def test_dropping_goes_by_the_oldest_token() -> None:
    """K 2, version 5: a group of admission 0 whose first token came at version 3 is young enough for batch 5, one of 2 is not."""
    for oldest, is_kept in ((3, True), (2, False)):
        slots, _ = slow_first_group(OnStale.DROP)
        late = slots.outstanding[0]
        assert (late.oldest, slots.version) == (0, 5)
        slots.ready(late, oldest)
        assert (slots.drop() == []) is is_kept
        assert (late in slots.outstanding) is is_kept


def test_no_group_has_a_token_that_is_older_than_its_slot() -> None:
    """That is what the proof of the bound stands on."""
    with pytest.raises(AssertionError, match="older than its slot"):
        slots = Slots(rules(1, 1), version=1)
        slots.ready(slots.admit(0), 0)


def test_no_more_is_started_than_the_steps_that_are_left_can_train() -> None:
    """P 2, S 2: with one step left two groups, of one episode; a filtered one makes room, for another episode too."""
    slots = Slots(rules(2, 2), version=4)
    first = [slots.admit(0) for _ in range(2) if slots.may_admit(0, steps=5)]
    assert len(first) == 2
    assert not slots.may_admit(0, steps=5) and not slots.may_admit(1, steps=5) and slots.may_admit(0, steps=6)
    slots.filtered(first[0])
    assert slots.may_admit(0, steps=5) and not slots.may_admit(1, steps=5)
    slots.filtered(first[1])
    assert slots.may_admit(1, steps=5)


def test_a_replacement_belongs_to_the_round_that_misses_a_group() -> None:
    slots = Slots(rules(2, 1))
    first = admit(slots)
    assert [(slot.round, slot.place) for slot in first] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    slots.filtered(first[2])
    slots.abandon(first[0])
    assert [(slot.round, slot.place) for slot in admit(slots)] == [(1, 2), (2, 2)]


def test_a_checkpoint_that_cannot_keep_a_smaller_bound_is_refused() -> None:
    slots = Slots(rules(1, 2, OnStale.WAIT, 2))
    admit(slots)
    with pytest.raises(ConfigError, match="--max_token_lag 1: the checkpoint has groups"):
        Slots(rules(1, 1, OnStale.WAIT, 1), slots=copies(slots))
    Slots(rules(1, 1, OnStale.MASK, 1), slots=copies(slots))


def test_rounds_go_on_after_a_restart() -> None:
    """Round 1 still misses a group that was filtered, and places are not given twice."""
    slots = Slots(rules(2, 0))
    first = admit(slots)
    slots.filtered(first[1])
    again = restored(slots, 0)
    assert again.rounds == [Round(1, 0, admitted=2, kept=1)]
    assert [(slot.number, slot.round, slot.place) for slot in admit(again)] == [(2, 1, 2)]
