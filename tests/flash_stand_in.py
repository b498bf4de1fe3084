"""FlashAttention's two operators for CPUs, in plain torch and registered with PyTorch: what runs on CUDA runs here to the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from unittest.mock import patch

import torch
from torch import Tensor
from torch.library import Library

from togi.algo import partial_attention
from togi.algo.partial_attention import Visibility, attend_in_tiles, attend_in_tiles_backward
from togi.algo.precision import full_precision

Call = tuple[str, bool, int, int]
TYPES = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})


@contextmanager
def flash_on_cpu() -> Iterator[list[Call]]:
    """Yields the calls so far: (forward or backward, causal, rows of queries, rows of keys)."""
    calls: list[Call] = []
    library = Library("aten", "IMPL")

    def forward(q, k, v, starts_q, starts_k, longest_q, longest_k, dropout, causal, debug, *, scale, **window):
        assert dropout == 0.0 and not debug and q.shape[-1] % 8 == 0
        calls.append(("forward", causal, len(q), len(k)))
        out, lse = torch.empty_like(q), full_precision(q.new_empty(q.shape[1], q.shape[0]))
        for rows, keys in pieces(starts_q, starts_k, longest_q, longest_k):
            inputs = [heads_first(x) for x in (q[rows], k[keys], v[keys])]
            part, lse[:, rows] = (x[0] for x in attend_in_tiles(*inputs, scale, seen(causal, rows, keys, **window)))
            out[rows] = part.transpose(0, 1).to(out.dtype)
        empty = torch.empty(0)
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), empty

    def backward(
        grad, q, k, v, out, lse, starts_q, starts_k, longest_q, longest_k, dropout, causal, *_, scale, **window
    ):
        assert dropout == 0.0 and lse.dtype in (torch.float32, torch.float64) and lse.shape == (q.shape[1], len(q))
        calls.append(("backward", causal, len(q), len(k)))
        d_q, d_k, d_v = (torch.full_like(x, torch.nan) for x in (q, k, v))
        for rows, keys in pieces(starts_q, starts_k, longest_q, longest_k):
            inputs = tuple(heads_first(x) for x in (q[rows], k[keys], v[keys]))
            whole = (heads_first(out[rows]), lse[:, rows][None])
            visible = seen(causal, rows, keys, **window)
            grads = attend_in_tiles_backward(heads_first(grad[rows]), inputs, *whole, scale, visible)
            for to, place, part in zip((d_q, d_k, d_v), (rows, keys, keys), grads, strict=True):
                to[place] = part[0].transpose(0, 1).to(to.dtype)
        return d_q, d_k, d_v

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        with (
            patch.object(partial_attention, "FLASH_DEVICES", {"cpu"}),
            patch.object(partial_attention, "FLASH_TYPES", TYPES),
        ):
            yield calls
    finally:
        library._destroy()


def pieces(starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int) -> list[tuple[slice, slice]]:
    """Rows of the queries and of the keys of each piece."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert longest_q >= max(2, starts_q.diff().max()) and longest_k == starts_k.diff().max()
    slices = [[slice(*pair) for pair in pairwise(bounds.tolist())] for bounds in (starts_q, starts_k)]
    return list(zip(*slices, strict=True))


def seen(
    causal: bool, rows: slice, keys: slice, window_size_left: int | None = None, window_size_right: int | None = None
) -> Visibility:
    """The mask of a piece, aligned at its last query and key."""
    if window_size_left is None:
        return Visibility(causal)
    assert not causal and window_size_right == 0, "the edge on the right makes a window causal"
    queries, total = rows.stop - rows.start, keys.stop - keys.start
    distance_LM = torch.arange(queries)[:, None] + total - queries - torch.arange(total)[None]
    return Visibility(seen_LM=(distance_LM >= 0) & (distance_LM <= window_size_left))


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]
