"""Causal attention of short sequences on a CPU: some queries at a time against all keys that they see.

Shape letters as in ``partial_attention``; r query heads to a key/value head, c of the n sequences, B queries of a block, whose
B r heads are the rows of one product.

Nothing is kept for the backward but the inputs: it computes the weights P again, and with dP = dO V' the gradient of the scores
is dS = P (dP - sum P dP), which needs no output. The fused kernel keeps the output in float32. A block's products and softmax are
one call each over several sequences, which takes as long as the fused kernel does for a few short sequences and a fifth less for
many. Everything is float32 (float64 from float64) whatever the inputs are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from togi.algo.precision import wide_dtype

# At more queries or keys the fused kernel, which tiles both, is faster (torch 2.13, AVX512).
LONGEST, MOST_KEYS = 512, 1024
BLOCK_QUERIES = 48
BLOCK_ELEMENTS = 2**19
"""Scores of a block over all heads of the sequences that are done together: two megabytes."""


def wins(queries: int, keys: int) -> bool:
    """Whether ``queries`` that end a sequence of ``keys`` are better done here."""
    return queries <= LONGEST and keys <= MOST_KEYS


def attend_in_blocks(q_nHLD: Tensor, k_nGMD: Tensor, v_nGMD: Tensor, scale: float, out_nHLD: Tensor) -> None:
    """Write the output to ``out``; query i sees the keys up to M - L + i."""
    out_nGLrD = _by_queries(out_nHLD, k_nGMD.shape[1])
    for some in _some(q_nHLD, k_nGMD, v_nGMD, scale):
        for rows, seen in some.blocks():
            part = torch.bmm(some.weights(some.rows(some.q, rows), seen), some.v[:, :seen])
            some.put(out_nGLrD, rows, part)


def attend_in_blocks_backward(
    grad_nHLD: Tensor, q_nHLD: Tensor, k_nGMD: Tensor, v_nGMD: Tensor, scale: float, d_q_nHLD: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the gradient of q to ``d_q`` and return those of k and v, given that of the output."""
    groups = k_nGMD.shape[1]
    grad_nGLrD, d_q_nGLrD = _by_queries(grad_nHLD, groups), _by_queries(d_q_nHLD, groups)
    d_k, d_v = (torch.zeros(x.shape, dtype=wide_dtype(x)) for x in (k_nGMD, v_nGMD))
    for some in _some(q_nHLD, k_nGMD, v_nGMD, scale):
        grad, own_d_k, own_d_v = _copy(grad_nGLrD[some.place]), some.own(d_k), some.own(d_v)
        for rows, seen in some.blocks():
            own_q, own_grad = some.rows(some.q, rows), some.rows(grad, rows)
            weights = some.weights(own_q, seen)
            own_d_v[:, :seen].baddbmm_(weights.transpose(1, 2), own_grad)
            d_weights = torch.bmm(own_grad, some.v[:, :seen].transpose(1, 2))
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
        """Which queries, and how many keys the last of them sees."""
        queries = self.q.shape[2]
        before = self.k.shape[1] - queries
        for start in range(0, queries, BLOCK_QUERIES):
            stop = min(queries, start + BLOCK_QUERIES)
            yield slice(start, stop), before + stop

    def rows(self, x: Tensor, queries: slice) -> Tensor:
        """[cG, B r, D] of what is shaped like ``q``."""
        return x[:, :, queries].flatten(2, 3).flatten(0, 1)

    def own(self, x_nGMD: Tensor) -> Tensor:
        """[cG, M, D] of these sequences."""
        return x_nGMD[self.place].flatten(0, 1)

    def put(self, x_nGLrD: Tensor, queries: slice, part: Tensor) -> None:
        """Write what ``rows`` reads."""
        own = x_nGLrD[self.place, :, queries]
        own.copy_(part.view(own.shape))

    def weights(self, own_q: Tensor, seen: int) -> Tensor:
        """Softmax of the scores of a block's rows, [cG, B r, seen]."""
        scores = torch.bmm(own_q, self.k[:, :seen].transpose(1, 2)).mul_(self.scale)
        repeats = self.q.shape[3]
        length = own_q.shape[1] // repeats
        later = torch.full((length, length), -torch.inf, dtype=scores.dtype).triu_(1)
        scores[..., seen - length :].add_(later.repeat_interleave(repeats, 0))
        return torch.softmax(scores, dim=-1)


def _some(q_nHLD: Tensor, k_nGMD: Tensor, v_nGMD: Tensor, scale: float) -> Iterator[_Some]:
    """A few sequences at a time: so few that a block has enough queries of each."""
    count, heads, keys = len(q_nHLD), q_nHLD.shape[1], k_nGMD.shape[2]
    q_nGLrD = _by_queries(q_nHLD, k_nGMD.shape[1])
    step = max(1, BLOCK_ELEMENTS // (heads * keys * BLOCK_QUERIES))
    for start in range(0, count, step):
        place = slice(start, start + step)
        k, v = (_copy(x[place]).flatten(0, 1) for x in (k_nGMD, v_nGMD))
        yield _Some(_copy(q_nGLrD[place]), k, v, scale, place)


def _by_queries(x_nHLD: Tensor, groups: int) -> Tensor:
    """[n, G, L, r, D], the same memory: the heads that share a key/value head beside each other."""
    n, heads, queries, width = x_nHLD.shape
    return x_nHLD.view(n, groups, heads // groups, queries, width).transpose(2, 3)


def _copy(x: Tensor) -> Tensor:
    """In full precision and in the order of its dimensions, in one pass."""
    return torch.empty(x.shape, dtype=wide_dtype(x)).copy_(x)
