"""The third layout of a ``Batch``: its tokens are dealt to the ranks of a ring, and each rank computes only its own.

Shape letters: T packed tokens, t those of this rank, K tokens in the loss, k those of them whose prediction is made on
this rank, N sequences.

Every rank of a ring has the same ``Batch``. ``deal`` cuts its segments into *chunks* and assigns them to ranks. It depends on the
segment table alone, so the ranks need not communicate. A long segment is cut into 2R chunks for R ranks, and rank r takes chunks
r and 2R-1-r: one early and one late, since a late query sees more keys. Short segments stay whole, and the keys of a segment that
only its own rank sees are never sent. A rank takes its part of the batch (``RingLayout``), runs the model on it and makes the
predictions whose source token it has. ``Places.whole`` gathers them into tensors of the whole batch. Every rank computes the same
loss from these and back-propagates its own share. Gradients are then summed over ranks as without a ring.

Not here: attention between chunks (``ring_attention``), sending (``togi.parallel.groups``).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from togi.batch import NO_PREFIX, Batch, Segments, moved

MAX_IMBALANCE = 1.05


class Ring(Protocol):
    """The ranks that share the tokens of each batch, as one of them sees it. Methods are collective: all ranks call them."""

    rank: int
    size: int

    def pass_on(self, block: Tensor, rows: int, channel: int) -> Callable[[], Tensor]:
        """Start to send ``block`` to the next rank. Call the result to wait for the block of the rank before, of ``rows`` rows."""

    def add_up(self, tensor: Tensor) -> None:
        """Replace ``tensor`` on every rank by the sum over the ring."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``first`` to ``end`` of a segment, ``end`` excluded."""

    segment: int
    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, slots=True)
class Shards:
    """The chunks of each rank. ``segments``: the table of the batch, and a filler token for each rank that would have none."""

    segments: Segments
    chunks: tuple[tuple[Chunk, ...], ...]

    def tokens(self, rank: int) -> int:
        return sum(len(chunk) for chunk in self.chunks[rank])

    def pairs(self, rank: int) -> int:
        """Query-key pairs of a rank, the cost of attention. Each token sees its context and its segment up to itself."""
        return sum(_pairs(self.segments, chunk) for chunk in self.chunks[rank])


def _pairs(segments: Segments, chunk: Chunk) -> int:
    before = segments.context_length(chunk.segment)
    return len(chunk) * before + len(chunk) * (chunk.first + 1 + chunk.end) // 2


@lru_cache(maxsize=8)
def deal(segments: Segments, size: int) -> Shards:
    """Deal the tokens of a pack to ``size`` ranks, evenly by tokens and by query-key pairs.

    Cuts as few segments as possible so that no rank has more than ``MAX_IMBALANCE`` times the mean of either. If that cannot be
    reached, it returns the most even deal.
    """
    limit = sum(segments.lengths_S)
    best, best_excess = _dealt(segments, size, limit)
    # cut ever shorter segments until the deal is even enough
    while best_excess > MAX_IMBALANCE and limit > 1:
        limit //= 2
        shards, excess = _dealt(segments, size, limit)
        if excess < best_excess:
            best, best_excess = shards, excess
    return _filled(best)


def _dealt(segments: Segments, size: int, limit: int) -> tuple[Shards, float]:
    """The deal that cuts the segments longer than ``limit``, and its imbalance: the busiest rank / mean."""
    # long segments: two chunks of each for every rank
    dealt: list[list[Chunk]] = [[] for _ in range(size)]
    whole: list[Chunk] = []
    for segment, length in enumerate(segments.lengths_S):
        if length <= limit:
            whole.append(Chunk(segment, 0, length))
        else:
            for rank, chunk in _zigzag(segment, length, size):
                dealt[rank].append(chunk)
    tokens = sum(segments.lengths_S)
    pairs = sum(_pairs(segments, Chunk(s, 0, length)) for s, length in enumerate(segments.lengths_S))

    # tokens and pairs weigh alike: each as a share of its total
    def cost(chunk: Chunk) -> int:
        return len(chunk) * pairs + _pairs(segments, chunk) * tokens

    # whole segments: the costliest first, each to the rank with the least load so far
    loads = [(sum(map(cost, chunks)), rank) for rank, chunks in enumerate(dealt)]
    heapq.heapify(loads)
    for chunk in sorted(whole, key=lambda c: (-cost(c), c.segment)):
        load, rank = heapq.heappop(loads)
        dealt[rank].append(chunk)
        heapq.heappush(loads, (load + cost(chunk), rank))
    shards = Shards(segments, tuple(tuple(sorted(chunks, key=lambda c: (c.segment, c.first))) for chunks in dealt))
    excess = max(max(shards.tokens(r) / tokens, shards.pairs(r) / pairs) for r in range(size)) * size
    return shards, excess


def _zigzag(segment: int, length: int, size: int) -> Iterator[tuple[int, Chunk]]:
    """Yield (rank, chunk) for 2 x ``size`` chunks whose lengths differ by at most one token, without empty ones."""
    bounds = [i * length // (2 * size) for i in range(2 * size + 1)]
    for rank in range(size):
        early, late = (bounds[rank], bounds[rank + 1]), (bounds[-2 - rank], bounds[-1 - rank])
        # the last rank has the two middle chunks, which are one
        spans = [(early[0], late[1])] if early[1] == late[0] else [early, late]
        yield from ((rank, Chunk(segment, first, end)) for first, end in spans if first < end)


def _filled(shards: Shards) -> Shards:
    """Add a filler token, a segment of its own, for each rank without tokens, because models do not run on no tokens."""
    table = shards.segments
    starts, lengths, chunks = list(table.starts_S), list(table.lengths_S), list(shards.chunks)
    for rank, own in enumerate(shards.chunks):
        if not own:
            chunks[rank] = (Chunk(len(starts), 0, 1),)
            starts.append(starts[-1] + lengths[-1])
            lengths.append(1)
    prefixes = (*table.prefixes_S, *([NO_PREFIX] * (len(starts) - len(table))))
    return Shards(Segments(tuple(starts), tuple(lengths), prefixes), tuple(chunks))


@dataclass(frozen=True, slots=True, eq=False)
class RingTable:
    """The segment table that ring attention gets. ``head_stride``: key/value heads sent at a time."""

    shards: Shards
    ring: Ring
    head_stride: int


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """The places of the hidden states of some tokens of the batch, all of which this rank computes. ``rows_k``: their rows."""

    rows_k: Tensor

    def states(self, states_tH: Tensor) -> Tensor:
        """The states of those tokens that this rank computes, [k, H]."""
        return states_tH.index_select(0, self.rows_k)

    def own(self, values_K: Tensor) -> Tensor:
        """The entries of the tokens that this rank computes, [k] of [K], where K is the number of all those tokens."""
        return values_K

    def whole(self, values_k: Tensor) -> Tensor:
        """Gather the entries of all tokens, [K, ...], from each rank's own. The gradient of an entry goes only to its own rank."""
        return values_k


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The tokens that this rank computes: all of the batch. ``segments`` is the table that attention gets."""

    tokens_t: Tensor
    positions_t: Tensor
    segments: Segments | RingTable

    @classmethod
    def whole(cls, batch: Batch) -> Layout:
        return Layout(batch.tokens_T, batch.positions_T, batch.segments)

    def at(self, batch: Batch, tokens: Callable[[Batch], Tensor]) -> Places:
        """The places of some tokens of the batch, ``tokens``: their packed indices, [K]."""
        return Places(tokens(batch))

    def segments_of(self, batch: Batch) -> Tensor:
        """The segment of each token (int64, [t]). A filler token gets the number of segments."""
        return batch.segments_T()

    def total(self, sums: Tensor) -> Tensor:
        """Sums over all tokens, from sums over each rank's. The gradient of a summand goes only to its own rank."""
        return sums


@dataclass(frozen=True, slots=True, eq=False)
class RingLayout(Layout):
    """This rank's tokens. ``index_t``: their packed indices; ``rows_T``: the row of each packed token, -1 for the others'.

    ``rows_T`` stays in host memory.
    """

    ring: Ring
    index_t: Tensor
    rows_T: Tensor

    @classmethod
    def of(cls, batch: Batch, ring: Ring, head_stride: int) -> RingLayout:
        shards = deal(batch.segments, ring.size)
        fillers, device = sum(shards.segments.lengths_S) - batch.num_tokens, batch.tokens_T.device
        own_t = packed_indices(shards.segments, shards.chunks[ring.rank])
        # its inverse: from a packed index to the row on this rank
        rows_T = torch.full((batch.num_tokens + fillers,), -1)
        rows_T[own_t] = torch.arange(len(own_t))
        index_t = moved(own_t, device)
        # fillers come after the batch: token 0 at position 0
        tokens_t, positions_t = (
            torch.cat([stream, stream.new_zeros(fillers)])[index_t] for stream in (batch.tokens_T, batch.positions_T)
        )
        return cls(tokens_t, positions_t, RingTable(shards, ring, head_stride), ring, index_t, rows_T)

    def at(self, batch: Batch, tokens: Callable[[Batch], Tensor]) -> Places:
        # on the host: a device would have to be waited for to know how many of them are this rank's
        rows_K = self.rows_T[tokens(batch.host).cpu()]
        own_k = (rows_K >= 0).nonzero().squeeze(-1)
        device = self.index_t.device
        return _Shared(moved(rows_K[own_k], device), moved(own_k, device), len(rows_K), self.ring)

    def segments_of(self, batch: Batch) -> Tensor:
        segments_T = batch.segments_T()
        fillers = segments_T.new_full((len(self.rows_T) - len(segments_T),), len(batch.segments))
        return torch.cat([segments_T, fillers])[self.index_t]

    def total(self, sums: Tensor) -> Tensor:
        return _summed(sums, self.ring)


def packed_indices(segments: Segments, chunks: Sequence[Chunk]) -> Tensor:
    """The packed index of each token of ``chunks``."""
    starts = segments.starts_S
    return torch.cat([torch.arange(starts[c.segment] + c.first, starts[c.segment] + c.end) for c in chunks])


@dataclass(frozen=True, slots=True, eq=False)
class _Shared(Places):
    """``own_k``: the places of this rank's tokens among the ``total`` ones."""

    own_k: Tensor
    total: int
    ring: Ring

    def own(self, values_K: Tensor) -> Tensor:
        return values_K[self.own_k]

    def whole(self, values_k: Tensor) -> Tensor:
        # each rank fills in its own entries, and the ring sums
        empty_K = values_k.new_zeros(self.total, *values_k.shape[1:])
        return _summed(empty_K.index_copy(0, self.own_k, values_k), self.ring)


def _summed(part: Tensor, ring: Ring) -> Tensor:
    total: Tensor = _Total.apply(part, ring)  # type: ignore[no-untyped-call]
    return total


class _Total(torch.autograd.Function):
    """Sum over the ring.

    All ranks compute the same loss from the result. So each rank knows the gradient of the whole and takes that of its own
    summand, without communication.
    """

    @staticmethod
    def forward(ctx: object, part: Tensor, ring: Ring) -> Tensor:
        total = part.contiguous().clone()
        ring.add_up(total)
        return total

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
