"""Lay out samples as a ``Batch``: plain (one segment per sequence) or with shared prefixes (one segment per prompt).

Shape letters as in ``togi.batch``. Which samples go together, in which micro-batch and on which rank, is decided on index
lists. Deterministic: equal samples in equal order give equal lists. A cost is the number of tokens that ``pack`` lays out, with a
shared prompt counted once.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from togi.batch import NO_PREFIX, NO_SEQUENCE, Batch, Segments, predecessors, segment_positions
from togi.sample import Sample

MAX_IMBALANCE = 1.05


@dataclass(frozen=True, slots=True)
class _Unit:
    """Samples that stay together, and their tokens."""

    indices: tuple[int, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class _Costs:
    """What samples cost in one pack. Those with the same number in ``prefixes`` share their prompt, which is counted once."""

    samples: Sequence[Sample]
    prefixes: Sequence[int]

    def unit(self, indices: Sequence[int]) -> _Unit:
        prompts = {self.prefixes[i]: self.samples[i].prompt_length for i in indices}
        own = sum(len(self.samples[i].tokens) - self.samples[i].prompt_length for i in indices)
        return _Unit(tuple(indices), sum(prompts.values()) + own)

    def divided(self, group: Sequence[int], max_tokens: int, max_sequences: int) -> list[_Unit]:
        """A group split in order into parts that fit, one if it fits itself; a sample that does not fit is a part."""
        parts, tokens, seen = [list[int]()], 0, set[int]()
        for i in group:
            sample = self.samples[i]
            tokens += len(sample.tokens) - (sample.prompt_length if self.prefixes[i] in seen else 0)
            # A new part has to compute the prompt again.
            if parts[-1] and (tokens > max_tokens or len(parts[-1]) == max_sequences):
                parts.append([])
                tokens, seen = len(sample.tokens), set()
            parts[-1].append(i)
            seen.add(self.prefixes[i])
        return [self.unit(part) for part in parts]


def prefix_ids(samples: Sequence[Sample], *, share_prefix: bool) -> list[int]:
    """A number for each sample; samples with the same number have the same group and the same prompt tokens.

    A sample that cannot share (no prompt, no response, or sharing is off) has a unique number.
    """
    numbers: dict[tuple[str, bytes], int] = {}
    ids = []
    for i, sample in enumerate(samples):
        if share_prefix and 0 < sample.prompt_length < len(sample.tokens):
            key = (sample.group_id, sample.tokens[: sample.prompt_length].tobytes())
            ids.append(numbers.setdefault(key, i))
        else:
            ids.append(i)
    return ids


def micro_batches(
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    max_sequences: int | None,
    share_prefix: bool,
    whole_groups: bool = False,
) -> list[list[int]]:
    """Split samples into micro-batches of at most ``max_tokens`` tokens and ``max_sequences`` sequences.

    The samples of a group stay together if they fit; a sequence of more than ``max_tokens`` is a batch of its own.
    ``whole_groups`` never splits a group, for losses that compare its members: a group that is too large is then a batch
    of its own. Best-fit decreasing: the fullest batches come first, so a lack of memory shows at once.
    """
    assert max_tokens > 0 and (max_sequences is None or max_sequences > 0)
    most = len(samples) if max_sequences is None else max_sequences
    costs = _Costs(samples, prefix_ids(samples, share_prefix=share_prefix))
    parts = [
        [costs.unit(group)] if whole_groups else costs.divided(group, max_tokens, most) for group in _groups(samples)
    ]
    return [sorted(filled) for filled in _best_fit([*chain.from_iterable(parts)], max_tokens, most)]


def split_ranks(
    samples: Sequence[Sample], ranks: int, *, share_prefix: bool = True, whole_groups: bool = False
) -> list[list[int]]:
    """Dispatch samples to ranks so that each gets about the same number of tokens.

    Groups stay whole while no rank is idle and none has more than 5 % above the mean. Else each is split into 2, 4, 8, ... parts
    until the result is even enough, and the most even one is used (``whole_groups``: never split). Each part goes to the least
    loaded rank, largest first (Graham's LPT rule). A list is empty only if there are fewer samples than ranks, or fewer
    groups with ``whole_groups``.
    """
    assert ranks > 0
    costs = _Costs(samples, prefix_ids(samples, share_prefix=share_prefix))
    whole = [costs.unit(group) for group in _groups(samples)]
    mean = sum(unit.tokens for unit in whole) / ranks
    units, parts = whole, 1
    best, loads = _longest_first(units, ranks)
    # Splitting costs tokens (each part computes the prompt again), so it stops as soon as the load is even.
    while (max(loads) > MAX_IMBALANCE * mean or min(loads) == 0) and not whole_groups and len(units) < len(samples):
        parts *= 2
        units = [part for unit in whole for part in _parts(unit, parts, costs, share_prefix=share_prefix)]
        dealt, loaded = _longest_first(units, ranks)
        if (min(loaded) == 0, max(loaded)) < (min(loads) == 0, max(loads)):
            best, loads = dealt, loaded
    return [sorted(indices) for indices in best]


def _parts(unit: _Unit, parts: int, costs: _Costs, *, share_prefix: bool) -> list[_Unit]:
    """A group in about ``parts`` parts of about equal tokens; every part but one computes the prompt again."""
    if parts >= len(unit.indices):
        return [costs.unit([i]) for i in unit.indices]
    prompt = max(costs.samples[i].prompt_length for i in unit.indices) if share_prefix else 0
    limit = -(-(unit.tokens + (parts - 1) * prompt) // parts)
    return costs.divided(unit.indices, limit, len(unit.indices))


def _groups(samples: Sequence[Sample]) -> list[list[int]]:
    """Indices by ``group_id``, groups in the order of their first sample."""
    groups: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.group_id, []).append(i)
    return list(groups.values())


def _best_fit(units: Sequence[_Unit], max_tokens: int, max_sequences: int) -> list[list[int]]:
    """Put each unit, largest first, into the bin with the least free space that fits; else open a bin."""
    bins: list[list[int]] = []
    by_space: list[tuple[int, int]] = []  # (free tokens, bin), ascending; only bins that can still take a sequence
    for unit in sorted(units, key=lambda u: (-u.tokens, u.indices)):
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
    for unit in sorted(units, key=lambda u: (-u.tokens, u.indices)):
        load, rank = loads[0]
        dealt[rank] += unit.indices
        heapq.heapreplace(loads, (load + unit.tokens, rank))
    return dealt, [load for load, _ in loads]


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PackStats:
    """Tokens in packs, and how many there would be without shared prompts."""

    tokens: int
    unshared_tokens: int

    def __add__(self, other: PackStats) -> PackStats:
        return PackStats(self.tokens + other.tokens, self.unshared_tokens + other.unshared_tokens)

    @property
    def saved_share(self) -> float:
        """The share of tokens that need no computation, 0 to 1: 1 - tokens / unshared tokens."""
        return 1 - self.tokens / self.unshared_tokens


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """A planned segment: tokens ``start`` to ``end`` of a sample, by its number. ``sequence`` NO_SEQUENCE: a shared prompt."""

    sample: int
    start: int
    end: int
    prefix: int
    sequence: int


def pack(samples: Sequence[Sample], *, share_prefix: bool) -> Batch:
    """Lay out samples as one Batch; all must have the same streams and values.

    With ``share_prefix`` the samples of one ``group_id`` with equal prompt tokens share one prompt segment, which each response
    continues. A sample without a response is never shared: its prompt is its own segment, so that each sequence has
    tokens (none of them in the loss). Streams and values are float32.
    """
    assert samples, "nothing to pack"
    # Plan the segments, then build every tensor in their order.
    pieces, order = _pieces(samples, prefix_ids(samples, share_prefix=share_prefix))
    lengths = [piece.end - piece.start for piece in pieces]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    table = Segments(tuple(starts), tuple(lengths), tuple(piece.prefix for piece in pieces))
    sequences = np.repeat(np.array([piece.sequence for piece in pieces], dtype=np.int64), lengths)
    first = samples[0]
    for sample in samples:
        alike = sample.streams.keys() == first.streams.keys() and sample.values.keys() == first.values.keys()
        assert alike, "samples carry different streams or values"
    return Batch(
        tokens_T=_joined(pieces, [sample.tokens for sample in samples], np.int64),
        positions_T=segment_positions(table),
        sources_T=predecessors(table),
        sequences_T=torch.from_numpy(sequences),
        targets_K=_joined(pieces, [sample.loss_mask for sample in samples], np.bool_).nonzero().squeeze(-1),
        segments=table,
        order_N=tuple(order),
        streams={name: _joined(pieces, [s.streams[name] for s in samples], np.float32) for name in first.streams},
        values={name: torch.tensor([samples[i].values[name] for i in order]) for name in first.values},
    ).validate()


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
    places = [place for batch in batches for place in sorted(batch.order_N)]
    by_place = dict(zip(places, results, strict=True))
    return [by_place[place] for place in range(len(places))]


def pack_stats(batch: Batch) -> PackStats:
    """Tokens of a batch, and how many the plain layout would have."""
    table = batch.segments
    # In the plain layout every leaf segment would repeat its whole context.
    prefixes = set(table.prefixes_S)
    leaves = (s for s in range(len(table)) if s not in prefixes)
    return PackStats(batch.num_tokens, sum(table.context_length(s) + table.lengths_S[s] for s in leaves))


def _pieces(samples: Sequence[Sample], prefixes: Sequence[int]) -> tuple[list[_Piece], list[int]]:
    """Segments in pack order, and the sample of each sequence. Samples that share a prompt are adjacent."""
    members: dict[int, list[int]] = {}
    for i, prefix in enumerate(prefixes):
        members.setdefault(prefix, []).append(i)
    pieces: list[_Piece] = []
    order: list[int] = []
    for indices in members.values():
        shared, shared_segment = 0, NO_PREFIX
        # A prompt of several samples is a segment of its own, which their responses name as prefix.
        if len(indices) > 1:
            shared, shared_segment = samples[indices[0]].prompt_length, len(pieces)
            pieces.append(_Piece(indices[0], 0, shared, NO_PREFIX, NO_SEQUENCE))
        for i in indices:
            assert not samples[i].loss_mask[: samples[i].prompt_length].any(), "a token of the prompt is in the loss"
            pieces.append(_Piece(i, shared, len(samples[i].tokens), shared_segment, len(order)))
            order.append(i)
    return pieces, order


def _joined(pieces: Sequence[_Piece], arrays: Sequence[NDArray[np.generic]], dtype: type[np.generic]) -> torch.Tensor:
    """The parts of the samples' arrays, one after the other."""
    runs = [arrays[piece.sample][piece.start : piece.end] for piece in pieces]
    return torch.from_numpy(np.concatenate(runs).astype(dtype, copy=False))
