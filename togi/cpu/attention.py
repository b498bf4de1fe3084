"""Attention on CPUs: over cached keys, over packed segments block by block, and how texts are cut into blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from togi.algo.partial_attention import Run, Visibility, attend, attend_backward, visible_keys, window_of
from togi.algo.precision import Context, wide_dtype
from togi.cpu.kernels import HostKernels, SegmentSpans, kernels_for

BLOCK_ELEMENTS = 2**17
"""Float32 values of a block: half a megabyte. A backward holds three blocks."""


def norm(x_TH: Tensor, weight_H: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The output [T, H], and ``1 / sqrt(mean(x^2) + epsilon)`` [T, 1] in float32 for the functions below."""
    out_TH = torch.empty_like(x_TH)
    scale_T1 = torch.empty(len(x_TH), 1, dtype=torch.float32)
    for rows in _blocks(*x_TH.shape):
        block = x_TH[rows].float()
        torch.rsqrt(block.pow(2).mean(-1, keepdim=True).add_(epsilon), out=scale_T1[rows])
        torch.mul(weight_H, (block * scale_T1[rows]).to(x_TH.dtype), out=out_TH[rows])
    return out_TH, scale_T1


def norm_again(x_TH: Tensor, weight_H: Tensor, scale_T1: Tensor) -> Tensor:
    """The output again, from the scale of ``norm``."""
    out_TH = torch.empty_like(x_TH)
    for rows in _blocks(*x_TH.shape):
        torch.mul(weight_H, (x_TH[rows].float() * scale_T1[rows]).to(x_TH.dtype), out=out_TH[rows])
    return out_TH


def norm_backward(grad_TH: Tensor, x_TH: Tensor, weight_H: Tensor, scale_T1: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x [T, H], and that of the weight [H] in float32."""
    d_x_TH = torch.empty_like(x_TH)
    d_weight_H = torch.zeros_like(weight_H, dtype=torch.float32)
    wide_H = weight_H.float()
    for rows in _blocks(*x_TH.shape):
        normal = x_TH[rows].float() * scale_T1[rows]
        slope = grad_TH[rows].float()
        d_weight_H += (slope * normal).sum(0)
        slope = slope * wide_H
        # the norm takes out the part of the gradient along x
        along = (slope * normal).mean(-1, keepdim=True)
        d_x_TH[rows] = slope.sub_(normal.mul_(along)).mul_(scale_T1[rows])
    return d_x_TH, d_weight_H


def gate(gate_TH: Tensor, up_TH: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    out_TH = torch.empty_like(gate_TH)
    for rows in _blocks(*gate_TH.shape):
        torch.mul(silu(gate_TH[rows]), up_TH[rows], out=out_TH[rows])
    return out_TH


def gate_backward(grad_TH: Tensor, gate_TH: Tensor, up_TH: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    d_gate_TH, d_up_TH = torch.empty_like(gate_TH), torch.empty_like(up_TH)
    for rows in _blocks(*gate_TH.shape):
        wide, slope = gate_TH[rows].float(), grad_TH[rows].float()
        d_gate_TH[rows] = torch.ops.aten.silu_backward(slope * up_TH[rows], wide)
        d_up_TH[rows] = silu(wide).mul_(slope)
    return d_gate_TH, d_up_TH


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // width)
    return (slice(start, start + step) for start in range(0, rows, step))


# With more queries or keys the fused kernel, which tiles both, is faster (torch 2.13, AVX512).
LONGEST, MOST_KEYS = 512, 1024
BLOCK_QUERIES = 48
MASK_ELEMENTS = 2**19
"""Scores of a block over all heads of the sequences of one call: two megabytes."""


def wins(queries: int, keys: int) -> bool:
    """Whether this is faster than the fused kernel for ``queries`` at the end of a sequence of ``keys``."""
    return queries <= LONGEST and keys <= MOST_KEYS


def attend_in_blocks(q_nHLD: Tensor, k_nGMD: Tensor, v_nGMD: Tensor, scale: float, out_nHLD: Tensor) -> None:
    """Write the output to ``out_nHLD``. Query i sees the keys up to M - L + i."""
    out_nGLrD = _by_queries(out_nHLD, k_nGMD.shape[1])
    for some in _some(q_nHLD, k_nGMD, v_nGMD, scale):
        for rows, seen in some.blocks():
            part = torch.bmm(some.weights(some.rows(some.q, rows), seen), some.v[:, :seen])
            some.put(out_nGLrD, rows, part)


def attend_in_blocks_backward(
    grad_nHLD: Tensor, q_nHLD: Tensor, k_nGMD: Tensor, v_nGMD: Tensor, scale: float, d_q_nHLD: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the gradient of q to ``d_q_nHLD`` and return those of k and v. ``grad_nHLD`` is that of the output."""
    groups = k_nGMD.shape[1]
    grad_nGLrD, d_q_nGLrD = _by_queries(grad_nHLD, groups), _by_queries(d_q_nHLD, groups)
    d_k, d_v = (torch.zeros(x.shape, dtype=wide_dtype(x)) for x in (k_nGMD, v_nGMD))
    for some in _some(q_nHLD, k_nGMD, v_nGMD, scale):
        grad, own_d_k, own_d_v = _copy(grad_nGLrD[some.place]), some.own(d_k), some.own(d_v)
        for rows, seen in some.blocks():
            own_q, own_grad = some.rows(some.q, rows), some.rows(grad, rows)
            weights = some.weights(own_q, seen)
            # dV += P' dO
            own_d_v[:, :seen].baddbmm_(weights.transpose(1, 2), own_grad)
            d_weights = torch.bmm(own_grad, some.v[:, :seen].transpose(1, 2))
            # dS = P (dP - sum P dP); then dQ = dS K and dK += dS' Q
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(scale)
            some.put(d_q_nGLrD, rows, torch.bmm(d_scores, some.k[:, :seen]))
            own_d_k[:, :seen].baddbmm_(d_scores.transpose(1, 2), own_q)
    return d_k, d_v


@dataclass(frozen=True, slots=True, eq=False)
class _Some:
    """The sequences at ``place``: ``q`` [c, G, L, r, D], ``k`` and ``v`` [cG, M, D], contiguous and in full precision."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    place: slice

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Yield the queries of a block, and the number of keys that the last of them sees."""
        queries = self.q.shape[2]
        before = self.k.shape[1] - queries
        for start in range(0, queries, BLOCK_QUERIES):
            stop = min(queries, start + BLOCK_QUERIES)
            yield slice(start, stop), before + stop

    def rows(self, x: Tensor, queries: slice) -> Tensor:
        """The rows of some queries of a tensor shaped like ``q``, [cG, B r, D]."""
        return x[:, :, queries].flatten(2, 3).flatten(0, 1)

    def own(self, x_nGMD: Tensor) -> Tensor:
        """The entries of these sequences, [cG, M, D]."""
        return x_nGMD[self.place].flatten(0, 1)

    def put(self, x_nGLrD: Tensor, queries: slice, part: Tensor) -> None:
        """Write ``part`` to the places that ``rows`` reads."""
        own = x_nGLrD[self.place, :, queries]
        own.copy_(part.view(own.shape))

    def weights(self, own_q: Tensor, seen: int) -> Tensor:
        """Softmax of the scores of a block's rows, [cG, B r, seen]."""
        scores = torch.bmm(own_q, self.k[:, :seen].transpose(1, 2)).mul_(self.scale)
        repeats = self.q.shape[3]
        length = own_q.shape[1] // repeats
        # only the last keys need a mask: all queries of the block see the others
        later = torch.full((length, length), -torch.inf, dtype=scores.dtype).triu_(1)
        scores[..., seen - length :].add_(later.repeat_interleave(repeats, 0))
        return torch.softmax(scores, dim=-1)


def _some(q_nHLD: Tensor, k_nGMD: Tensor, v_nGMD: Tensor, scale: float) -> Iterator[_Some]:
    """Yield a few sequences at a time: few enough that a block has many queries of each."""
    count, heads, keys = len(q_nHLD), q_nHLD.shape[1], k_nGMD.shape[2]
    q_nGLrD = _by_queries(q_nHLD, k_nGMD.shape[1])
    step = max(1, MASK_ELEMENTS // (heads * keys * BLOCK_QUERIES))
    for start in range(0, count, step):
        place = slice(start, start + step)
        k, v = (_copy(x[place]).flatten(0, 1) for x in (k_nGMD, v_nGMD))
        yield _Some(_copy(q_nGLrD[place]), k, v, scale, place)


def _by_queries(x_nHLD: Tensor, groups: int) -> Tensor:
    """A view [n, G, L, r, D]: the query heads of a key/value head are next to each other."""
    n, heads, queries, width = x_nHLD.shape
    return x_nHLD.view(n, groups, heads // groups, queries, width).transpose(2, 3)


def _copy(x: Tensor) -> Tensor:
    """A contiguous copy in full precision, in one pass."""
    return torch.empty(x.shape, dtype=wide_dtype(x)).copy_(x)


KEYS_AT_ONCE_BYTES = 2**27
"""Limit on the buffer of the kernel's backward: float32 gradients of the keys and values that the segments of a call see."""


@dataclass(frozen=True, slots=True)
class Part:
    """One run in the pack: ``own`` is the slice of its tokens, ``context`` the slices of its prefixes, outermost first."""

    own: slice
    context: tuple[slice, ...]
    count: int

    @property
    def length(self) -> int:
        """The number of tokens of one segment."""
        tokens: int = self.own.stop - self.own.start
        return tokens // self.count

    @property
    def seen(self) -> int:
        """The number of keys that the last query of a segment sees."""
        before: int = sum(link.stop - link.start for link in self.context)
        return before + self.length

    def segments(self) -> Iterator[slice]:
        """Yield the slice of each segment's tokens."""
        return (slice(start, start + self.length) for start in range(self.own.start, self.own.stop, self.length))

    def queries(self, x_HTD: Tensor) -> Tensor:
        """The entries of this run's tokens, a view [n, H, L, D]."""
        return x_HTD[:, self.own].view(len(x_HTD), self.count, -1, x_HTD.shape[2]).transpose(0, 1)

    def keys(self, x_GTD: Tensor) -> Tensor:
        """The keys that each segment sees, [n, G, M, D]: the context, the same for all, and its own."""
        own_nGLD = self.queries(x_GTD)
        if not self.context:
            return own_nGLD
        shared_GCD = torch.cat([x_GTD[:, link] for link in self.context], dim=1)
        return torch.cat([shared_GCD.expand(self.count, *shared_GCD.shape), own_nGLD], dim=2)

    def add(self, x_GTD: Tensor, part_nGMD: Tensor) -> None:
        """Add ``part`` to the places that ``keys`` reads. The context gets the sum over segments."""
        shared_GCD = part_nGMD[:, :, : part_nGMD.shape[2] - self.length].sum(0)
        start = 0
        for link in self.context:
            length = link.stop - link.start
            x_GTD[:, link] += shared_GCD[:, start : start + length]
            start += length
        self.queries(x_GTD).add_(part_nGMD[:, :, start:])


@lru_cache(maxsize=8)
def parts_of(runs: tuple[Run, ...]) -> list[Part]:
    """The place of each run in the pack. Cached, since it is the same for all layers."""
    ends = list(accumulate(run.count * run.length for run in runs))
    places = [slice(end - run.count * run.length, end) for end, run in zip(ends, runs, strict=True)]
    return [
        Part(own, tuple(places[link] for link in run.chain), run.count) for own, run in zip(places, runs, strict=True)
    ]


_Plan = tuple[list[Part], list[Visibility], HostKernels | None, list[SegmentSpans], float]


class HostAttention(torch.autograd.Function):
    """``query`` [H, T, D], ``key`` and ``value`` [G, T, D] to [H, T, D]. ``seen`` is the visibility of each run."""

    @staticmethod
    def forward(
        ctx: Context[_Plan],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        runs: tuple[Run, ...],
        seen: list[Visibility],
        scale: float,
    ) -> Tensor:
        parts = parts_of(runs)
        # token-major memory: the output projection reads it without a copy
        out_HTD = torch.empty_like(query.transpose(0, 1), memory_format=torch.contiguous_format).transpose(0, 1)
        # short runs: one call of the C kernel, if it fits the tensors and keeps all threads busy
        short = tuple(
            visible.causal and visible.seen_LM is None and wins(part.length, part.seen)
            for part, visible in zip(parts, seen, strict=True)
        )
        together = _together(runs, short, 2 * len(key) * key.shape[2] * 4)
        kernels = kernels_for(query, key, value, float32=True) if query.stride(2) == 1 else None
        # the C kernel needs a segment and key/value head for each thread; PyTorch splits single products over threads
        if sum(some.count for some in together) * len(key) < torch.get_num_threads():
            kernels = None
        if kernels is not None:
            for some in together:
                kernels.attention(query, key, value, some, scale, out_HTD)
        # the other runs one by one, and short ones too without the C kernel
        kept: list[Tensor | None] = []  # short runs keep neither output nor log-sum-exp
        for part, visible, is_short in zip(parts, seen, short, strict=True):
            if is_short:
                kept += [None, None]
                if kernels is not None:
                    continue
            inputs = (part.queries(query), part.keys(key), part.keys(value))
            if is_short:
                attend_in_blocks(*inputs, scale, part.queries(out_HTD))
                continue
            out_nHLD, lse_nHL = attend(*inputs, scale, visible)
            part.queries(out_HTD).copy_(out_nHLD)
            kept += [out_nHLD, lse_nHL]  # before rounding: the backward subtracts with it
        ctx.save_for_backward(query, key, value, *kept)
        ctx.fixed = parts, seen, kernels, together, scale
        return out_HTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[_Plan], grad_HTD: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        kept: list[Tensor | None] = list(saved)
        parts, seen, kernels, together, scale = ctx.fixed
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros(x.shape, dtype=wide_dtype(x), device=x.device) for x in (key, value))
        # short runs in one call, as in the forward; the gradients of shared keys add up in float32
        if kernels is not None:
            for some in together:
                kernels.attention_backward(grad_HTD, (query, key, value), some, scale, (d_query, d_key, d_value))
        for part, visible, out_nHLD, lse_nHL in zip(parts, seen, kept[::2], kept[1::2], strict=True):
            if lse_nHL is None and kernels is not None:
                continue
            inputs = (part.queries(query), part.keys(key), part.keys(value))
            grad_nHLD = part.queries(grad_HTD)
            if out_nHLD is None or lse_nHL is None:
                d_keys, d_values = attend_in_blocks_backward(grad_nHLD, *inputs, scale, part.queries(d_query))
            else:
                d_queries, d_keys, d_values = attend_backward(grad_nHLD, inputs, out_nHLD, lse_nHL, scale, visible)
                part.queries(d_query).copy_(d_queries)
            part.add(d_key, d_keys)
            part.add(d_value, d_values)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


@lru_cache(maxsize=8)
def _together(runs: tuple[Run, ...], short: tuple[bool, ...], bytes_per_key: int) -> list[SegmentSpans]:
    """The segments of all short runs, in one call of the C kernel, or in more calls if ``KEYS_AT_ONCE_BYTES`` requires it."""
    found: list[SegmentSpans] = []
    spans, bounds, keys = list[tuple[int, int]](), [0], 0
    for part, is_short in zip(parts_of(runs), short, strict=True):
        for own in part.segments() if is_short else ():
            if spans and (keys + part.seen) * bytes_per_key > KEYS_AT_ONCE_BYTES:
                found.append(SegmentSpans(torch.tensor(spans), torch.tensor(bounds)))
                spans, bounds, keys = [], [0], 0
            spans += [(link.start, link.stop) for link in (*part.context, own)]
            bounds.append(len(spans))
            keys += part.seen
    return [*found, SegmentSpans(torch.tensor(spans), torch.tensor(bounds))] if spans else found


def host_attention(
    query: Tensor, key: Tensor, value: Tensor, runs: tuple[Run, ...], window: int | None, scale: float
) -> Tensor:
    """``query`` [H, T, D], ``key`` and ``value`` [G, T, D]; returns [H, T, D]. ``window``: the keys that a token sees at most."""
    # masks only where the window cuts: the C kernel and the blocks need none for a causal run
    masks = (
        None if window_of(window, part.seen) is None else visible_keys(part.length, part.seen, window, query.device)
        for part in parts_of(runs)
    )
    seen = [Visibility(causal=mask is None, seen_LM=mask) for mask in masks]
    out_HTD: Tensor = HostAttention.apply(query, key, value, runs, seen, scale)  # type: ignore[no-untyped-call]
    return out_HTD
