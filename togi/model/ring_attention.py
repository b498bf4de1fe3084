"""Ring attention: keys and values of each rank visit every other rank, and partial results are joined by log-sum-exp.

Liu, Zaharia & Abbeel 2023, arXiv 2310.01889, over the chunks of a segment table (``ring_layout``). Shape letters: t tokens
of this rank, b rows of a visiting block, H query heads, G key/value heads, D head size, W = D of keys + D of values;
n, L, M as in ``partial_attention``.

A chunk attends causally to itself, and to every token of the earlier chunks of its segment and of all chunks of its prefixes. So a
visit is a few plain attention calls. Chunks that attend to the same keys share one call, such as all responses to one prompt.
Chunks of equal length share the call for themselves. A rank sends only the keys that another rank needs. The next block is sent
while the present one is computed. In the backward the gradient of a block follows it around the ring and back home, in float32.

``head_stride`` key/value heads are sent at a time, so there are G / stride times as many messages, each as much smaller.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from togi.algo.partial_attention import Visibility, attend, attend_backward, join
from togi.algo.precision import Context, full_precision
from togi.batch import moved
from togi.errors import ModelError
from togi.model.attention import Asked, packed_attention, register
from togi.model.ring_layout import Chunk, Ring, RingTable, Shards

RING = "togi_ring"
_DEPENDENT_ROPE = ("dynamic", "longrope")
KEYS, GRADIENTS = 0, 1
"""The channels of messages: blocks of keys and values, and their gradients."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """``count`` attentions of one shape. ``queries_nL``: rows of this rank; ``keys_nM``: rows of the visiting block.

    ``causal``: queries and keys are the same tokens. ``positions``: positions of queries and keys in their sequence, the same for
    all ``count``. ``window``: the number of keys that a query may see, itself included; None if the window excludes no key.
    """

    queries_nL: Tensor
    keys_nM: Tensor
    count: int
    causal: bool
    window: int | None
    positions: tuple[Tensor, Tensor]

    def on(self, device: torch.device) -> Call:
        rows_nL, rows_nM, at_L, at_M = (moved(x, device) for x in (self.queries_nL, self.keys_nM, *self.positions))
        return Call(rows_nL, rows_nM, self.count, self.causal, self.window, (at_L, at_M))

    def visibility(self) -> Visibility:
        if self.window is None:
            return Visibility(self.causal)
        queries_L, keys_M = self.positions
        distance_LM = queries_L[:, None] - keys_M[None]
        seen_LM = distance_LM < self.window
        return Visibility(seen_LM=seen_LM & (distance_LM >= 0) if self.causal else seen_LM)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The work of one rank. ``visits[i]``: the calls on the block of the rank i places before; the first block is its own.

    ``sent_b``: the rows that this rank sends. ``sizes[i]``: the number of rows that the rank i places before sends.
    """

    visits: tuple[tuple[Call, ...], ...]
    sent_b: Tensor
    sizes: tuple[int, ...]


def seen_whole(shards: Shards, rank: int, source: int) -> dict[tuple[Chunk, ...], list[Chunk]]:
    """Group the chunks of ``rank`` by the chunks of ``source`` whose every token they see."""
    by_segment: dict[int, list[Chunk]] = defaultdict(list)
    for chunk in shards.chunks[source]:
        by_segment[chunk.segment].append(chunk)
    groups: dict[tuple[Chunk, ...], list[Chunk]] = {}
    for chunk in shards.chunks[rank]:
        links = shards.segments.chain(chunk.segment)
        keys = [key for link in links for key in by_segment.get(link, ())]
        seen = tuple(key for key in keys if key.segment != chunk.segment or key.end <= chunk.first)
        if seen:
            groups.setdefault(seen, []).append(chunk)
    return groups


def travelling(shards: Shards, source: int) -> list[Chunk]:
    """The chunks of ``source`` that another rank sees, which ``source`` must send."""
    others = [rank for rank in range(len(shards.chunks)) if rank != source]
    seen = {chunk for rank in others for keys in seen_whole(shards, rank, source) for chunk in keys}
    return [chunk for chunk in shards.chunks[source] if chunk in seen]


@lru_cache(maxsize=8)
def plan(shards: Shards, rank: int, window: int | None, device: torch.device) -> Plan:
    """The plan of ``rank``, with index tensors on ``device``. ``window`` counts keys, the token itself included."""
    # all on the host: sizes depend on the positions, and a device would have to be waited for
    size = len(shards.chunks)
    own = _rows(shards.chunks[rank])
    travels = [travelling(shards, (rank - step) % size) for step in range(size)]
    visits = []
    for step in range(size):
        # the own block is complete; a visiting block holds only the rows that its rank sends
        block = own if step == 0 else _rows(travels[step])
        calls = list(_diagonals(shards, rank, window)) if step == 0 else []
        for keys, queries in seen_whole(shards, rank, (rank - step) % size).items():
            calls += _call(shards, [(own[q], q) for q in queries], [(block[k], k) for k in keys], window)
        visits.append(tuple(call.on(device) for call in calls))
    sent_b = torch.cat([torch.arange(0), *(torch.arange(own[c], own[c] + len(c)) for c in travels[0])])
    return Plan(tuple(visits), moved(sent_b, device), tuple(sum(map(len, chunks)) for chunks in travels))


def _rows(chunks: Sequence[Chunk]) -> dict[Chunk, int]:
    """The first row of each chunk if the chunks are laid one after another."""
    rows, start = {}, 0
    for chunk in chunks:
        rows[chunk] = start
        start += len(chunk)
    return rows


def _positions(shards: Shards, chunk: Chunk) -> Tensor:
    before = shards.segments.context_length(chunk.segment)
    return torch.arange(before + chunk.first, before + chunk.end)


def _diagonals(shards: Shards, rank: int, window: int | None) -> Iterator[Call]:
    """Each chunk on itself, one call for each length. Every row is in exactly one of these calls."""
    by_length: dict[int, list[Tensor]] = defaultdict(list)
    for chunk, start in _rows(shards.chunks[rank]).items():
        by_length[len(chunk)].append(torch.arange(start, start + len(chunk)))
    for length, runs in by_length.items():
        rows, places = torch.cat(runs), torch.arange(length)
        cut = window if window is not None and window < length else None
        yield Call(rows, rows, len(runs), causal=True, window=cut, positions=(places, places))


def _call(
    shards: Shards,
    queries: Sequence[tuple[int, Chunk]],
    keys: Sequence[tuple[int, Chunk]],
    window: int | None,
) -> Iterator[Call]:
    """One call, from (first row, chunk) pairs, without queries and keys that the window excludes. May yield none."""
    rows_L, rows_M = (torch.cat([torch.arange(start, start + len(c)) for start, c in part]) for part in (queries, keys))
    at_L, at_M = (torch.cat([_positions(shards, c) for _, c in part]) for part in (queries, keys))
    if window is not None:
        # drop queries that see none of the keys, and keys that no query sees
        near_L, near_M = at_L - at_M.max() < window, at_L.min() - at_M < window
        rows_L, at_L, rows_M, at_M = rows_L[near_L], at_L[near_L], rows_M[near_M], at_M[near_M]
    if len(rows_L) > 0:
        # a mask only if the window still cuts between some query and some key
        cut = window if window is not None and window <= int(at_L.max() - at_M.min()) else None
        yield Call(rows_L, rows_M, 1, causal=False, window=cut, positions=(at_L, at_M))


def refuse_ring(config: PreTrainedConfig, head_stride: int) -> None:
    """Raise ModelError if a model with this Transformers config does not support ring attention."""
    if config.num_key_value_heads % head_stride != 0:
        raise ModelError(
            f"--ring_head_stride {head_stride} does not divide the {config.num_key_value_heads} key/value heads of the model: "
            "choose a divisor."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {kind for kind in _DEPENDENT_ROPE if kind in str(rope)}
    if kinds:
        raise ModelError(
            f"The model's rotary embedding ({kinds.pop()}) depends on the longest position of a forward, which differs between "
            "the ranks of a ring: leave --ring_attn_size out."
        )


@packed_attention
def ring_attention(q_HtD: Tensor, k_GtD: Tensor, v_GtD: Tensor, table: RingTable, asked: Asked) -> Tensor:
    """All ranks call together. Raises ModelError for capped attention scores."""
    if asked.softcap is not None:
        raise ModelError(
            f"{asked.name} caps its attention scores (attn_logit_softcapping), which --ring_attn_size cannot do: "
            "leave --ring_attn_size out."
        )
    q_tHD, k_tGD, v_tGD = (x.transpose(0, 1) for x in (q_HtD, k_GtD, v_GtD))
    todo = plan(table.shards, table.ring.rank, asked.window, q_tHD.device)
    out_tHD: Tensor = _RingAttention.apply(
        q_tHD, torch.cat([k_tGD, v_tGD], dim=-1), k_tGD.shape[-1], asked.scale, todo, table
    )  # type: ignore[no-untyped-call]
    return out_tHD


class _RingAttention(torch.autograd.Function):
    """From queries [t, H, D] and keys with values [t, G, W] to outputs [t, H, D]."""

    @staticmethod
    def forward(
        ctx: Context[tuple[int, float, Plan, RingTable]],
        q_tHD: Tensor,
        kv_tGW: Tensor,
        width: int,
        scale: float,
        todo: Plan,
        table: RingTable,
    ) -> Tensor:
        wide = full_precision(q_tHD.new_empty(0))
        out_tHD = wide.new_empty(*q_tHD.shape[:2], kv_tGW.shape[2] - width)
        lse_tH = wide.new_empty(q_tHD.shape[:2])
        for queries, keys in _head_groups(q_tHD, kv_tGW, table.head_stride):
            out, lse = out_tHD[:, queries], lse_tH[:, queries]  # views of the results: the calls below write into them
            for step, block in _blocks(kv_tGW[:, keys], todo, table.ring):
                for call in todo.visits[step]:
                    part, part_lse = _attend(q_tHD[:, queries], block, call, width, scale)
                    rows = call.queries_nL
                    # the causal calls come first and write every row once: all later calls join their part to it
                    if not call.causal:
                        part, part_lse = join(out[rows], lse[rows], part, part_lse)
                    out[rows], lse[rows] = part, part_lse
        narrow_tHD = out_tHD.to(q_tHD.dtype)
        # no visiting block is kept: the backward sends them around again
        ctx.save_for_backward(q_tHD, kv_tGW, narrow_tHD, lse_tH)
        ctx.fixed = (width, scale, todo, table)
        return narrow_tHD

    @staticmethod
    def backward(ctx: Context[tuple[int, float, Plan, RingTable]], grad_tHD: Tensor) -> tuple[Tensor | None, ...]:
        q_tHD, kv_tGW, out_tHD, lse_tH = ctx.saved_tensors
        width, scale, todo, table = ctx.fixed
        grad_q_tHD = torch.zeros_like(full_precision(q_tHD))
        grad_kv_tGW = torch.empty_like(full_precision(kv_tGW))
        for queries, keys in _head_groups(q_tHD, kv_tGW, table.head_stride):
            own = [x[:, queries] for x in (q_tHD, grad_tHD, out_tHD, lse_tH)]
            blocks = ((block, todo.visits[step]) for step, block in _blocks(kv_tGW[:, keys], todo, table.ring))
            grads = _gradients(own, blocks, grad_q_tHD[:, queries], width, scale)
            grad_kv_tGW[:, keys] = _return_home(grads, todo, table.ring)
        return grad_q_tHD.to(q_tHD.dtype), grad_kv_tGW.to(kv_tGW.dtype), None, None, None, None


def _head_groups(q_tHD: Tensor, kv_tGW: Tensor, stride: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of query heads and of the ``stride`` key/value heads that they read."""
    repeats = q_tHD.shape[1] // kv_tGW.shape[1]
    for first in range(0, kv_tGW.shape[1], stride):
        yield slice(first * repeats, (first + stride) * repeats), slice(first, first + stride)


def _blocks(own_tgW: Tensor, todo: Plan, ring: Ring) -> Iterator[tuple[int, Tensor]]:
    """Yield (step, block): the own block, then the visiting ones. The next block is received while the caller computes."""
    arriving = ring.pass_on(own_tgW.index_select(0, todo.sent_b), todo.sizes[1], KEYS)
    yield 0, own_tgW
    for step in range(1, ring.size):
        block = arriving()
        if step + 1 < ring.size:
            arriving = ring.pass_on(block, todo.sizes[step + 1], KEYS)
        yield step, block


def _shaped(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """Rows [n x L, heads, ...] of a tensor as [n, heads, L, ...]."""
    return rows.index_select(0, index).view(count, -1, *rows.shape[1:]).transpose(1, 2)


def _flat(part_nHLD: Tensor) -> Tensor:
    """The reverse: [n, heads, L, ...] as [n x L, heads, ...]."""
    return part_nHLD.transpose(1, 2).flatten(0, 1)


def _attend(q_tHD: Tensor, block_bgW: Tensor, call: Call, width: int, scale: float) -> tuple[Tensor, Tensor]:
    """Output [n x L, H, D] and log-sum-exp [n x L, H] of one call."""
    q = _shaped(q_tHD, call.queries_nL, call.count)
    kv = _shaped(block_bgW, call.keys_nM, call.count)
    out, lse = attend(q, kv[..., :width], kv[..., width:], scale, call.visibility())
    return _flat(out), _flat(lse)


def _gradients(
    own: Sequence[Tensor],
    blocks: Iterable[tuple[Tensor, Sequence[Call]]],
    grad_q_tHD: Tensor,
    width: int,
    scale: float,
) -> Iterator[Tensor]:
    """Yield the gradient of each block from this rank's queries, [b, g, W]. Adds the gradient of the queries to ``grad_q_tHD``.

    ``own``: queries of some heads, the gradient of their output, that output and its log-sum-exp, both over all keys.
    """
    for block_bgW, calls in blocks:
        grad_block_bgW = torch.zeros_like(full_precision(block_bgW))
        for call in calls:
            q, grad, out, lse = (_shaped(x, call.queries_nL, call.count) for x in own)
            kv = _shaped(block_bgW, call.keys_nM, call.count)
            inputs = (q, kv[..., :width], kv[..., width:])
            grad_q, grad_k, grad_v = attend_backward(grad, inputs, out, lse.contiguous(), scale, call.visibility())
            grad_q_tHD.index_add_(0, call.queries_nL, _flat(grad_q))
            grad_block_bgW.index_add_(0, call.keys_nM, _flat(torch.cat([grad_k, grad_v], dim=-1)))
        yield grad_block_bgW


def _return_home(grads: Iterator[Tensor], todo: Plan, ring: Ring) -> Tensor:
    """The gradient of this rank's block from the queries of all ranks. ``grads``: those of all blocks from its own queries.

    The gradient of a block starts on the first rank that the block visits. Each rank adds its share and passes the gradient on,
    one step behind the block, until it is home.
    """
    # the share of the own queries stays here; the gradient of the first visitor is sent on
    own_grad_tgW = next(grads)
    arriving = ring.pass_on(next(grads), todo.sizes[2 % ring.size], GRADIENTS)
    # add what the rank before collected for this block
    for step, grad in enumerate(grads, start=2):
        arriving = ring.pass_on(grad.add_(arriving()), todo.sizes[(step + 1) % ring.size], GRADIENTS)
    return own_grad_tgW.index_add_(0, todo.sent_b, arriving())


register(RING, ring_attention)
