"""Lay out samples as a ``Batch``: plain (one segment per sequence) or with shared prefixes (one segment per prompt).

Shape letters as in ``togi.batch``. ``partition`` decides which samples go together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from togi.batch import NO_PREFIX, NO_SEQUENCE, Batch, Segments, predecessors, segment_positions
from togi.data.partition import micro_batches, prefix_ids, split_ranks
from togi.sample import Sample

T = TypeVar("T")

__all__ = ["PackStats", "Packs", "micro_batches", "pack", "pack_all", "pack_stats", "split_ranks"]


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
class Packs:
    """Samples packed into batches. ``places``: the samples' places in the caller's list, batch after batch."""

    batches: list[Batch]
    places: list[int]

    def in_order(self, results: Sequence[T]) -> list[T]:
        """Reorder results (batch after batch, one per sample) to the order of the caller's list."""
        by_place = dict(zip(self.places, results, strict=True))
        return [by_place[place] for place in range(len(self.places))]


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """A planned segment: tokens ``start`` to ``end`` of a sample. ``sequence`` NO_SEQUENCE marks a shared prompt."""

    sample: Sample
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
    streams = {name: _joined(pieces, [p.sample.streams[name] for p in pieces], np.float32) for name in _names(samples)}
    return Batch(
        tokens_T=_joined(pieces, [piece.sample.tokens for piece in pieces], np.int64),
        positions_T=segment_positions(table),
        sources_T=predecessors(table),
        sequences_T=torch.from_numpy(sequences),
        loss_mask_T=_joined(pieces, [piece.sample.loss_mask for piece in pieces], np.bool_),
        segments=table,
        order_N=tuple(order),
        streams=streams,
        values={name: torch.tensor([samples[i].values[name] for i in order]) for name in samples[0].values},
    ).validate()


def pack_all(
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    max_sequences: int | None,
    share_prefix: bool,
    whole_groups: bool = False,
) -> Packs:
    """Split samples into micro-batches (``partition.micro_batches``) and pack each."""
    plans = micro_batches(
        samples,
        max_tokens=max_tokens,
        max_sequences=max_sequences,
        share_prefix=share_prefix,
        whole_groups=whole_groups,
    )
    batches = [pack([samples[i] for i in plan], share_prefix=share_prefix) for plan in plans]
    return Packs(batches, [place for plan in plans for place in plan])


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
            first = samples[indices[0]]
            shared, shared_segment = first.prompt_length, len(pieces)
            pieces.append(_Piece(first, 0, shared, NO_PREFIX, NO_SEQUENCE))
        for i in indices:
            assert not samples[i].loss_mask[: samples[i].prompt_length].any(), "a token of the prompt is in the loss"
            pieces.append(_Piece(samples[i], shared, len(samples[i].tokens), shared_segment, len(order)))
            order.append(i)
    return pieces, order


def _joined(pieces: Sequence[_Piece], arrays: Sequence[NDArray[np.generic]], dtype: type[np.generic]) -> torch.Tensor:
    runs = [array[piece.start : piece.end] for piece, array in zip(pieces, arrays, strict=True)]
    return torch.from_numpy(np.concatenate(runs).astype(dtype, copy=False))


def _names(samples: Sequence[Sample]) -> list[str]:
    names, values = samples[0].streams.keys(), samples[0].values.keys()
    for sample in samples:
        assert sample.streams.keys() == names and sample.values.keys() == values, (
            "samples carry different streams or values"
        )
    return list(names)
