"""Attention over a pack on a CPU: all short runs by one C kernel (or in blocks), others by PyTorch's fused kernel.

Shape letters as in ``togi.model.attention``: T packed tokens, H query heads, G key/value heads, D head size; n segments of
equal length L that see M keys.

The results equal one ``scaled_dot_product_attention`` a run. Autograd would keep float32 copies of queries, keys and values of
each run, and those of a shared prefix once for every continuation. Here the backward makes these copies again, and sums the
gradient of a prefix in float32. A short run keeps no output either.
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
"""Limit on the buffer of the kernel's backward: float32 gradients of the keys and values that the segments of a call see."""


class Run(Protocol):
    """``count`` segments of ``length`` tokens, which share the ``chain`` of prefix runs, outermost first."""

    @property
    def count(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def chain(self) -> tuple[int, ...]: ...


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

    def put(self, x_HTD: Tensor, part_nHLD: Tensor) -> None:
        """Write ``part`` to the places that ``queries`` reads."""
        self.queries(x_HTD).copy_(part_nHLD)

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


class HostAttention(torch.autograd.Function):
    """``query`` [H, T, D], ``key`` and ``value`` [G, T, D] to [H, T, D]. ``seen`` is the visibility of each run."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, runs: tuple[Run, ...], seen: list[Visibility], scale: float
    ) -> Tensor:
        parts = parts_of(runs)
        # token-major memory: the output projection reads it without a copy
        out_HTD = torch.empty_like(query.transpose(0, 1), memory_format=torch.contiguous_format).transpose(0, 1)
        # short runs: one call of the C kernel, if it fits the tensors and keeps all threads busy
        short = tuple(_is_short(part, visible) for part, visible in zip(parts, seen, strict=True))
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
            kept += [out_nHLD, lse_nHL]  # before rounding: the backward subtracts with it
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
        # short runs in one call, as in the forward; the gradients of shared keys add up in float32
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
    query: Tensor, key: Tensor, value: Tensor, runs: tuple[Run, ...], masks: Iterator[Tensor | None], scale: float
) -> Tensor:
    """``query`` [H, T, D], ``key`` and ``value`` [G, T, D]; returns [H, T, D].

    ``masks``: for each run the keys that its queries see, bool [L, M]; None for a causal run.
    """
    seen = [Visibility(causal=mask is None, seen_LM=mask) for mask in masks]
    out_HTD: Tensor = HostAttention.apply(query, key, value, runs, seen, scale)  # type: ignore[no-untyped-call]
    return out_HTD
