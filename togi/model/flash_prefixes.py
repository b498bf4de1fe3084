"""FlashAttention over a pack with shared prefixes, without a second copy of any key.

Shape letters as in ``attention``: T packed tokens, H query heads, G key/value heads, D head size. In one call R of the tokens are
queries and U are keys.

Each token attends causally to its own segment: one variable-length call for the whole pack. It attends to all tokens of its
prefixes: a second call for the outermost prefixes, where all continuations of a prompt are one long row of queries; one more call
for each deeper level of a tree of turns. The partial results are joined by their log-sum-exps. Given the joined output and
log-sum-exp, the kernel's backward of a part is that part of the whole gradient (``partial_attention``). So the backward keeps only
the layer's own tensors. Gathered keys would be kept once for every continuation.

The kernels come with PyTorch, for CUDA and half precision only. (``torch.nn.attention.varlen`` calls the same operators, but its
gradient takes no joined output.) They were tested on tensors without data and with a stand-in, as there was no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from togi.algo.partial_attention import join
from togi.algo.precision import full_precision
from togi.batch import Segments

_FLASH = torch.ops.aten._flash_attention_forward
_FLASH_BACKWARD = torch.ops.aten._flash_attention_backward


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """One kernel call: pieces of queries, each of which attends to the piece of keys at the same place.

    ``queries_R`` and ``keys_U``: packed indices of the tokens. ``starts_q`` and ``starts_k``: bounds of the pieces (int32).
    ``longest``: upper bounds on the tokens in a piece of queries and in a piece of keys.
    """

    queries_R: Tensor
    keys_U: Tensor
    starts_q: Tensor
    starts_k: Tensor
    longest: tuple[int, int]
    causal: bool

    def attend(self, q_RHD: Tensor, k_UGD: Tensor, v_UGD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of this level alone. Returns the output [R, H, D] and the log-sum-exp [H, R]."""
        bounds = (self.starts_q, self.starts_k, *self.longest)
        out_RHD, lse_HR, *_ = _FLASH(q_RHD, k_UGD, v_UGD, *bounds, 0.0, self.causal, False, scale=scale)
        assert lse_HR.shape == (q_RHD.shape[1], q_RHD.shape[0])
        return out_RHD, lse_HR

    def backward(
        self, grad_RHD: Tensor, inputs: tuple[Tensor, Tensor, Tensor], out_RHD: Tensor, lse_HR: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``inputs`` (q, k, v). ``out_RHD`` and ``lse_HR`` are those over the keys of all levels."""
        bounds = (self.starts_q, self.starts_k, *self.longest)
        random = torch.zeros(2, dtype=torch.uint64, device=grad_RHD.device)  # no dropout: the seed is not used
        unused = torch.empty(0, device=grad_RHD.device)
        grads: tuple[Tensor, Tensor, Tensor] = _FLASH_BACKWARD(
            grad_RHD, *inputs, out_RHD, lse_HR, *bounds, 0.0, self.causal, random, unused, scale=scale
        )
        return grads


@lru_cache(maxsize=8)
def levels_of(segments: Segments, device: torch.device) -> tuple[Level, ...]:
    """The calls for a pack: first every segment on itself, then on its prefixes, outermost first."""
    everyone = range(len(segments))
    levels = [_level(segments, [(s, [s]) for s in everyone], causal=True, device=device)]
    chains = [segments.chain(s)[:-1] for s in everyone]
    for depth in range(max(map(len, chains))):
        # one piece for each prefix at this depth: all segments below it are its queries
        asking: dict[int, list[int]] = {}
        for s, chain in enumerate(chains):
            if depth < len(chain):
                asking.setdefault(chain[depth], []).append(s)
        levels.append(_level(segments, list(asking.items()), causal=False, device=device))
    return tuple(levels)


def _level(segments: Segments, pieces: list[tuple[int, list[int]]], *, causal: bool, device: torch.device) -> Level:
    """``pieces``: the segment of the keys, and the segments of the queries."""

    def side(pieces: list[list[int]]) -> tuple[Tensor, Tensor, int]:
        lengths = [sum(segments.lengths_S[s] for s in piece) for piece in pieces]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        index = torch.cat([segments.tokens(s) for piece in pieces for s in piece])
        return index.to(device), starts.to(device, torch.int32), max(lengths)

    queries_R, starts_q, longest_q = side([asking for _, asking in pieces])
    keys_U, starts_k, longest_k = side([[asked] for asked, _ in pieces])
    # at least 2: with one query a piece the kernel takes its path for decoding, which orders heads differently
    return Level(queries_R, keys_U, starts_q, starts_k, (max(2, longest_q), longest_k), causal)


def attend_to_prefixes(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, segments: Segments, scale: float) -> Tensor:
    """Attention of every token to its segment up to itself and to all prefixes of that segment. Returns [T, H, D]."""
    levels = levels_of(segments, q_THD.device)
    out_THD: Tensor = _FlashPrefixes.apply(q_THD, k_TGD, v_TGD, levels, scale)  # type: ignore[no-untyped-call]
    return out_THD


class _FlashPrefixes(torch.autograd.Function):
    """The first of ``levels`` holds all tokens in their order; the others hold some of them."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, levels: tuple[Level, ...], scale: float
    ) -> Tensor:
        own, *others = levels
        # each token on its own segment, then the result of each level of prefixes joined in
        part_THD, lse_HT = own.attend(q_THD, k_TGD, v_TGD, scale)
        out_THD, lse_TH = full_precision(part_THD), lse_HT.t().contiguous()
        for level in others:
            rows, keys = level.queries_R, level.keys_U
            part_RHD, part_HR = level.attend(q_THD[rows], k_TGD[keys], v_TGD[keys], scale)
            out_THD[rows], lse_TH[rows] = join(out_THD[rows], lse_TH[rows], full_precision(part_RHD), part_HR.t())
        # joined in float32, rounded once
        narrow_THD = out_THD.to(q_THD.dtype)
        ctx.save_for_backward(q_THD, k_TGD, v_TGD, narrow_THD, lse_TH)
        ctx.levels, ctx.scale = levels, scale
        return narrow_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_TGD, v_TGD, out_THD, lse_TH = ctx.saved_tensors
        own, *others = ctx.levels
        whole = own.backward(grad_THD, (q_THD, k_TGD, v_TGD), out_THD, lse_TH.t().contiguous(), ctx.scale)
        d_q, d_k, d_v = (full_precision(x) for x in whole)
        # sum over levels in float32: a token is a query and a key in several of them
        for level in others:
            rows, keys = level.queries_R, level.keys_U
            inputs = (q_THD[rows], k_TGD[keys], v_TGD[keys])
            grads = level.backward(grad_THD[rows], inputs, out_THD[rows], lse_TH[rows].t().contiguous(), ctx.scale)
            for total, index, grad in zip((d_q, d_k, d_v), (rows, keys, keys), grads, strict=True):
                total.index_add_(0, index, full_precision(grad))
        return d_q.to(q_THD.dtype), d_k.to(k_TGD.dtype), d_v.to(v_TGD.dtype), None, None
