"""The chunked divergence against the plain formula in float64, by hand, and its memory; a few logits and top tokens."""

import math
from pathlib import Path

import pytest
import torch

from tests.kept_memory import least_printed
from togi.algo.kl import divergence, divergence_gradient
from togi.config.choices import Divergence
from togi.model.heads import (
    Head,
    LogitTransform,
    TeacherLogits,
    distill_logprobs,
    some_logits,
    token_logprobs,
    top_tokens,
)

CASES = {
    "plain": (1.0, LogitTransform(), LogitTransform(), False),
    "temperature": (0.7, LogitTransform(), LogitTransform(), False),
    "all": (1.7, LogitTransform(scale=0.5, softcap=3.0), LogitTransform(softcap=2.0), True),
}


def naive_logp(hidden, weight, bias, temperature, transform):
    logits = (hidden @ weight.T + (0.0 if bias is None else bias)) * transform.scale
    if transform.softcap > 0:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("kind", list(Divergence))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk_bytes", [1, 2 * 3 * 4 * 4096, 2**30])
def test_values_and_gradients_equal_the_plain_formula(kind, case, chunk_bytes):
    temperature, own, others, with_bias = CASES[case]
    torch.manual_seed(0)
    tokens, width, teacher_width, vocab = 7, 5, 3, 4096 + 30  # two slices of the vocabulary, two hidden sizes
    inputs = [torch.randn(tokens, width), torch.randn(vocab, width), torch.randn(vocab)]
    ours = [x.double().requires_grad_() for x in inputs]
    plain = [x.double().requires_grad_() for x in inputs]
    states, weight, bias = (
        torch.randn(*s).double() for s in ((tokens, teacher_width), (vocab, teacher_width), (vocab,))
    )
    teacher_bias = bias if with_bias else None
    targets = torch.tensor([0, 1, 4095, 4096, 4097, vocab - 1, 17])
    up, up_divergence = torch.randn(2, tokens, dtype=torch.float64)
    logprobs, distance = distill_logprobs(
        ours[0],
        Head(ours[1], ours[2] if with_bias else None, own),
        targets,
        TeacherLogits(states, Head(weight, teacher_bias, others), kind),
        temperature=temperature,
        chunk_bytes=chunk_bytes,
    )
    student_logp = naive_logp(plain[0], plain[1], plain[2] if with_bias else None, temperature, own)
    teacher_logp = naive_logp(states, weight, teacher_bias, temperature, others)
    one, other = (teacher_logp, student_logp) if kind is Divergence.FORWARD else (student_logp, teacher_logp)
    expected = torch.nn.functional.kl_div(other, one, log_target=True, reduction="none").sum(-1)
    expected_logprobs = student_logp.gather(1, targets[:, None])[:, 0]
    assert logprobs.dtype == distance.dtype == torch.float64
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(distance, expected, rtol=1e-11, atol=1e-12)
    (logprobs @ up + distance @ up_divergence).backward()
    (expected_logprobs @ up + expected @ up_divergence).backward()
    for mine, reference in zip(ours[: 2 + with_bias], plain, strict=False):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-10, atol=1e-12)


def test_divergences_by_hand():
    teacher, student = torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([[0.25, 0.75]]).double().log()
    forward = divergence(teacher, student, Divergence.FORWARD)
    reverse = divergence(teacher, student, Divergence.REVERSE)
    assert forward.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-14)
    assert reverse.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-14)
    assert divergence_gradient(teacher, student, forward, Divergence.FORWARD).tolist() == [
        pytest.approx([-0.25, 0.25], abs=1e-14)
    ]
    # 1/4 (log 1/2 - D) and 3/4 (log 3/2 - D) with D from above: +-3/16 log 3
    assert divergence_gradient(teacher, student, reverse, Divergence.REVERSE).tolist() == [
        pytest.approx([-3 / 16 * math.log(3), 3 / 16 * math.log(3)], abs=1e-14)
    ]


@pytest.mark.parametrize("kind", list(Divergence))
def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_gradient(kind):
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 3).double().requires_grad_(), torch.randn(20, 3).double().requires_grad_()
    teacher = TeacherLogits(hidden.detach(), Head(weight.detach()), kind)
    _, distance = distill_logprobs(hidden, Head(weight), torch.zeros(4, dtype=torch.int64), teacher)
    distance.sum().backward()
    assert float(distance.detach().abs().max()) < 1e-14
    assert float(hidden.grad.abs().max()) < 1e-14 and float(weight.grad.abs().max()) < 1e-14


def test_no_tokens_give_zero_gradients():
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    teacher = TeacherLogits(torch.randn(0, 3), Head(torch.randn(9, 3)))
    logprobs, distance = distill_logprobs(hidden, Head(weight), torch.zeros(0, dtype=torch.int64), teacher)
    (logprobs.sum() + distance.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(9, 4))


def test_bfloat16_is_summed_in_float32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(200, 32).bfloat16(), (0.3 * torch.randn(3000, 32)).bfloat16()
    states, head = torch.randn(200, 16).bfloat16(), (0.3 * torch.randn(3000, 16)).bfloat16()
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    targets = torch.randint(3000, (200,))
    _, distance = distill_logprobs(ours, Head(weight), targets, TeacherLogits(states, Head(head)))
    wide = TeacherLogits(states.double(), Head(head.double()))
    _, expected = distill_logprobs(exact, Head(weight.double()), targets, wide)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance.double(), expected, rtol=0, atol=0.03)
    distance.mean().backward()
    expected.mean().backward()
    assert float((ours.grad.double() - exact.grad).norm() / exact.grad.norm()) < 1e-2


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.5, softcap=2.0)])
def test_some_logits_are_those_of_the_whole_head_with_their_gradients(transform):
    torch.manual_seed(0)
    shapes = ((4, 3), (20, 3), (20,))
    ours, plain = ([torch.randn(*shape).double().requires_grad_() for shape in shapes] for _ in range(2))
    for mine, reference in zip(ours, plain, strict=True):
        reference.data.copy_(mine.data)
    few = some_logits(ours[0], Head(ours[1], ours[2], transform), (17, 2))
    full = (plain[0] @ plain[1].T + plain[2]) * transform.scale
    if transform.softcap > 0:
        full = transform.softcap * torch.tanh(full / transform.softcap)
    torch.testing.assert_close(few, full[:, [17, 2]], rtol=1e-12, atol=1e-12)
    few.square().sum().backward()
    full[:, [17, 2]].square().sum().backward()
    for mine, reference in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-12, atol=1e-12)


def test_top_tokens_are_where_the_log_probability_is_highest():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(5, 3), torch.randn(30, 3), torch.randn(30)
    everything = torch.stack(
        [token_logprobs(hidden, Head(weight, bias), torch.full((5,), v))[0] for v in range(30)], dim=1
    )
    assert torch.equal(top_tokens(hidden, Head(weight, bias)), everything.argmax(1))


PEAK_SCRIPT = """
import re, torch
from pathlib import Path
from togi.model.heads import Head, TeacherLogits, distill_logprobs
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
K, V, H = 4096, 49152, 64
def run(hidden, weight, states, head):
    teacher = TeacherLogits(states, Head(head))
    logprobs, distance = distill_logprobs(hidden, Head(weight), torch.arange(len(hidden)), teacher)
    (distance.mean() - logprobs.mean()).backward()
a = torch.randn(64, H).bfloat16()
run(a.clone().requires_grad_(), a.clone().requires_grad_(), a, a)  # the first call loads libraries
hidden = torch.empty(K, H, dtype=torch.bfloat16).normal_().requires_grad_()
weight = torch.empty(V, H, dtype=torch.bfloat16).normal_(std=0.02).requires_grad_()
states, head = hidden.detach().clone(), weight.detach().clone()
before = peak()
run(hidden, weight, states, head)
print(peak() - before - hidden.grad.nbytes - weight.grad.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.large
def test_peak_memory_is_far_below_one_matrix_of_logits():
    """4096 tokens, 49152 words: the logits of both models would be 1.6 GB in float32; the limit is 300 MB."""
    assert 10e6 < least_printed(PEAK_SCRIPT, 300e6) < 300e6
