"""Attention on a CPU by the compiled kernel: PyTorch's numbers for every kind of segment, and nothing leaks between them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.kernel_calls import counted_calls
from togi.algo.partial_attention import Visibility
from togi.cpu import attention as host_attention
from togi.cpu.attention import parts_of
from togi.model.attention import Run

ONE = (Run(1, 1, ()),)
LONG = (Run(1, 300, ()),)
GROUP = (Run(1, 70, ()), Run(3, 129, (0,)))
# a prompt of 5 with responses 7, 7, 7 and 66; a single token; a prompt of 64 continued by 3, which is continued by two
TREE = (
    Run(1, 5, ()),
    Run(3, 7, (0,)),
    Run(1, 66, (0,)),
    Run(1, 1, ()),
    Run(1, 64, ()),
    Run(1, 3, (4,)),
    Run(2, 20, (4, 5)),
)
PACKS = {"one": ONE, "long": LONG, "group": GROUP, "tree": TREE}
WIDTHS = [8, 64, 80]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """The kernel is not for more threads than it has segments and heads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def tensors(runs: tuple[Run, ...], width: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output in the memory order of projections: 6 query heads, 2 key/value heads."""
    tokens = sum(run.tokens for run in runs)
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, heads, width, generator=generator).to(dtype).transpose(0, 1) for heads in (6, 2, 2, 6)]


def results(
    runs: tuple[Run, ...], inputs: list[Tensor], seen: list[Visibility] | None = None, calls: int = 1
) -> list[Tensor]:
    """The output, and the gradients of q, k and v; the kernel was called so often in each direction."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    seen = [Visibility(causal=True)] * len(runs) if seen is None else seen
    with pytest.MonkeyPatch.context() as patch:
        found = counted_calls(patch, "attention", "attention_backward")
        out = host_attention.HostAttention.apply(*leaves, runs, seen, 0.2)
        gradients = torch.autograd.grad(out, leaves, inputs[3])
    assert (found["attention"], found["attention_backward"]) == (calls, calls)
    return [out.detach(), *gradients]


def plain(
    monkeypatch: pytest.MonkeyPatch, runs: tuple[Run, ...], inputs: list[Tensor], seen: list[Visibility] | None = None
) -> list[Tensor]:
    """The same without kernels."""
    with monkeypatch.context() as patch:
        patch.setattr(host_attention, "kernels_for", lambda *tensors, float32: None)
        return results(runs, inputs, seen, calls=0)


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_kernel_is_pytorch_s_attention(monkeypatch: pytest.MonkeyPatch, name: str, width: int) -> None:
    """In float32 to the order of sums. In bfloat16 both round once what they compute in float32."""
    runs = PACKS[name]
    inputs = tensors(runs, width, torch.float32)
    torch.testing.assert_close(results(runs, inputs), plain(monkeypatch, runs, inputs), rtol=1e-4, atol=1e-5)
    narrow = tensors(runs, width, torch.bfloat16)
    for got, expected in zip(results(runs, narrow), plain(monkeypatch, runs, narrow), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-4)
        assert (got != expected).float().mean() < 0.02


def test_what_the_kernel_cannot_do_is_done_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with a window and one that is too long, in one pack with a prompt that short ones continue."""
    runs = (Run(1, 40, ()), Run(2, 30, (0,)), Run(1, 50, ()), Run(1, 520, ()), Run(1, 20, (0,)))
    window = torch.ones(50, 50, dtype=torch.bool).tril().triu(-9)
    seen = [Visibility(causal=True, seen_LM=window if run.length == 50 else None) for run in runs]
    inputs = tensors(runs, 16, torch.float32)
    got, expected = results(runs, inputs, seen), plain(monkeypatch, runs, inputs, seen)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_any_order_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads outermost; and values that lie apart, which the kernel does not read."""
    inputs = [x.contiguous() for x in tensors(TREE, 8, torch.float32)]
    expected = plain(monkeypatch, TREE, inputs)
    torch.testing.assert_close(results(TREE, inputs), expected, rtol=1e-4, atol=1e-5)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert apart[0].stride(2) != 1
    torch.testing.assert_close(results(TREE, apart, calls=0), expected, rtol=1e-4, atol=1e-5)
    mixed = [inputs[0], *apart[1:]]
    torch.testing.assert_close(results(TREE, mixed), expected, rtol=1e-4, atol=1e-5)


def test_threads_change_no_bit() -> None:
    inputs, found = tensors(TREE, 16, torch.bfloat16), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(TREE, inputs))
    assert all(torch.equal(one, other) for other in found[1:] for one, other in zip(found[0], other, strict=True))


def test_what_is_no_number_stays_where_it_is_seen() -> None:
    """A value of NaN in a segment of 7 tokens: not in the prompt before it, nor in its sisters, nor in other segments."""
    inputs = tensors(TREE, 8, torch.float32)
    second = parts_of(TREE)[1].own
    inputs[2][:, second.start + 8] = torch.nan  # the second of the three, its second token
    out, d_q, *_ = results(TREE, inputs)
    own = slice(second.start + 7, second.start + 14)
    for x in (out, d_q):
        assert x[:, own.start + 1 : own.stop].isnan().all()
        assert not torch.cat([x[:, : own.start], x[:, own.stop :]], 1).isnan().any()


def test_memory_bounds_what_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of keys and values of 2 heads of 8 float32, 128 bytes a key: segments see 5, 12, 12, 12, 71, 1, 64, 67, 87, 87."""
    inputs = tensors(TREE, 8, torch.float32)
    expected = results(TREE, inputs)
    monkeypatch.setattr(host_attention, "KEYS_AT_ONCE_BYTES", 128 * 90)
    host_attention._together.cache_clear()
    # 5 + 3 x 12, 71 + 1, 64, 67, 87, 87
    got = results(TREE, inputs, calls=6)
    host_attention._together.cache_clear()
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[2:], expected[2:], rtol=1e-5, atol=1e-6)


def test_more_threads_than_there_is_to_share_out_take_pytorch_s_products() -> None:
    torch.set_num_threads(3)
    results(ONE, tensors(ONE, 8, torch.float32), calls=0)
    results(LONG, tensors(LONG, 8, torch.float32), calls=0)
    torch.set_num_threads(2)
    results(LONG, tensors(LONG, 8, torch.float32), calls=1)


def test_extreme_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands apart: nothing overflows."""
    inputs = [100 * x if place < 2 else x for place, x in enumerate(tensors(GROUP, 8, torch.float32))]
    got, expected = results(GROUP, inputs), plain(monkeypatch, GROUP, inputs)
    assert all(x.isfinite().all() for x in got)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-2, atol=1e-2)


TOO_LITTLE = """
import torch
from togi.cpu.kernels import SegmentSpans, compiled

endless = SegmentSpans(torch.tensor([[0, 2**40]]), torch.tensor([0, 1]))
q, k, v = (torch.zeros(heads, 4, 8) for heads in (2, 1, 1))
grads = q.clone(), k.clone(), v.clone()
for call in (
    lambda: compiled().attention(q, k, v, endless, 1.0, q.clone()),
    lambda: compiled().attention_backward(q, (q, k, v), endless, 1.0, grads),
):
    try:
        call()
    except MemoryError as error:
        print(error)
"""


def test_too_little_memory_is_an_error() -> None:
    """A table of more keys than any machine has room for: said before one of them is read, in both directions.

    In a process of its own: after such a request the C library serves a thread from another part of memory.
    """
    done = subprocess.run([sys.executable, "-c", TOO_LITTLE], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.splitlines() == ["not enough memory for attention on the CPU: lower --max_tokens_per_gpu"] * 2
