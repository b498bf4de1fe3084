"""FlashAttention over shared prefixes in two calls and more: who asks whom, the joined numbers, the real operators' shapes."""

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch

from tests.attention_cases import TREE, dense_attention, random_qkv, run, varlen_stand_in
from tests.packs import make_segments
from togi.algo.partial_attention import Visibility, attend_in_tiles, attend_in_tiles_backward
from togi.algo.precision import full_precision
from togi.batch import NO_PREFIX
from togi.model import attention
from togi.model.attention import attend_to_prefixes, levels_of, varlen_attention

GROUP = make_segments([2, 1, 2, 1], [NO_PREFIX, 0, 0, NO_PREFIX])


def pieces(starts_q, starts_k, longest_q, longest_k):
    """Rows of the queries and of the keys of each piece."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert longest_q >= max(2, starts_q.diff().max()) and longest_k == starts_k.diff().max()
    bounds_q, bounds_k = starts_q.tolist(), starts_k.tolist()
    slices = [[slice(*pair) for pair in pairwise(bounds)] for bounds in (bounds_q, bounds_k)]
    return list(zip(*slices, strict=True))


def heads_first(x):
    return x.transpose(0, 1)[None]


class StandIn:
    """The two operators as torch.nn.attention.varlen calls them, in plain torch; ``calls``: how many were made."""

    def __init__(self):
        self.calls = []

    def forward(self, q, k, v, starts_q, starts_k, longest_q, longest_k, dropout, causal, debug, *, scale):
        assert dropout == 0.0 and not debug
        self.calls.append(("forward", causal, len(q), len(k)))
        out, lse = torch.empty_like(q), full_precision(q.new_empty(q.shape[1], q.shape[0]))
        for rows, keys in pieces(starts_q, starts_k, longest_q, longest_k):
            inputs = [heads_first(x) for x in (q[rows], k[keys], v[keys])]
            part, lse[:, rows] = (x[0] for x in attend_in_tiles(*inputs, scale, Visibility(causal)))
            out[rows] = part.transpose(0, 1)
        return out, lse, None, None, None

    def backward(
        self,
        grad,
        q,
        k,
        v,
        out,
        lse,
        starts_q,
        starts_k,
        longest_q,
        longest_k,
        dropout,
        causal,
        _state,
        _unused,
        *,
        scale,
    ):
        assert dropout == 0.0 and lse.is_contiguous()
        self.calls.append(("backward", causal, len(q), len(k)))
        d_q, d_k, d_v = (torch.full_like(x, torch.nan) for x in (q, k, v))
        for rows, keys in pieces(starts_q, starts_k, longest_q, longest_k):
            inputs = tuple(heads_first(x) for x in (q[rows], k[keys], v[keys]))
            whole = (heads_first(out[rows]), lse[:, rows][None])
            grads = attend_in_tiles_backward(heads_first(grad[rows]), inputs, *whole, scale, Visibility(causal))
            for to, place, part in zip((d_q, d_k, d_v), (rows, keys, keys), grads, strict=True):
                to[place] = part[0].transpose(0, 1)
        return d_q, d_k, d_v


@pytest.fixture
def kernels(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(attention, "_FLASH", stand_in.forward)
    monkeypatch.setattr(attention, "_FLASH_BACKWARD", stand_in.backward)
    return stand_in


def test_levels_by_hand():
    own, shared = levels_of(GROUP, torch.device("cpu"))
    assert own.causal and own.queries_R.tolist() == own.keys_U.tolist() == [0, 1, 2, 3, 4, 5]
    assert own.starts_q.tolist() == own.starts_k.tolist() == [0, 2, 3, 5, 6] and own.longest == (2, 2)
    assert not shared.causal and shared.longest == (3, 2)
    assert shared.queries_R.tolist() == [2, 3, 4] and shared.keys_U.tolist() == [0, 1]
    assert shared.starts_q.tolist() == [0, 3] and shared.starts_k.tolist() == [0, 2]


@pytest.mark.parametrize("keywords", [{}, {"scaling": 0.3}, {"sliding_window": 7}])
def test_prefixes_equal_dense(kernels, keywords):
    """The tree has a prompt with three responses, a plain sequence, and turns two deep; no sequence is longer than 7."""
    one, other = run(varlen_attention, TREE, **keywords), run(dense_attention, TREE, **keywords)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    # all on themselves; 8 tokens continue the first prompt of 3 and 5 the other of 2; 2 tokens continue the turn of 3
    levels = [(True, 23, 23), (False, 13, 5), (False, 2, 3)]
    assert kernels.calls == [(way, *level) for way in ("forward", "backward") for level in levels]


def test_half_precision_is_rounded_once_a_part(kernels):
    """Log-sum-exps stay float32; output and gradients are within three roundings of the exact ones of the same inputs."""
    rounded = [x.detach().bfloat16() for x in random_qkv(sum(TREE.lengths_S))]
    found = []
    for function, dtype in ((varlen_attention, torch.bfloat16), (dense_attention, torch.float64)):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in rounded]
        out, _ = function(torch.nn.Identity(), *inputs, None, segments=TREE)
        (out.double() * torch.arange(out.numel()).view_as(out).cos().bfloat16().double()).sum().backward()
        found.append([out, *(x.grad for x in inputs)])
    assert {x.dtype for x in found[0]} == {torch.bfloat16}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=3 * 2**-8, atol=3 * 2**-8 * float(other.detach().abs().max())
        )
    assert len(kernels.calls) == 6


def test_heads_of_odd_sizes_take_gathered_keys(kernels, monkeypatch):
    """The kernel is for multiples of eight."""
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = varlen_stand_in
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 23, 12, dtype=torch.float64) for heads in (4, 2, 2)]
    one, other = (f(torch.nn.Identity(), *inputs, None, segments=TREE)[0] for f in (varlen_attention, dense_attention))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert kernels.calls == []


def test_the_real_operators_take_what_they_are_given():
    """Tensors without data: PyTorch's own rules for the operators' arguments, shapes and types. Nothing is computed."""
    meta = torch.device("meta")
    inputs = [torch.empty(23, h, 64, dtype=torch.bfloat16, device=meta, requires_grad=True) for h in (4, 2, 2)]
    out = attend_to_prefixes(*inputs, TREE, 0.125)
    assert (out.shape, out.dtype, out.device) == ((23, 4, 64), torch.bfloat16, meta)
    out.backward(torch.empty_like(out))
    assert [(x.grad.shape, x.grad.dtype) for x in inputs] == [(x.shape, x.dtype) for x in inputs]
