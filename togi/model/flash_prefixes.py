"""FlashAttention of a pack in which segments continue others, without a second copy of any key.

Shape letters as in ``attention``: T packed tokens, H query heads, G key/value heads, D head size; R of the tokens ask, U are
asked.

Each token sees its own segment causally, which one variable-length call does for the whole pack, and its prefixes whole: a
second call does those that continue nothing, where all that continues a prompt is one long row of queries to it; one more call
does each deeper level of a tree of turns. The parts are joined by their log-sum-exps; given the whole output and the whole
log-sum-exp the kernel's backward of a part is the part of the backward (``partial_attention``). So what is kept for the backward
is what the layer has, where gathered keys would be kept once for every continuation.

The kernels are those that come with PyTorch (``torch.nn.attention.varlen`` calls the same operators, but its gradient takes no
joined output); CUDA and half precision only. They were run on tensors without data and with a stand-in, as there was no GPU.
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
    """One call: some tokens of the pack, in pieces, ask others, in as many pieces.

    ``queries_R`` and ``keys_U``: their packed indices. ``starts_q`` and ``starts_k``: bounds of the pieces (int32).
    ``longest``: as many tokens as the longest piece of queries has, or more, and that of keys.
    """

    queries_R: Tensor
    keys_U: Tensor
    starts_q: Tensor
    starts_k: Tensor
    longest: tuple[int, int]
    causal: bool

    def attend(self, q_RHD: Tensor, k_UGD: Tensor, v_UGD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output [R, H, D] and log-sum-exp [H, R]."""
        bounds = (self.starts_q, self.starts_k, *self.longest)
        out_RHD, lse_HR, *_ = _FLASH(q_RHD, k_UGD, v_UGD, *bounds, 0.0, self.causal, False, scale=scale)
        assert lse_HR.shape == (q_RHD.shape[1], q_RHD.shape[0])
        return out_RHD, lse_HR

    def backward(
        self, grad_RHD: Tensor, inputs: tuple[Tensor, Tensor, Tensor], out_RHD: Tensor, lse_HR: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``inputs`` (q, k, v), given output and log-sum-exp over all keys of all levels."""
        bounds = (self.starts_q, self.starts_k, *self.longest)
        random = torch.zeros(2, dtype=torch.uint64, device=grad_RHD.device)  # nothing is dropped out
        unused = torch.empty(0, device=grad_RHD.device)
        grads: tuple[Tensor, Tensor, Tensor] = _FLASH_BACKWARD(
            grad_RHD, *inputs, out_RHD, lse_HR, *bounds, 0.0, self.causal, random, unused, scale=scale
        )
        return grads


@lru_cache(maxsize=8)
def levels_of(segments: Segments, device: torch.device) -> tuple[Level, ...]:
    """The calls on a pack: every segment on itself, then on what it continues, outermost first."""
    everyone = range(len(segments))
    levels = [_level(segments, [(s, [s]) for s in everyone], causal=True, device=device)]
    chains = [segments.chain(s)[:-1] for s in everyone]
    for depth in range(max(map(len, chains))):
        asking: dict[int, list[int]] = {}
        for s, chain in enumerate(chains):
            if depth < len(chain):
                asking.setdefault(chain[depth], []).append(s)
        levels.append(_level(segments, list(asking.items()), causal=False, device=device))
    return tuple(levels)


def _level(segments: Segments, pieces: list[tuple[int, list[int]]], *, causal: bool, device: torch.device) -> Level:
    """``pieces``: a segment that is asked, and those that ask it."""

    def side(pieces: list[list[int]]) -> tuple[Tensor, Tensor, int]:
        lengths = [sum(segments.lengths_S[s] for s in piece) for piece in pieces]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        index = torch.cat([segments.tokens(s) for piece in pieces for s in piece])
        return index.to(device), starts.to(device, torch.int32), max(lengths)

    queries_R, starts_q, longest_q = side([asking for _, asking in pieces])
    keys_U, starts_k, longest_k = side([[asked] for asked, _ in pieces])
    # where no piece has more than one query the kernel would take the way for decoding, which orders heads otherwise
    return Level(queries_R, keys_U, starts_q, starts_k, (max(2, longest_q), longest_k), causal)


def attend_to_prefixes(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, segments: Segments, scale: float) -> Tensor:
    """Attention of every token to its segment up to itself and to all that this continues; [T, H, D]."""
    levels = levels_of(segments, q_THD.device)
    out_THD: Tensor = _FlashPrefixes.apply(q_THD, k_TGD, v_TGD, levels, scale)  # type: ignore[no-untyped-call]
    return out_THD


class _FlashPrefixes(torch.autograd.Function):
    """The first of ``levels`` is of all tokens in order."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, levels: tuple[Level, ...], scale: float
    ) -> Tensor:
        own, *others = levels
        part_THD, lse_HT = own.attend(q_THD, k_TGD, v_TGD, scale)
        out_THD, lse_TH = full_precision(part_THD), lse_HT.t().contiguous()
        for level in others:
            rows, keys = level.queries_R, level.keys_U
            part_RHD, part_HR = level.attend(q_THD[rows], k_TGD[keys], v_TGD[keys], scale)
            out_THD[rows], lse_TH[rows] = join(out_THD[rows], lse_TH[rows], full_precision(part_RHD), part_HR.t())
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
        for level in others:
            rows, keys = level.queries_R, level.keys_U
            inputs = (q_THD[rows], k_TGD[keys], v_TGD[keys])
            grads = level.backward(grad_THD[rows], inputs, out_THD[rows], lse_TH[rows].t().contiguous(), ctx.scale)
            for total, index, grad in zip((d_q, d_k, d_v), (rows, keys, keys), grads, strict=True):
                total.index_add_(0, index, full_precision(grad))
        return d_q.to(q_THD.dtype), d_k.to(k_TGD.dtype), d_v.to(v_TGD.dtype), None, None
