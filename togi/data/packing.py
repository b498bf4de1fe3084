"""Lay out samples as a ``Batch``, in which what they have in common from their first token on is there once.

Shape letters as in ``togi.batch``. Which samples go together, in which micro-batch and on which rank, is decided on index
lists. Deterministic: equal samples in equal order give equal lists. A cost is the number of tokens that ``pack`` lays out, with a
shared prefix (``prefix_tree``) counted once. That of several units is at most the sum of theirs.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from togi.batch import Batch, Segments
from togi.data.prefix_tree import Neighbours, SortedRows, grow
from togi.sample import Sample

MAX_IMBALANCE = 1.05
WORTH = 16
"""Units are put together for what they share if that is at least this part of the smaller one's tokens."""
PIECES = (1, 2, 4, 8)
"""What is put together for a rank is at most one of these parts of its tokens: the smaller, the more equal the loads."""


@dataclass(slots=True, eq=False)
class _Unit:
    """Samples that stay together, their rows by rank in the sorted order of all rows, and their tokens in one pack."""

    indices: list[int]
    ranks: list[int]
    tokens: int


class _Costs:
    """What samples cost in one pack."""

    def __init__(self, samples: Sequence[Sample], *, share_prefix: bool) -> None:
        rows = SortedRows.of(samples, share_prefix=share_prefix)
        self._lengths, self._neighbours = list(map(len, rows.places)), Neighbours(rows)
        self._ranks: list[list[int]] = [[] for _ in samples]
        for rank, owner in enumerate(rows.owners):
            self._ranks[owner].append(rank)

    def added(self, unit: _Unit, ranks: Sequence[int]) -> int:
        """Tokens that these rows add to a unit."""
        tokens, last = 0, -1
        for rank in ranks:
            # a row shares with the others what it shares with the nearer of its two neighbours
            place = bisect.bisect(unit.ranks, rank)
            last = max(last, unit.ranks[place - 1]) if place > 0 else last
            before = self._neighbours.shared(last, rank) if last >= 0 else 0
            after = self._neighbours.shared(rank, unit.ranks[place]) if place < len(unit.ranks) else 0
            tokens += self._lengths[rank] - max(before, after)
            last = rank
        return tokens

    def unit(self, indices: Sequence[int]) -> _Unit:
        ranks = sorted(rank for i in indices for rank in self._ranks[i])
        return _Unit([*indices], ranks, self.added(_Unit([], [], 0), ranks))

    def divided(self, unit: _Unit, max_tokens: int, max_sequences: int) -> list[_Unit]:
        """A unit split into parts that fit, one if it fits itself; a sample that does not fit is a part.

        Samples with a common beginning come one after the other. A new part has to compute it again.
        """
        singles = (self.unit([i]) for i in sorted(unit.indices, key=self._ranks.__getitem__))
        return self._merged(singles, max_tokens, max_sequences, worth=False)

    def gathered(self, units: Sequence[_Unit], max_tokens: int, max_sequences: int) -> list[_Unit]:
        """Units with long common beginnings put together as long as they fit."""
        in_order = sorted(units, key=lambda unit: unit.ranks)
        copies = (_Unit([*unit.indices], [*unit.ranks], unit.tokens) for unit in in_order)
        return self._merged(copies, max_tokens, max_sequences, worth=True)

    def _merged(self, units: Iterable[_Unit], max_tokens: int, max_sequences: int, *, worth: bool) -> list[_Unit]:
        """Each unit put to the one before if both fit, and, if that is asked, if they share so much that it is worth it."""
        found = list[_Unit]()
        for unit in units:
            if found:
                last = found[-1]
                added = self.added(last, unit.ranks)
                fits = last.tokens + added <= max_tokens and len(last.indices) + len(unit.indices) <= max_sequences
                if fits and (not worth or WORTH * (unit.tokens - added) >= min(last.tokens, unit.tokens)):
                    last.indices += unit.indices
                    last.tokens += added
                    for rank in unit.ranks:
                        bisect.insort(last.ranks, rank)
                    continue
            found.append(unit)
        return found

    def common(self, unit: _Unit) -> int:
        """Tokens with which all rows of a unit begin."""
        return self._neighbours.shared(unit.ranks[0], unit.ranks[-1]) if len(unit.ranks) > 1 else 0


def micro_batches(
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    max_sequences: int | None,
    share_prefix: bool,
    whole_groups: bool = False,
) -> list[list[int]]:
    """Split samples into micro-batches of at most ``max_tokens`` tokens and ``max_sequences`` sequences.

    The samples of a group stay together if they fit, and groups with a long common beginning too; a sequence of more than
    ``max_tokens`` is a batch of its own. ``whole_groups`` never splits a group, for losses that compare its members: a group
    that is too large is then a batch of its own. Best-fit decreasing: the fullest batches come first, so a lack of memory shows
    at once.
    """
    assert max_tokens > 0 and (max_sequences is None or max_sequences > 0)
    most = len(samples) if max_sequences is None else max_sequences
    costs = _Costs(samples, share_prefix=share_prefix)
    groups = [costs.unit(group) for group in _groups(samples)]
    parts = [[group] if whole_groups else costs.divided(group, max_tokens, most) for group in groups]
    units = costs.gathered([*chain.from_iterable(parts)], max_tokens, most)
    return [sorted(filled) for filled in _best_fit(units, max_tokens, most)]


def split_ranks(
    samples: Sequence[Sample], ranks: int, *, share_prefix: bool = True, whole_groups: bool = False
) -> list[list[int]]:
    """Dispatch samples to ranks so that each gets about the same number of tokens.

    Groups with a long common beginning stay together, and groups stay whole, while no rank is idle and none has more than 5 %
    above the mean. Else ever fewer stay together, then each group is split into 2, 4, 8, ... parts until the result is even
    enough, and the most even one is used (``whole_groups``: never split). Each part goes to the least loaded rank, largest first
    (Graham's LPT rule). A list is empty only if there are fewer samples than ranks, or fewer groups with ``whole_groups``.
    """
    assert ranks > 0
    costs = _Costs(samples, share_prefix=share_prefix)
    best, least, mean = list[list[int]](), (True, 0), 0.0
    for units in _divisions(costs, [costs.unit(group) for group in _groups(samples)], ranks, whole_groups=whole_groups):
        dealt, loads = _longest_first(units, ranks)
        found = min(loads) == 0, max(loads)
        if not best or found < least:
            best, least = dealt, found
        # Splitting costs tokens (each part computes its beginning again), so it stops as soon as the load is even.
        mean = mean or sum(loads) / ranks
        if not found[0] and found[1] <= MAX_IMBALANCE * mean:
            break
    return [sorted(indices) for indices in best]


def _divisions(costs: _Costs, groups: Sequence[_Unit], ranks: int, *, whole_groups: bool) -> Iterator[Sequence[_Unit]]:
    """Samples in ever smaller units: several groups, groups, parts of groups, single samples."""
    tokens, samples = sum(unit.tokens for unit in groups), sum(len(unit.indices) for unit in groups)
    for pieces in PIECES:
        gathered = costs.gathered(groups, tokens // (pieces * ranks), samples)
        if len(gathered) < len(groups):
            yield gathered
    units = groups
    yield units
    parts = 1
    while len(units) < samples and not whole_groups:
        parts *= 2
        yield (units := [part for unit in groups for part in _parts(unit, parts, costs)])


def _parts(unit: _Unit, parts: int, costs: _Costs) -> list[_Unit]:
    """A group in about ``parts`` parts of about equal tokens; every part but one computes the common beginning again."""
    if parts >= len(unit.indices):
        return [costs.unit([i]) for i in unit.indices]
    limit = -(-(unit.tokens + (parts - 1) * costs.common(unit)) // parts)
    return costs.divided(unit, limit, len(unit.indices))


def _groups(samples: Sequence[Sample]) -> list[list[int]]:
    """Indices by ``group_id``, groups in the order of their first sample."""
    groups: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.group_id, []).append(i)
    return list(groups.values())


def _largest_first(unit: _Unit) -> tuple[int, list[int]]:
    return -unit.tokens, sorted(unit.indices)


def _best_fit(units: Sequence[_Unit], max_tokens: int, max_sequences: int) -> list[list[int]]:
    """Put each unit, largest first, into the bin with the least free space that fits; else open a bin."""
    bins: list[list[int]] = []
    by_space: list[tuple[int, int]] = []  # (free tokens, bin), ascending; only bins that can still take a sequence
    for unit in sorted(units, key=_largest_first):
        # The first bin with enough tokens is the tightest; skip those without room for the sequences.
        place = bisect.bisect_left(by_space, (unit.tokens, -1))
        while place < len(by_space) and len(bins[by_space[place][1]]) + len(unit.indices) > max_sequences:
            place += 1
        if place < len(by_space):
            free, number = by_space.pop(place)
        else:
            free, number = max_tokens, len(bins)
            bins.append([])
        bins[number] += unit.indices
        if free > unit.tokens and len(bins[number]) < max_sequences:
            bisect.insort(by_space, (free - unit.tokens, number))
    return bins


def _longest_first(units: Sequence[_Unit], ranks: int) -> tuple[list[list[int]], list[int]]:
    """Assign each unit, largest first, to the least loaded rank. Returns the indices of each rank, and the loads (unordered)."""
    loads = [(0, rank) for rank in range(ranks)]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for unit in sorted(units, key=_largest_first):
        load, rank = loads[0]
        dealt[rank] += unit.indices
        heapq.heapreplace(loads, (load + unit.tokens, rank))
    return dealt, [load for load, _ in loads]


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PackStats:
    """Tokens in packs, and how many there would be if every row of every sample were laid out alone."""

    tokens: int
    unshared_tokens: int

    def __add__(self, other: PackStats) -> PackStats:
        return PackStats(self.tokens + other.tokens, self.unshared_tokens + other.unshared_tokens)

    @property
    def saved_share(self) -> float:
        """The share of tokens that need no computation, 0 to 1: 1 - tokens / unshared tokens."""
        return 1 - self.tokens / self.unshared_tokens


def pack(samples: Sequence[Sample], *, share_prefix: bool) -> Batch:
    """Lay out samples as one Batch; all must have the same streams and values, which are float32.

    With ``share_prefix`` the tokens with which samples begin alike are there once, whoever they belong to. A sample with forks
    is laid out without its repetitions in any case. A token that several samples have in their loss is in the loss of each.
    """
    assert samples, "nothing to pack"
    first = samples[0]
    for sample in samples:
        alike = sample.streams.keys() == first.streams.keys() and sample.values.keys() == first.values.keys()
        assert alike, "samples carry different streams or values"
    # The tree of segments, and with which of them each row ends.
    rows = SortedRows.of(samples, share_prefix=share_prefix)
    nodes, finals = grow(rows)
    lengths = [node.end - node.start for node in nodes]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    table = Segments(tuple(starts), tuple(lengths), tuple(node.parent for node in nodes))
    runs = [samples[rows.owners[node.row]].tokens[rows.places[node.row][node.start : node.end]] for node in nodes]
    # Where each token of each sample is in the pack.
    packed = [np.empty(len(sample.tokens), dtype=np.int64) for sample in samples]
    ends: list[list[int]] = [[] for _ in samples]
    for row in np.argsort(rows.numbers).tolist():
        links = table.chain(finals[row])
        owner, spans = rows.owners[row], [np.arange(starts[s], starts[s] + lengths[s]) for s in links]
        packed[owner][rows.places[row]] = np.concatenate(spans)
        ends[owner].append(finals[row])
    masks = [sample.loss_mask for sample in samples]
    counts = [int(mask.sum()) for mask in masks]
    return Batch.of(
        _joined(runs, np.int64),
        table,
        [*map(tuple, ends)],
        _joined([own[mask] for own, mask in zip(packed, masks, strict=True)], np.int64),
        torch.from_numpy(np.repeat(np.arange(len(samples)), counts)),
        {
            name: _joined([sample.streams[name][sample.loss_mask] for sample in samples], np.float32)
            for name in first.streams
        },
        {name: torch.tensor([sample.values[name] for sample in samples]) for name in first.values},
    )


def pack_all(
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    max_sequences: int | None,
    share_prefix: bool,
    whole_groups: bool = False,
) -> list[Batch]:
    """Split samples into micro-batches (``micro_batches``) and pack each. ``order_N`` has the places in ``samples``."""
    plans = micro_batches(
        samples,
        max_tokens=max_tokens,
        max_sequences=max_sequences,
        share_prefix=share_prefix,
        whole_groups=whole_groups,
    )
    batches = [pack([samples[i] for i in plan], share_prefix=share_prefix) for plan in plans]
    found = zip(batches, plans, strict=True)
    return [replace(batch, order_N=tuple(plan[i] for i in batch.order_N)) for batch, plan in found]


def in_order(batches: Sequence[Batch], results: Sequence[T]) -> list[T]:
    """Results of ``pack_all``'s batches (one per sample, as ``Scorer`` gives them) in the order of the list that was packed."""
    places = [place for batch in batches for place in batch.order_N]
    by_place = dict(zip(places, results, strict=True))
    return [by_place[place] for place in range(len(places))]


def pack_stats(batch: Batch) -> PackStats:
    """Tokens of a batch, and how many there would be if every row were laid out alone."""
    table = batch.segments
    rows = sum(table.context_length(end) + table.lengths_S[end] for ends in batch.ends_N for end in ends)
    return PackStats(batch.num_tokens, rows)


def _joined(arrays: Sequence[NDArray[np.generic]], dtype: type[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(dtype, copy=False))
