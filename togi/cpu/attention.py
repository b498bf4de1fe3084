"""Attention over a pack on a CPU: all short runs by one compiled kernel (or in blocks), others by PyTorch's fused kernel.

Shape letters as in ``attention``: T packed tokens, H query heads, G key/value heads, D head size; n segments of equal length L
that see M keys.

The same numbers as one ``scaled_dot_product_attention`` a run. Autograd would keep each run's widened copies of queries, keys
and values, with those of a shared prefix once for every continuation; here they are made again in the backward, and the gradient
of a prefix is added up in float32. Of a short run no output is kept either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from togi.algo.partial_attention import Visibility, attend, attend_backward
from togi.algo.precision import wide_dtype
from togi.cpu.block_attention import attend_in_blocks, attend_in_blocks_backward, wins
from togi.cpu.kernels import SegmentSpans, kernels_for

KEYS_AT_ONCE_BYTES = 2**27
"""The kernel's backward has a float32 gradient of every key and value that a segment sees, for so many segments at once."""


class Run(Protocol):
    """``count`` segments of ``length`` tokens that continue the ``chain`` of runs, outermost first."""

    @property
    def count(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def chain(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Part:
    """One run in the pack: its tokens are ``own``, and ``context`` are those of its chain, outermost first."""

    own: slice
    context: tuple[slice, ...]
    count: int

    @property
    def length(self) -> int:
        """Of one segment."""
        tokens: int = self.own.stop - self.own.start
        return tokens // self.count

    @property
    def seen(self) -> int:
        """Keys that the last query of a segment sees."""
        before: int = sum(link.stop - link.start for link in self.context)
        return before + self.length

    def segments(self) -> Iterator[slice]:
        """The tokens of each segment."""
        return (slice(start, start + self.length) for start in range(self.own.start, self.own.stop, self.length))

    def queries(self, x_HTD: Tensor) -> Tensor:
        """[n, H, L, D] of this run's tokens."""
        return x_HTD[:, self.own].view(len(x_HTD), self.count, -1, x_HTD.shape[2]).transpose(0, 1)

    def keys(self, x_GTD: Tensor) -> Tensor:
        """[n, G, M, D]: the context, the same for each segment, and the segment's own."""
        own_nGLD = self.queries(x_GTD)
        if not self.context:
            return own_nGLD
        shared_GCD = torch.cat([x_GTD[:, link] for link in self.context], dim=1)
        return torch.cat([shared_GCD.expand(self.count, *shared_GCD.shape), own_nGLD], dim=2)

    def put(self, x_HTD: Tensor, part_nHLD: Tensor) -> None:
        """Write what ``queries`` reads."""
        self.queries(x_HTD).copy_(part_nHLD)

    def add(self, x_GTD: Tensor, part_nGMD: Tensor) -> None:
        """Add what ``keys`` reads, over the segments where they share it."""
        shared_GCD = part_nGMD[:, :, : part_nGMD.shape[2] - self.length].sum(0)
        start = 0
        for link in self.context:
            length = link.stop - link.start
            x_GTD[:, link] += shared_GCD[:, start : start + length]
            start += length
        self.queries(x_GTD).add_(part_nGMD[:, :, start:])


@lru_cache(maxsize=8)
def parts_of(runs: tuple[Run, ...]) -> list[Part]:
    """Where each run lies in the pack; the same for all layers."""
    ends = list(accumulate(run.count * run.length for run in runs))
    places = [slice(end - run.count * run.length, end) for end, run in zip(ends, runs, strict=True)]
    return [
        Part(own, tuple(places[link] for link in run.chain), run.count) for own, run in zip(places, runs, strict=True)
    ]


class HostAttention(torch.autograd.Function):
    """``query`` [H, T, D], ``key`` and ``value`` [G, T, D] to [H, T, D]; ``seen`` gives the visibility of each run."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, runs: tuple[Run, ...], seen: list[Visibility], scale: float
    ) -> Tensor:
        parts = parts_of(runs)
        # the memory order of a projection, so that the output projection reads it as it is
        out_HTD = torch.empty_like(query.transpose(0, 1), memory_format=torch.contiguous_format).transpose(0, 1)
        short = tuple(_is_short(part, visible) for part, visible in zip(parts, seen, strict=True))
        together = _together(runs, short, 2 * len(key) * key.shape[2] * 4)
        kernels = kernels_for(query, key, value, float32=True) if query.stride(2) == 1 else None
        # it gives a thread one segment and key/value head at a time, PyTorch shares out single products
        if sum(some.count for some in together) * len(key) < torch.get_num_threads():
            kernels = None
        if kernels is not None:
            for some in together:
                kernels.attention(query, key, value, some, scale, out_HTD)
        kept: list[Tensor | None] = []  # of short ones the backward needs neither
        for part, visible, is_short in zip(parts, seen, short, strict=True):
            if is_short and kernels is not None:
                kept += [None, None]
                continue
            inputs = (part.queries(query), part.keys(key), part.keys(value))
            if is_short:
                attend_in_blocks(*inputs, scale, part.queries(out_HTD))
                kept += [None, None]
                continue
            out_nHLD, lse_nHL = attend(*inputs, scale, visible)
            part.put(out_HTD, out_nHLD)
            kept += [out_nHLD, lse_nHL]  # before rounding: the backward takes differences with it
        ctx.save_for_backward(query, key, value, *kept)
        ctx.parts, ctx.seen, ctx.scale = parts, seen, scale
        ctx.kernels, ctx.together = kernels, together
        return out_HTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_HTD: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros(x.shape, dtype=wide_dtype(x), device=x.device) for x in (key, value))
        for some in ctx.together if ctx.kernels is not None else ():
            grads = (d_query, d_key, d_value)
            ctx.kernels.attention_backward(grad_HTD, (query, key, value), some, ctx.scale, grads)
        for part, visible, out_nHLD, lse_nHL in zip(ctx.parts, ctx.seen, kept[::2], kept[1::2], strict=True):
            if lse_nHL is None and ctx.kernels is not None:
                continue
            inputs = (part.queries(query), part.keys(key), part.keys(value))
            grad_nHLD = part.queries(grad_HTD)
            if lse_nHL is None:
                d_keys, d_values = attend_in_blocks_backward(grad_nHLD, *inputs, ctx.scale, part.queries(d_query))
            else:
                d_queries, d_keys, d_values = attend_backward(grad_nHLD, inputs, out_nHLD, lse_nHL, ctx.scale, visible)
                part.put(d_query, d_queries)
            part.add(d_key, d_keys)
            part.add(d_value, d_values)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


def _is_short(part: Part, visible: Visibility) -> bool:
    return visible.causal and visible.seen_LM is None and wins(part.length, part.seen)


@lru_cache(maxsize=8)
def _together(runs: tuple[Run, ...], short: tuple[bool, ...], bytes_per_key: int) -> list[SegmentSpans]:
    """The segments of all short runs, which the compiled kernel does in one call, or in several where memory is short."""
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
    query: Tensor, key: Tensor, value: Tensor, runs: tuple[Run, ...], masks: Iterator[Tensor | None], scale: float
) -> Tensor:
    """``masks``: of each run which keys its queries see, bool [L, M]; None for all up to their own places."""
    seen = [Visibility(causal=mask is None, seen_LM=mask) for mask in masks]
    out_HTD: Tensor = HostAttention.apply(query, key, value, runs, seen, scale)  # type: ignore[no-untyped-call]
    return out_HTD
