"""The scheduling rules of asynchronous RL: which prompt may start when, and which groups make the next step.

The pump and its simulator run the same rules; they know no clock and no process. A slot is the room of one prompt's group, from
its admission until the weights trained on it are published, or until the group is filtered or abandoned.

* Version: the number of published updates. The batch that is trained after n updates has the trained version n. The lag of a
  token is the trained version of its batch minus the version that sampled it. No token of a slot is older than the version of
  the slot: that of its admission while the group is at work, and that of the oldest token once it is ready.
* Capacity: with n_e slots of episode e, the sum over episodes of ceil(n_e / P) stays at S + 1 or below, for P groups a step.
  One episode has (S + 1) P slots, and the short last batch of an episode takes the room of a whole one. With S = 0 a step is
  generated, trained and published before the next one starts: the synchronous loop.
* Batch: the P oldest ready groups of the oldest episode with slots; all the rest of it when it is exhausted and none is at work.
* Drop: a ready group with a token that the next batch would train at a lag above K is given up before that batch is taken.
* Wait: let batch v be the next one. A slot of version o must be in batch o + K or earlier. The slots are *due in time* if each
  of them, of version o, and all older ones together fill at most o + K - v + 1 batches. ``take`` gives a batch only if the
  slots that remain are due in time for batch v + 1; else it waits for older groups, as long as these take.

Why waiting keeps every lag at K or below, and always ends, if K >= S:

1. An admission keeps slots due in time. Let b batches be taken and not published, so the new slot has version v - b. These
   and the slots that are not taken fill at most S + 1 batches, so all that are not taken fill at most S + 1 - b <= K - b + 1.
2. ``take`` keeps them so: it checks. Publishing changes neither v nor a slot's version; a group that gets ready may only make its
   version newer, which gives it more time; filtered groups only make room.
3. So a slot of version v - K or older that batch v left behind would have no batch left: ``take`` does not leave it behind, and
   no lag is above K.
4. The wait ends, because every group ends. When all slots are ready the batch holds the oldest of all: it takes one batch off
   every set of oldest slots, as the next number takes one off their limit. So those that remain are due in time.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from togi.config.choices import OnStale
from togi.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rules:
    """``batch``: P, groups a step. ``staleness``: S, steps that generation may be ahead. ``max_lag``: K, in versions, K >= S."""

    batch: int
    staleness: int
    on_stale: OnStale
    max_lag: int

    def __post_init__(self) -> None:
        assert self.batch > 0 and 0 <= self.staleness <= self.max_lag

    @property
    def capacity(self) -> int:
        """The number of slots, (S + 1) P."""
        return (self.staleness + 1) * self.batch

    def batches(self, groups: Iterable[int]) -> int:
        """The batches that so many groups of each episode fill; no batch crosses an episode."""
        return sum(-(-count // self.batch) for count in groups)


@dataclass(eq=False, slots=True)
class Slot:
    """One prompt's group at work.

    ``number``: of the prompt in the order of admission, from 0. ``round``: from 1, of one episode; ``place``: counts the
    admissions of the round from 0, and passes P if groups of it were filtered. ``oldest``: no token is of an older
    version: that of its admission, also when the group is started again after a failure, and that of its oldest token once it is
    ready. ``trained``: the trained version of its batch, None before that.
    """

    number: int
    episode: int
    round: int
    place: int
    oldest: int
    is_ready: bool = False
    trained: int | None = None


@dataclass(slots=True)
class Round:
    """P groups that are admitted together. ``admitted``: all of them; ``kept``: those neither filtered nor abandoned."""

    number: int
    episode: int
    admitted: int = 0
    kept: int = 0


class Slots:
    """All slots. A checkpoint keeps ``outstanding``, ``next_number`` and ``rounds``, which make the same slots again.

    Its ``version`` is the number of updates of the weights that it holds.
    """

    def __init__(
        self,
        rules: Rules,
        *,
        version: int = 0,
        slots: Iterable[Slot] = (),
        next_number: int = 0,
        rounds: Iterable[Round] = (),
    ) -> None:
        """Raises ConfigError if a checkpoint's slots cannot keep the bound of ``wait``: it was made with a larger one."""
        self.rules = rules
        self.version = version
        self.next_number = next_number
        self.rounds = list(rounds)
        self._next_trained = version
        self._slots = {slot.number: slot for slot in sorted(slots, key=lambda slot: slot.number)}
        self._groups = Counter(slot.episode for slot in self._slots.values())
        if rules.on_stale is OnStale.WAIT and not self._due_in_time(self.outstanding, version):
            raise ConfigError(
                f"--max_token_lag {rules.max_lag}: the checkpoint has groups at work that cannot all be trained within this lag. "
                "Resume with its --max_staleness, --max_token_lag and --rollout_batch_size, or with --on_stale mask."
            )

    @property
    def outstanding(self) -> list[Slot]:
        """The slots that no batch has taken yet, oldest first."""
        return [slot for slot in self._slots.values() if slot.trained is None]

    def __len__(self) -> int:
        """The number of slots that are not released."""
        return len(self._slots)

    def may_admit(self, episode: int, steps: float = math.inf) -> bool:
        """Whether a prompt of ``episode`` may start now. ``steps``: of the whole run; no more than these will train is started."""
        groups = {**self._groups, episode: self._groups[episode] + 1}
        return self.rules.batches(groups.values()) <= min(self.rules.staleness + 1, steps - self.version)

    def admit(self, episode: int) -> Slot:
        """The slot of the next prompt, which is of ``episode``. Episodes come in order.

        It replaces a group that was filtered or abandoned, in the oldest round that misses one; else the next round opens.
        """
        assert self.may_admit(episode), "no room"
        assert not self.rounds or self.rounds[-1].episode <= episode, "an earlier episode has ended"
        now = self.round_of_next(episode)
        if now.admitted == 0:
            self.rounds = [*(r for r in self.rounds if self._is_at_work(r)), now]
        slot = Slot(self.next_number, episode, now.number, now.admitted, self.version)
        now.admitted += 1
        now.kept += 1
        self.next_number += 1
        self._slots[slot.number] = slot
        self._groups[episode] += 1
        return slot

    def round_of_next(self, episode: int) -> Round:
        """The round that the next prompt of ``episode`` will join: the oldest one that misses a group, else a new one."""
        missing = (r for r in self.rounds if r.episode == episode and r.kept < self.rules.batch)
        return next(missing, Round(self.rounds[-1].number + 1 if self.rounds else 1, episode))

    def ready(self, slot: Slot, oldest: int) -> None:
        """The group is generated and scored. ``oldest``: the version that sampled its oldest token."""
        assert slot.number in self._slots and not slot.is_ready
        assert oldest >= slot.oldest, "older than its slot"
        slot.is_ready, slot.oldest = True, oldest

    def filtered(self, slot: Slot) -> None:
        """The group is not trained: dynamic filtering. Another prompt may come in its place."""
        self._give_up(slot)

    def abandon(self, slot: Slot) -> None:
        """The group is not trained: it failed for good. Another prompt may come in its place."""
        self._give_up(slot)

    def drop(self) -> list[Slot]:
        """Give up the ready groups that are too old for the next step. Other prompts may come in their place before ``take``."""
        limit = self._next_trained - self.rules.max_lag
        is_on = self.rules.on_stale is OnStale.DROP
        dropped = [slot for slot in self.outstanding if is_on and slot.is_ready and slot.oldest < limit]
        for slot in dropped:
            self._give_up(slot)
        return dropped

    def take(self, *, exhausted: int) -> list[Slot] | None:
        """The groups of the next step, oldest first; None: wait. With ``drop`` call that first.

        ``exhausted``: no more prompts will come of the episodes before this one (the loader's ``episode``).
        """
        open_slots = self.outstanding
        if not open_slots:
            return None
        episode = open_slots[0].episode
        own = [slot for slot in open_slots if slot.episode == episode]
        batch = [slot for slot in own if slot.is_ready][: self.rules.batch]
        is_rest = episode < exhausted and len(batch) == len(own)
        if len(batch) < self.rules.batch and not is_rest:
            return None
        chosen = {slot.number for slot in batch}
        left = [slot for slot in open_slots if slot.number not in chosen]
        if self.rules.on_stale is OnStale.WAIT and not self._due_in_time(left, self._next_trained + 1):
            return None
        return self._trained(batch)

    def skip(self) -> None:
        """The next step has no group: everything that was left was filtered out or dropped, and no group is at work."""
        assert not self._slots
        self._next_trained += 1

    def published(self, version: int) -> None:
        """The engines have the weights after ``version`` updates: the slots of these updates are released."""
        assert self.version <= version <= self._next_trained
        self.version = version
        self._slots = {n: slot for n, slot in self._slots.items() if slot.trained is None or slot.trained >= version}
        self._groups = Counter(slot.episode for slot in self._slots.values())

    def _trained(self, batch: list[Slot]) -> list[Slot]:
        for slot in batch:
            slot.trained = self._next_trained
        self._next_trained += 1
        return batch

    def _give_up(self, slot: Slot) -> None:
        assert slot.trained is None, "its batch is taken"
        del self._slots[slot.number]
        self._groups[slot.episode] -= 1
        for found in self.rounds:
            if found.number == slot.round:
                found.kept -= 1

    def _is_at_work(self, found: Round) -> bool:
        return any(slot.round == found.number for slot in self._slots.values())

    def _due_in_time(self, slots: Iterable[Slot], batch: int) -> bool:
        """Whether each of ``slots``, oldest first, can be in a batch within the lag when the next one is number ``batch``."""
        groups = Counter[int]()
        for slot in slots:
            groups[slot.episode] += 1
            if self.rules.batches(groups.values()) > slot.oldest + self.rules.max_lag - batch + 1:
                return False
        return True
