"""Attention in blocks of queries is the fused kernel's, in outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from togi.algo.partial_attention import Visibility, attend, attend_backward
from togi.cpu import attention
from togi.cpu.attention import LONGEST, MOST_KEYS, attend_in_blocks, attend_in_blocks_backward, wins

CAUSAL = Visibility(causal=True)


def tensors(count: int, queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    """Gradient of the output, q, k, v: 6 heads of 8, 2 key/value heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, queries), (6, queries), (2, keys), (2, keys)]
    return [torch.randn(count, *shape, 8, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("block", [1, 2**17])
@pytest.mark.parametrize(("count", "queries", "keys"), [(1, 1, 1), (1, 37, 37), (3, 40, 71), (2, 5, 10)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_are_the_fused_kernel(
    monkeypatch: pytest.MonkeyPatch, block: int, count: int, queries: int, keys: int, dtype: torch.dtype
) -> None:
    """In one block and in many, with and without a context before the queries."""
    monkeypatch.setattr(attention, "MASK_ELEMENTS", block)
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 16)
    grad, q, k, v = tensors(count, queries, keys, dtype)
    out, lse = attend(q, k, v, 0.3, CAUSAL)
    expected = attend_backward(grad, (q, k, v), out, lse, 0.3, CAUSAL)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 2e-6}
    found, d_q = torch.empty_like(out), torch.empty_like(expected[0])
    attend_in_blocks(q, k, v, 0.3, found)
    torch.testing.assert_close(found, out, **tolerance)
    d_k, d_v = attend_in_blocks_backward(grad, q, k, v, 0.3, d_q)
    torch.testing.assert_close((d_q, d_k, d_v), expected, **tolerance)


def test_which_sequences_are_done_in_blocks() -> None:
    """Those of up to 512 queries and 1,024 keys."""
    assert wins(1, 1) and wins(128, 640) and wins(LONGEST, MOST_KEYS)
    assert not wins(LONGEST + 1, LONGEST + 1) and not wins(1, MOST_KEYS + 1)
