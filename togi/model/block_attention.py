"""Causal attention of short sequences on a CPU: some queries at a time against all keys that they see.

Shape letters as in ``partial_attention``; B queries of a block, r query heads to a key/value head.

The scores of a block fit in the processor's cache, and its products and softmax are one call each, which for short sequences
takes a third less time than PyTorch's fused kernel. Nothing is kept for the backward but the inputs: it computes the weights P
again, and with dP = dO V' the gradient of the scores is dS = P (dP - sum P dP), which needs no output. Everything is float32
(float64 from float64) whatever the inputs are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from togi.model.logprob_head import full_precision

# Where blocks win (torch 2.13, AVX512): at more keys the fused kernel tiles these too, and before a context that is longer than
# the queries it wastes no more than blocks do.
LONGEST = 512
BLOCK_ELEMENTS = 2**17
"""Scores of a block over all heads: half a megabyte."""
FEWEST_QUERIES = 16


def wins(queries: int, keys: int) -> bool:
    """Whether ``queries`` that end a sequence of ``keys`` are better done here."""
    return keys - queries <= queries <= LONGEST


def attend_in_blocks(q_nHLD: Tensor, k_nGMD: Tensor, v_nGMD: Tensor, scale: float) -> Tensor:
    """Output [n, H, L, D]; query i sees the keys up to M - L + i."""
    inputs = _Grouped.of(q_nHLD, k_nGMD, v_nGMD)
    out = torch.empty_like(inputs.q)
    for rows, seen in inputs.blocks():
        weights = inputs.weights(inputs.rows_of(inputs.q, rows), seen, scale)
        part = torch.bmm(weights, inputs.v[:, :seen])
        out[:, :, rows] = part.view(out[:, :, rows].shape)
    return out.view(q_nHLD.shape)


def attend_in_blocks_backward(
    grad_nHLD: Tensor, q_nHLD: Tensor, k_nGMD: Tensor, v_nGMD: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the output."""
    inputs = _Grouped.of(q_nHLD, k_nGMD, v_nGMD)
    grad = full_precision(grad_nHLD).reshape(inputs.q.shape)
    d_q, d_k, d_v = torch.empty_like(inputs.q), torch.zeros_like(inputs.k), torch.zeros_like(inputs.v)
    for rows, seen in inputs.blocks():
        own_q, own_grad = inputs.rows_of(inputs.q, rows), inputs.rows_of(grad, rows)
        weights = inputs.weights(own_q, seen, scale)
        d_v[:, :seen] += torch.bmm(weights.transpose(1, 2), own_grad)
        d_weights = torch.bmm(own_grad, inputs.v[:, :seen].transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(scale)
        d_q[:, :, rows] = torch.bmm(d_scores, inputs.k[:, :seen]).view(d_q[:, :, rows].shape)
        d_k[:, :seen] += torch.bmm(d_scores.transpose(1, 2), own_q)
    return d_q.view(q_nHLD.shape), d_k.view(k_nGMD.shape), d_v.view(v_nGMD.shape)


@dataclass(frozen=True, slots=True, eq=False)
class _Grouped:
    """``q`` [nG, r, L, D], ``k`` and ``v`` [nG, M, D], in full precision: the r heads of a group are rows of one product."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, q_nHLD: Tensor, k_nGMD: Tensor, v_nGMD: Tensor) -> _Grouped:
        n, heads, queries, width = q_nHLD.shape
        groups, keys = k_nGMD.shape[1:3]
        q = full_precision(q_nHLD).reshape(n * groups, heads // groups, queries, width)
        k, v = (full_precision(x).reshape(n * groups, keys, width) for x in (k_nGMD, v_nGMD))
        return cls(q, k, v)

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Which queries, and how many keys the last of them sees."""
        count, repeats, queries, _ = self.q.shape
        before = self.k.shape[1] - queries
        start = 0
        while start < queries:
            fitting = BLOCK_ELEMENTS // (count * repeats * (before + start + FEWEST_QUERIES))
            stop = min(queries, start + max(FEWEST_QUERIES, fitting))
            yield slice(start, stop), before + stop
            start = stop

    def rows_of(self, x: Tensor, rows: slice) -> Tensor:
        """[nG, r B, D] of what is shaped like ``q``."""
        return x[:, :, rows].reshape(len(x), -1, x.shape[-1])

    def weights(self, own_q: Tensor, seen: int, scale: float) -> Tensor:
        """Softmax of the scores of a block's queries, [nG, r B, seen]."""
        scores = torch.bmm(own_q, self.k[:, :seen].transpose(1, 2)).mul_(scale)
        length = own_q.shape[1] // self.q.shape[1]
        later = torch.full((length, length), -torch.inf, dtype=scores.dtype).triu_(1)
        scores.view(len(scores), -1, length, seen)[..., seen - length :].add_(later)
        return torch.softmax(scores, dim=-1)
