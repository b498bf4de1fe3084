"""Causal attention of short sequences on a CPU by PyTorch operations: some queries at a time against all keys that they see.

Shape letters as in ``partial_attention``; r query heads to a key/value head, c of the n sequences, B queries of a block, whose
B r heads are the rows of one product.

Only the inputs are kept for the backward. It computes the weights P again. With dP = dO V' the gradient of the scores is
dS = P (dP - sum P dP), which needs no output, while the fused kernel keeps the output in float32. Products and softmax of a block
are one call each over several sequences. That takes as long as the fused kernel for a few short sequences, and a fifth less for
many. All computation is in float32 (float64 from float64) for any input dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from togi.algo.precision import wide_dtype

# With more queries or keys the fused kernel, which tiles both, is faster (torch 2.13, AVX512).
LONGEST, MOST_KEYS = 512, 1024
BLOCK_QUERIES = 48
BLOCK_ELEMENTS = 2**19
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
    step = max(1, BLOCK_ELEMENTS // (heads * keys * BLOCK_QUERIES))
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
