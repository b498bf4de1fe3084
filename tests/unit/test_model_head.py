"""The fused head against a plain log-softmax, in float64, and its memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kept_memory import least_printed
from tests.kernel_calls import counted_calls
from togi.model import heads
from togi.model.heads import Head, LogitTransform, token_logprobs

CASES = {
    "plain": (1.0, LogitTransform(), False),
    "temperature": (0.7, LogitTransform(), False),
    "bias": (1.3, LogitTransform(), True),
    "softcap": (0.7, LogitTransform(softcap=2.0), False),
    "all": (1.7, LogitTransform(scale=0.5, softcap=3.0), True),
}


def naive(hidden, weight, bias, targets, temperature, transform):
    logits = hidden @ weight.T + (0.0 if bias is None else bias)
    logits = logits * transform.scale
    if transform.softcap > 0:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk_bytes", [1, 3 * 4 * 4096, 2**30])
def test_values_and_gradients_equal_the_plain_formula(case, chunk_bytes):
    temperature, transform, with_bias = CASES[case]
    torch.manual_seed(0)
    tokens, width, vocab = 7, 5, 4096 + 30  # two slices of the vocabulary
    inputs = [torch.randn(tokens, width), torch.randn(vocab, width), torch.randn(vocab)]
    ours = [x.double().requires_grad_() for x in inputs]
    plain = [x.double().requires_grad_() for x in inputs]
    targets = torch.tensor([0, 1, 4095, 4096, 4097, vocab - 1, 17])
    up, up_entropy = torch.randn(2, tokens, dtype=torch.float64)
    logprobs, entropy = token_logprobs(
        ours[0],
        Head(ours[1], ours[2] if with_bias else None, transform),
        targets,
        temperature=temperature,
        entropy=True,
        chunk_bytes=chunk_bytes,
    )
    expected, expected_entropy = naive(
        plain[0], plain[1], plain[2] if with_bias else None, targets, temperature, transform
    )
    assert logprobs.dtype == torch.float64
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-12, atol=1e-12)
    (logprobs @ up + entropy @ up_entropy).backward()
    (expected @ up + expected_entropy @ up_entropy).backward()
    for one, other in zip(ours[: 2 + with_bias], plain, strict=False):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.5)])
@pytest.mark.parametrize("chunk_bytes", [1, 2**30])
def test_kernels_for_bfloat16_are_the_operations_they_replace(monkeypatch, with_entropy, transform, chunk_bytes):
    """Values to float32's rounding, gradients to bfloat16's: the product of a tile is rounded alike on both ways.

    So many tokens that threads share the rows of a tile.
    """
    torch.manual_seed(0)
    tokens, width, vocab = 9, 5, 4096 + 30
    targets = torch.tensor([0, 1, 4095, 4096, 4097, vocab - 1, 17, 2, 3])
    up, up_entropy = torch.randn(2, tokens)
    start = [torch.randn(tokens, width).bfloat16(), torch.randn(vocab, width).bfloat16()]

    def results():
        hidden, weight = (x.clone().requires_grad_() for x in start)
        logprobs, entropy = token_logprobs(
            hidden,
            Head(weight, transform=transform),
            targets,
            temperature=0.7,
            entropy=with_entropy,
            chunk_bytes=chunk_bytes,
        )
        total = logprobs @ up + (entropy @ up_entropy if with_entropy else 0.0)
        return [logprobs.detach(), entropy.detach(), *torch.autograd.grad(total, (hidden, weight))]

    calls = counted_calls(monkeypatch, "head", "head_backward")
    ours = results()
    assert calls["head"] >= 1 and calls["head_backward"] >= 2  # two slices of the vocabulary
    found = calls.total()
    monkeypatch.setattr(heads, "kernels_for", lambda *tensors: None)
    logprobs, entropy, *gradients = results()
    assert calls.total() == found
    torch.testing.assert_close(ours[0], logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], entropy, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours[2:], gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-7 * float(other.abs().max()))
        assert (one != other).float().mean() < 0.05


@pytest.mark.parametrize("wrong", [-1, 20])
def test_a_target_that_the_head_does_not_predict_is_an_error(wrong):
    hidden, weight = torch.randn(3, 4).bfloat16(), torch.randn(20, 4).bfloat16()
    with pytest.raises(IndexError, match=f"token {wrong} is none of the 20"):
        token_logprobs(hidden, Head(weight), torch.tensor([1, wrong, 3]))


def test_what_is_no_number_stays_in_its_row_of_the_kernel():
    hidden, weight = torch.randn(3, 4).bfloat16().requires_grad_(), torch.randn(20, 4).bfloat16()
    with torch.no_grad():
        hidden[1, 2] = torch.nan
    logprobs, entropy = token_logprobs(hidden, Head(weight), torch.tensor([1, 2, 3]), entropy=True)
    (logprobs + entropy).sum().backward()
    for x in (logprobs, entropy, hidden.grad.sum(1)):
        assert x.isnan().tolist() == [False, True, False]


def test_without_entropy_there_is_none_and_gradients_are_the_same():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(20, 4, requires_grad=True)
    targets = torch.randint(20, (6,))
    logprobs, entropy = token_logprobs(hidden, Head(weight), targets)
    assert entropy.shape == (0,)
    logprobs.sum().backward()
    one = [hidden.grad.clone(), weight.grad.clone()]
    hidden.grad = weight.grad = None
    token_logprobs(hidden, Head(weight), targets, entropy=True)[0].sum().backward()
    torch.testing.assert_close(one, [hidden.grad, weight.grad], rtol=1e-6, atol=1e-6)


def test_uniform_logits_by_hand():
    logprobs, entropy = token_logprobs(torch.zeros(2, 3), Head(torch.ones(8, 3)), torch.tensor([0, 7]), entropy=True)
    log8 = torch.full((2,), 2.0794415)
    torch.testing.assert_close(logprobs, -log8)
    torch.testing.assert_close(entropy, log8)


def test_bfloat16_is_summed_in_float32():
    """A logit near 5 leaves the matrix product rounded to 2^-9 of itself, 0.01; nothing after that may add to it."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(500, 32).bfloat16(), (0.3 * torch.randn(5000, 32)).bfloat16()
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    targets = torch.randint(5000, (500,))
    logprobs, entropy = token_logprobs(ours[0], Head(ours[1]), targets, entropy=True)
    expected, expected_entropy = naive(*exact, None, targets, 1.0, LogitTransform())
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert ours[0].dtype == torch.bfloat16
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=0.03)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=0.03)
    logprobs.mean().backward()
    expected.mean().backward()
    for one, other in zip(ours, exact, strict=True):
        assert float((one.grad.double() - other.grad).norm() / other.grad.norm()) < 5e-3


def test_no_tokens_give_zero_gradients():
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, Head(weight), torch.zeros(0, dtype=torch.int64), entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(9, 4))
    assert hidden.grad.shape == (0, 4)


PEAK_SCRIPT = """
import re, torch
from pathlib import Path
from togi.model.heads import Head, token_logprobs
# not ru_maxrss, which a child process inherits
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
K, V, H = 8192, 49152, 128
a = torch.randn(64, H).requires_grad_()
# the first call loads libraries
token_logprobs(a, Head(a.detach()), torch.zeros(64, dtype=torch.int64), entropy=True)[0].sum().backward()
hidden = torch.empty(K, H).normal_().requires_grad_()
weight = torch.empty(V, H).normal_(std=0.02).requires_grad_()
before = peak()
token_logprobs(hidden, Head(weight), torch.arange(K), temperature=0.9, entropy=True)[0].mean().backward()
print(peak() - before - hidden.grad.nbytes - weight.grad.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_far_below_one_matrix_of_logits():
    """8192 tokens, 49152 words: logits would be 1.6 GB in float32; the limit is 300 MB for all but the gradients.

    In float32: with bfloat16 a CPU without instructions for it adds copies of its own.
    """
    assert 10e6 < least_printed(PEAK_SCRIPT, 300e6) < 300e6


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **kwargs or {})


def test_an_accelerator_reads_the_weight_of_the_head_a_few_times() -> None:
    """16,384 tokens and 152,064 words: tiles of 512 MB hold 882 tokens, so 19 of them are all; on a CPU of 32 MB 55."""
    hidden, weight = (torch.empty(rows, 64, device="meta", requires_grad=True) for rows in (16_384, 152_064))
    targets = torch.empty(16_384, dtype=torch.int64, device="meta")
    with Products() as products:
        logprobs, _ = token_logprobs(hidden, Head(weight), targets)
        assert products.count == 19
        logprobs.sum().backward()
        assert products.count == 19 + 3 * 38  # all tokens at once for 4,096 words
    assert heads.chunk_bytes_on(torch.device("cpu")) // (4 * 152_064) == 55
