"""FlashAttention over shared prefixes in two calls and more: who asks whom, the joined numbers, the real operators' shapes."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

from tests.attention_cases import TREE, dense_attention, random_qkv, run
from tests.flash_stand_in import Call, flash_on_cpu
from tests.packs import make_segments
from togi.algo import partial_attention
from togi.algo.partial_attention import (
    Visibility,
    attend,
    attend_backward,
    attend_in_tiles,
    attend_in_tiles_backward,
    flash_takes,
)
from togi.batch import NO_PREFIX, Segments
from togi.model.attention import attend_to_prefixes, levels_of, segment_attention, varlen_attention

CPU = torch.device("cpu")
PLAIN = make_segments([4, 1, 3], [NO_PREFIX] * 3)
GROUP = make_segments([2, 1, 2, 1], [NO_PREFIX, 0, 0, NO_PREFIX])


@pytest.fixture
def calls() -> Iterator[list[Call]]:
    with flash_on_cpu() as made:
        yield made


def test_levels_by_hand() -> None:
    own, shared = levels_of(GROUP, None, CPU)
    assert own.pieces.causal and own.queries_R is own.keys_U is None
    assert own.pieces.starts_q.tolist() == own.pieces.starts_k.tolist() == [0, 2, 3, 5, 6]
    assert own.pieces.longest == (2, 2)
    assert not shared.pieces.causal and shared.pieces.longest == (3, 2)
    assert shared.queries_R is not None and shared.queries_R.tolist() == [2, 3, 4]
    assert shared.keys_U is not None and shared.keys_U.tolist() == [0, 1]
    assert shared.pieces.starts_q.tolist() == [0, 3] and shared.pieces.starts_k.tolist() == [0, 2]


def test_a_window_gathers_only_the_keys_that_it_shows() -> None:
    """In the group of a prompt of 2 with responses of 1 and 2: a window of 2 shows a first token one key before it."""
    (level,) = levels_of(GROUP, 2, CPU)
    assert level.keys_U is not None and level.keys_U.tolist() == [0, 1, 1, 2, 1, 3, 4, 5]
    assert level.pieces.starts_k.tolist() == [0, 2, 4, 7, 8] and level.pieces.window == 2
    assert levels_of(GROUP, 4, CPU)[1].pieces.window is None, "no sequence is longer than 4"
    (plain,) = levels_of(make_segments([4, 1], [NO_PREFIX] * 2), 2, CPU)
    assert plain.keys_U is None


@pytest.mark.parametrize(
    ("segments", "keywords"),
    [
        *((TREE, {"scaling": 0.3, "sliding_window": window}) for window in (1, 2, 3, 5)),
        *((PLAIN, {"sliding_window": window}) for window in (None, 1, 3)),
    ],
)
def test_windows_and_plain_packs_equal_dense(
    calls: list[Call], segments: Segments, keywords: dict[str, float | None]
) -> None:
    one, other = run(varlen_attention, segments, **keywords), run(dense_attention, segments, **keywords)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert [way for way, *_ in calls] == ["forward", "backward"], "one call for the whole pack"


def test_a_prefix_short_for_its_queries_is_copied(calls: list[Call]) -> None:
    """A prefix of one key for two segments of 8, continued by 6 and 6; the other prefixes have less than 16 queries a copy."""
    prefixes = [NO_PREFIX, 0, 0, 2, 2]
    long = make_segments([1, 60, 8, 30, 31], prefixes)
    # 129 queries for 4 copies of one key: copied; 61 for 16 copies of the prefix of 8: a call
    own, shared = levels_of(long, None, CPU)
    assert own.keys_U is not None and own.pieces.starts_k.tolist() == [0, 1, 62, 71, 102, 134]
    assert (
        own.keys_U[:3].tolist() == [0, 0, 1]
        and own.keys_U[62:64].tolist() == [0, 61]
        and own.pieces.longest == (60, 61)
    )
    assert shared.queries_R is not None and shared.queries_R.tolist() == list(range(69, 130))
    one, other = run(varlen_attention, long), run(dense_attention, long)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert calls == [(way, *level) for way in ("forward", "backward") for level in [(True, 130, 134), (False, 61, 8)]]
    # three levels of one key each above long rows: no call but the first
    deep = make_segments([1, 90, 1, 90, 1, 90, 90], [NO_PREFIX, 0, 0, 2, 2, 4, 4])
    torch.testing.assert_close(run(varlen_attention, deep), run(dense_attention, deep), rtol=1e-10, atol=1e-12)
    assert calls[4:] == [(way, True, 363, 363 + 6 + 4 + 2) for way in ("forward", "backward")]


@pytest.mark.parametrize("keywords", [{}, {"scaling": 0.3}, {"sliding_window": 7}])
def test_prefixes_equal_dense(calls: list[Call], keywords: dict[str, float]) -> None:
    """The tree has a prompt with three responses, a plain sequence, and turns two deep; no sequence is longer than 7."""
    one, other = run(varlen_attention, TREE, **keywords), run(dense_attention, TREE, **keywords)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    # all on themselves; 8 tokens continue the first prompt of 3 and 5 the other of 2; 2 tokens continue the turn of 3
    levels = [(True, 23, 23), (False, 13, 5), (False, 2, 3)]
    assert calls == [(way, *level) for way in ("forward", "backward") for level in levels]


def test_half_precision_is_rounded_once_a_part(calls: list[Call]) -> None:
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
    assert len(calls) == 6


@pytest.mark.parametrize("window", [None, 2])
def test_heads_of_any_size_are_padded(calls: list[Call], window: int | None) -> None:
    """The kernel is for multiples of eight, of one size: here 12 and, of values, 5."""
    found = []
    for function in (varlen_attention, dense_attention):
        torch.manual_seed(0)
        inputs = [
            torch.randn(1, h, 23, d, dtype=torch.float64, requires_grad=True) for h, d in ((4, 12), (2, 12), (2, 5))
        ]
        out, _ = function(torch.nn.Identity(), *inputs, None, segments=TREE, sliding_window=window)
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        found.append([out, *(x.grad for x in inputs)])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert calls


def test_what_the_kernel_cannot_take_goes_through_sdpa() -> None:
    """Off CUDA, in float32 and with heads beyond 256 the same function gives SDPA's numbers, bit for bit."""
    inputs = random_qkv(23)
    one, other = (
        f(torch.nn.Identity(), *inputs, None, segments=TREE)[0] for f in (varlen_attention, segment_attention)
    )
    assert torch.equal(one, other)
    narrow, wide = (torch.empty(1, 1, 4, d, dtype=torch.bfloat16) for d in (256, 257))
    with patch.object(partial_attention, "FLASH_DEVICES", {"cpu"}):
        assert flash_takes(narrow, narrow)
        assert not flash_takes(narrow.float(), narrow.float()) and not flash_takes(wide, narrow)
    assert not flash_takes(narrow, narrow), "no such kernel on a CPU"


@pytest.mark.parametrize(("generation", "runs"), [(7, False), (8, True), (12, True)])
def test_older_gpus_have_no_flash_attention(monkeypatch: pytest.MonkeyPatch, generation: int, runs: bool) -> None:
    monkeypatch.setattr(partial_attention, "_generation", lambda _: generation)
    assert partial_attention.has_flash(torch.device("cuda", 1)) is runs
    assert not partial_attention.has_flash(CPU)


@pytest.mark.parametrize("causal", [True, False])
def test_a_part_of_a_ring_equals_its_tiles(calls: list[Call], causal: bool) -> None:
    """Two attentions of one shape, four queries to six keys and grouped heads, given the log-sum-exp over more keys."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, rows, 16, dtype=torch.float64) for heads, rows in ((4, 4), (2, 6), (2, 6)))
    visible, grad = Visibility(causal), torch.randn_like(q)
    out, lse = attend(q, k, v, 0.3, visible)
    torch.testing.assert_close((out, lse), attend_in_tiles(q, k, v, 0.3, visible), rtol=1e-12, atol=1e-12)
    whole = (out * 0.7, lse + 0.2)
    one = attend_backward(grad, (q, k, v), *whole, 0.3, visible)
    other = attend_in_tiles_backward(grad, (q, k, v), *whole, 0.3, visible)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert calls == [("forward", causal, 8, 12), ("backward", causal, 8, 12)]


@pytest.mark.parametrize("window", [None, 3])
def test_the_real_operators_take_what_they_are_given(window: int | None) -> None:
    """Tensors without data: PyTorch's own rules for the operators' arguments, shapes and types. Nothing is computed."""
    meta = torch.device("meta")
    inputs = [torch.empty(23, h, 64, dtype=torch.bfloat16, device=meta, requires_grad=True) for h in (4, 2, 2)]
    out = attend_to_prefixes(*inputs, TREE, 0.125, window)
    assert (out.shape, out.dtype, out.device) == ((23, 4, 64), torch.bfloat16, meta)
    out.backward(torch.empty_like(out))
    assert [(x.grad.shape, x.grad.dtype) for x in inputs] == [(x.shape, x.dtype) for x in inputs]


@pytest.mark.parametrize(
    ("capability", "installed", "works", "runs"),
    [
        ((9, 0), {"flash_attn_interface", "flash_attn.cute"}, True, "FA3"),
        ((9, 0), {"flash_attn.cute"}, True, "FA4"),
        ((10, 0), {"flash_attn_interface", "flash_attn.cute"}, True, "FA4"),
        ((8, 0), {"flash_attn_interface", "flash_attn.cute"}, True, "FA2"),
        ((9, 0), set(), True, "FA2"),
        ((9, 0), {"flash_attn_interface"}, False, "FA2"),
    ],
)
def test_the_newest_kernels_that_the_gpu_and_the_packages_have(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: set[str], works: bool, runs: str
) -> None:
    activated: list[str] = []

    def activate(name: str) -> None:
        if not works:
            raise RuntimeError("no such kernels")
        activated.append(name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(partial_attention, "_generation", lambda _: capability[0])
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(partial_attention, "_is_installed", installed.__contains__)
    assert partial_attention.use_newest_flash.__wrapped__() == runs
    assert activated == ([runs] if runs != "FA2" else [])


def test_torch_knows_the_newer_kernels_by_these_names() -> None:
    assert {name for name, _, _ in partial_attention.NEWER_FLASH} == set(
        torch.nn.attention.list_flash_attention_impls()
    )
    assert partial_attention.use_newest_flash() == "FA2", "no GPU here"
