"""The clipped policy and value losses: every branch by hand with its gradient, then a plain Python reference."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit import algo_reference as ref
from togi.algo.policy import bounded_ratio, cispo_loss, gspo_loss, policy_loss, value_loss

FAST = settings(max_examples=100, deadline=None, derandomize=True)


class Terms(NamedTuple):
    """What a loss returns, by names."""

    loss_K: Tensor
    log_ratio_K: Tensor
    clipped_K: Tensor

    @property
    def ratio_K(self) -> Tensor:
        return bounded_ratio(self.log_ratio_K)


def policy_terms(*given: Tensor, **bounds: float | None) -> Terms:
    return Terms(*policy_loss(*given, **bounds))


def gspo_terms(*given: Tensor | int, **bounds: float | None) -> Terms:
    return Terms(*gspo_loss(*given, **bounds))


def cispo_terms(*given: Tensor, **bounds: float) -> Terms:
    return Terms(*cispo_loss(*given, **bounds))


def one(ratio: float, advantage: float, low: float = 0.2, high: float = 0.2, dual: float | None = None):
    """Terms and d loss / d logprob for one token with this ratio."""
    old = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    logprobs = (old.detach() + math.log(ratio)).requires_grad_()
    a = torch.tensor([advantage], dtype=torch.float64, requires_grad=True)
    terms = policy_terms(logprobs, old, a, clip_low=low, clip_high=high, dual_clip=dual)
    terms.loss_K.sum().backward()
    assert old.grad is None and a.grad is None
    return terms._replace(loss_K=terms.loss_K.detach()), float(logprobs.grad)


# columns: ratio, advantage, loss, gradient (-ratio * advantage where the ratio counts, else exactly 0), clipped
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, False),
        (1.1, 2.0, -2.2, -2.2, False),
        (1.5, 2.0, -2.4, 0.0, True),  # gains beyond 1.2 do not count
        (0.5, 2.0, -1.0, -1.0, False),  # the pessimistic side is never clipped
        (0.5, -1.0, 0.8, 0.0, True),  # -min(-0.5, -0.8)
        (1.5, -1.0, 1.5, 1.5, False),
        (1.5, 0.0, 0.0, 0.0, False),
    ],
)
def test_ppo_clip_by_hand(ratio, advantage, loss, gradient, clipped):
    terms, grad = one(ratio, advantage)
    assert float(terms.loss_K) == pytest.approx(loss, abs=1e-14)
    assert grad == pytest.approx(gradient, abs=1e-14)
    assert bool(terms.clipped_K) is clipped
    assert float(terms.ratio_K) == pytest.approx(ratio)
    assert float(terms.log_ratio_K) == pytest.approx(math.log(ratio))


def test_clip_higher_moves_only_the_upper_bound():
    terms, grad = one(1.25, 2.0, high=0.28)
    assert (float(terms.loss_K), grad, bool(terms.clipped_K)) == (pytest.approx(-2.5), pytest.approx(-2.5), False)
    terms, grad = one(1.4, 2.0, high=0.28)
    assert (float(terms.loss_K), grad, bool(terms.clipped_K)) == (pytest.approx(-2.56), 0.0, True)
    terms, grad = one(0.75, -1.0, high=0.28)
    assert (float(terms.loss_K), grad, bool(terms.clipped_K)) == (pytest.approx(0.8), 0.0, True)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (5.0, -1.0, 3.0, 0.0, False),  # -max(min(-5, -1.2), -3)
        (2.0, -1.0, 2.0, 2.0, False),
        (0.5, -1.0, 0.8, 0.0, True),  # the ordinary clip, as without the dual one
        (5.0, 1.0, -1.2, 0.0, True),  # no part of positive advantages
    ],
)
def test_dual_clip_by_hand(ratio, advantage, loss, gradient, clipped):
    terms, grad = one(ratio, advantage, dual=3.0)
    assert float(terms.loss_K) == pytest.approx(loss, abs=1e-14)
    assert grad == pytest.approx(gradient, abs=1e-14)
    assert bool(terms.clipped_K) is clipped


def test_log_ratios_beyond_20_stay_finite_in_float32_and_are_reported_raw():
    logprobs = torch.tensor([-0.5, -300.0], requires_grad=True)
    terms = policy_terms(
        logprobs, torch.tensor([-300.0, -0.5]), torch.tensor([-1.0, 1.0]), clip_low=0.2, clip_high=0.2, dual_clip=None
    )
    terms.loss_K.sum().backward()
    torch.testing.assert_close(terms.loss_K.detach(), torch.tensor([math.exp(20), -math.exp(-20)]))
    torch.testing.assert_close(terms.log_ratio_K, torch.tensor([299.5, -299.5]))
    assert torch.equal(logprobs.grad, torch.zeros(2))
    assert terms.loss_K.dtype == terms.ratio_K.dtype == torch.float32


def test_on_policy_the_gradient_is_the_policy_gradient():
    logprobs = torch.tensor([-1.0, -2.0, -0.1], requires_grad=True)
    a = torch.tensor([0.5, -3.0, 2.0])
    terms = policy_terms(logprobs, logprobs.detach(), a, clip_low=0.2, clip_high=0.2, dual_clip=None)
    terms.loss_K.sum().backward()
    assert torch.equal(terms.loss_K.detach(), -a)
    assert torch.equal(logprobs.grad, -a)


floats = st.floats(-4, 4, width=32)
tokens = st.lists(st.tuples(floats, floats, floats), min_size=1, max_size=20)


@FAST
@given(tokens, st.sampled_from([0.1, 0.2]), st.sampled_from([0.2, 0.28]), st.sampled_from([None, 1.5, 3.0]))
def test_policy_loss_equals_the_reference(rows, low, high, dual):
    lp, old, a = torch.tensor(rows, dtype=torch.float64).T.contiguous()
    lp.requires_grad_()
    terms = policy_terms(lp, old, a, clip_low=low, clip_high=high, dual_clip=dual)
    expected = [ref.policy(*row, low, high, dual) for row in rows]
    torch.testing.assert_close(terms.loss_K.detach(), torch.tensor(expected, dtype=torch.float64))
    (grad,) = torch.autograd.grad(terms.loss_K.sum(), lp)
    dual_clipped = torch.tensor(
        [ref.policy(*row, low, high, None) > loss for row, loss in zip(rows, expected, strict=True)]
    )
    stopped = terms.clipped_K | dual_clipped
    assert not bool((terms.clipped_K & dual_clipped).any())
    assert torch.count_nonzero(grad[stopped]) == 0
    torch.testing.assert_close(grad[~stopped], (-terms.ratio_K * a)[~stopped])


# ---- GSPO: sequence 0 has ratios 2 and 1/8 (geometric mean 1/2), sequence 2 has ratio 1.1 alone

GSPO_SEQUENCES = torch.tensor([0, 0, 2])


def gspo(advantages: list[float], low: float = 0.2, high: float = 0.2, dual: float | None = None):
    old = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    lp = (old.detach() + torch.tensor([2.0, 0.125, 1.1], dtype=torch.float64).log()).requires_grad_()
    a = torch.tensor(advantages, dtype=torch.float64)
    terms = gspo_terms(lp, old, a, GSPO_SEQUENCES, 3, clip_low=low, clip_high=high, dual_clip=dual)
    (grad,) = torch.autograd.grad(terms.loss_K.sum(), lp)
    return terms, grad.tolist()


def test_gspo_by_hand():
    terms, grad = gspo([3.0, 3.0, 3.0])
    assert terms.ratio_K.tolist() == pytest.approx([0.5, 0.5, 1.1])
    assert terms.loss_K.tolist() == pytest.approx([-1.5, -1.5, -3.3])  # the pessimistic side is not clipped
    assert grad == pytest.approx([-1.5, -1.5, -3.3])
    assert terms.clipped_K.tolist() == [False, False, False]
    terms, grad = gspo([-1.0, -1.0, 1.0], high=0.05)
    assert terms.loss_K.tolist() == pytest.approx([0.8, 0.8, -1.05])
    assert grad == [0.0, 0.0, 0.0]
    assert terms.clipped_K.tolist() == [True, True, True]
    assert float(terms.log_ratio_K.sum()) == pytest.approx(math.log(2 * 0.125 * 1.1))


def test_gspo_pushes_each_token_by_its_own_advantage():
    """The token form of the paper: the value has the sequence's ratio, the gradient the token's own advantage."""
    terms, grad = gspo([3.0, 1.0, 0.0])
    assert terms.loss_K.tolist() == pytest.approx([-1.5, -0.5, 0.0])
    assert grad == pytest.approx([-1.5, -0.5, 0.0])


def test_gspo_with_one_token_a_sequence_is_ppo():
    lp, old, a = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, two = lp.clone().requires_grad_(), lp.clone().requires_grad_()
    bounds = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 2.0}
    ours = gspo_terms(one, old, a, torch.arange(50), 50, **bounds)
    theirs = policy_terms(two, old, a, **bounds)
    (ours.loss_K.sum() + theirs.loss_K.sum()).backward()
    torch.testing.assert_close(ours.loss_K, theirs.loss_K)
    torch.testing.assert_close(one.grad, two.grad)
    assert torch.equal(ours.clipped_K, theirs.clipped_K)


# columns: ratio, advantage, loss at log-prob -2, gradient, clipped; the bounds are 0.8 and 1.3
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 3.0, 6.0, -3.0, False),
        (1.2, 1.0, 2.4, -1.2, False),
        (5.0, 1.0, 2.6, -1.3, True),  # bounded, but still pulled
        (0.5, -1.0, -1.6, 0.8, True),
    ],
)
def test_cispo_by_hand(ratio, advantage, loss, gradient, clipped):
    lp = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    old = (lp.detach() - math.log(ratio)).requires_grad_()
    a = torch.tensor([advantage], dtype=torch.float64, requires_grad=True)
    terms = cispo_terms(lp, old, a, clip_low=0.2, clip_high=0.3)
    terms.loss_K.sum().backward()
    assert old.grad is None and a.grad is None
    assert float(terms.loss_K.detach()) == pytest.approx(loss)
    assert float(lp.grad) == pytest.approx(gradient)
    assert bool(terms.clipped_K) is clipped
    assert float(terms.ratio_K) == pytest.approx(ratio)


def test_cispo_with_a_lower_clip_of_one_has_no_lower_bound():
    lp = torch.tensor([-9.0], requires_grad=True)
    terms = cispo_terms(lp, torch.tensor([-2.0]), torch.tensor([1.0]), clip_low=1.0, clip_high=0.3)
    terms.loss_K.sum().backward()
    assert float(lp.grad) == pytest.approx(-math.exp(-7))
    assert not bool(terms.clipped_K)


# columns: value, old value, return, loss, gradient
@pytest.mark.parametrize(
    ("v", "old", "ret", "loss", "gradient"),
    [
        (1.1, 1.0, 2.0, 0.405, -0.9),  # inside the clip: 0.5 * 0.9^2
        (1.5, 1.0, 2.0, 0.32, 0.0),  # moved 0.5 towards the return: held at 1.2, 0.5 * 0.8^2, no more pull
        (0.5, 1.0, 2.0, 1.125, -1.5),  # moved away: 0.5 * 1.5^2 is larger than the held 0.5 * 1.2^2
        (2.9, 1.0, 2.0, 0.405, 0.9),  # overshot: 0.5 * 0.9^2 against the held 0.5 * 0.8^2
    ],
)
def test_value_loss_by_hand(v, old, ret, loss, gradient):
    values, olds, returns = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (v, old, ret))
    out = value_loss(values, olds, returns, 0.2)
    out.sum().backward()
    assert float(out.detach()) == pytest.approx(loss, abs=1e-14)
    assert float(values.grad) == pytest.approx(gradient, abs=1e-14)
    assert olds.grad is None and returns.grad is None


@FAST
@given(tokens, st.sampled_from([0.2, 0.5]))
def test_value_loss_equals_the_reference(rows, clip):
    v, old, ret = torch.tensor(rows, dtype=torch.float64).T
    expected = [ref.value(*row, clip) for row in rows]
    torch.testing.assert_close(value_loss(v, old, ret, clip), torch.tensor(expected, dtype=torch.float64))
