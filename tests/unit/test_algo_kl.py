"""KL: estimators and their gradients against the exact divergence of a five-token vocabulary; the controllers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.unit import algo_reference as ref
from togi.algo.kl import KLController, kl_estimate
from togi.algo.policy import count, token_weights
from togi.config.choices import Aggregation
from togi.config.choices import KLEstimator as KL
from togi.errors import ConfigError

POLICY = [0.3, -1.2, 0.8, 0.0, 2.0]
REFERENCE = [1.0, 0.5, -0.7, 0.2, 0.1]
OLDER = [0.0, 0.4, 0.1, -0.5, 1.0]


def log_probs(logits: list[float] | Tensor) -> Tensor:
    return torch.log_softmax(torch.as_tensor(logits, dtype=torch.float64), -1)


def exact_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) from log-probs over the whole vocabulary."""
    return (p.exp() * (p - q)).sum()


def gradient(scalar: Tensor, logits: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(scalar, logits)
    return grad


def policy() -> Tensor:
    return torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)


def expected_gradient(estimator: KL, logits: Tensor) -> Tensor:
    """The mean gradient of the estimate used as a loss, over all tokens that the policy itself would draw."""
    logp = log_probs(logits)
    return gradient((logp.detach().exp() * kl_estimate(logp, log_probs(REFERENCE), estimator)).sum(), logits)


@pytest.mark.parametrize(
    ("d", "k1", "k2", "k3"),
    [(0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 0.5, math.exp(-1)), (-2.0, -2.0, 2.0, math.e**2 - 3)],
)
def test_estimators_by_hand(d, k1, k2, k3):
    base = torch.tensor([-3.0], dtype=torch.float64)
    for estimator, expected in zip((KL.K1, KL.K2, KL.K3), (k1, k2, k3), strict=True):
        assert float(kl_estimate(base + d, base, estimator)) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("estimator", list(KL))
def test_estimators_equal_the_reference(estimator):
    generator = torch.Generator().manual_seed(0)
    lp, rf = -5 * torch.rand(2, 50, dtype=torch.float64, generator=generator)
    expected = [ref.kl(a, b, estimator.value) for a, b in zip(lp.tolist(), rf.tolist(), strict=True)]
    torch.testing.assert_close(kl_estimate(lp, rf, estimator), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("estimator", [KL.K1, KL.K3])
def test_k1_and_k3_are_unbiased(estimator):
    p, q = log_probs(POLICY), log_probs(REFERENCE)
    expectation = (p.exp() * kl_estimate(p, q, estimator)).sum()
    assert float(expectation) == pytest.approx(float(exact_kl(p, q)), abs=1e-14)


def test_k2_is_biased_but_close_for_close_distributions():
    p = log_probs(REFERENCE) + 0.0
    q = log_probs(torch.tensor(REFERENCE) + 0.01 * torch.tensor(POLICY))
    expectation = float((p.exp() * kl_estimate(p, q, KL.K2)).sum())
    assert expectation == pytest.approx(float(exact_kl(p, q)), rel=0.02)
    far = log_probs(POLICY)
    assert float((far.exp() * kl_estimate(far, p, KL.K2)).sum()) > 1.05 * float(exact_kl(far, p))


def test_k2_as_a_loss_has_the_gradient_of_the_reverse_kl():
    logits = policy()
    true = gradient(exact_kl(log_probs(logits), log_probs(REFERENCE)), logits)
    assert float(true.abs().max()) > 0.1
    torch.testing.assert_close(expected_gradient(KL.K2, logits), true, rtol=0, atol=1e-14)


def test_k1_as_a_loss_has_no_gradient_in_expectation():
    logits = policy()
    torch.testing.assert_close(expected_gradient(KL.K1, logits), torch.zeros_like(logits), rtol=0, atol=1e-14)


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl():
    logits = policy()
    forward = gradient(exact_kl(log_probs(REFERENCE), log_probs(logits)), logits)
    reverse = gradient(exact_kl(log_probs(logits), log_probs(REFERENCE)), logits)
    estimate = expected_gradient(KL.K3, logits)
    torch.testing.assert_close(estimate, forward, rtol=0, atol=1e-14)
    assert float((estimate - reverse).abs().max()) > 0.05


def test_off_policy_the_k2_gradient_is_biased_unless_weighted_by_the_ratio():
    logits = policy()
    logp, older = log_probs(logits), log_probs(OLDER)
    true = gradient(exact_kl(log_probs(logits), log_probs(REFERENCE)), logits)
    estimate = kl_estimate(logp, log_probs(REFERENCE), KL.K2)
    (plain,) = torch.autograd.grad((older.exp() * estimate).sum(), logits, retain_graph=True)
    ratio = (logp - older).exp().detach()
    weighted = gradient((older.exp() * ratio * estimate).sum(), logits)
    assert float((plain - true).abs().max()) > 0.05
    torch.testing.assert_close(weighted, true, rtol=0, atol=1e-14)


@pytest.mark.parametrize("estimator", [KL.K2, KL.K3])
def test_minimising_only_the_kl_loss_brings_the_policy_to_the_reference(estimator):
    generator = torch.Generator().manual_seed(0)
    logits, q = policy(), log_probs(REFERENCE)
    sequences = torch.arange(256)
    weights = token_weights(Aggregation.TOKEN_MEAN, sequences, 256, dtype=torch.float64)
    divergences = [float(exact_kl(log_probs(logits), q).detach())]
    for _ in range(40):
        logp = log_probs(logits)
        tokens = torch.multinomial(logp.detach().exp(), 256, replacement=True, generator=generator)
        terms = kl_estimate(logp[tokens], q[tokens], estimator)
        loss = (weights * terms).sum() / count(Aggregation.TOKEN_MEAN, sequences, 256, 1)
        logits = (logits - 0.5 * gradient(loss, logits)).detach().requires_grad_()
        divergences.append(float(exact_kl(log_probs(logits), q).detach()))
    assert divergences[0] > 0.7
    assert all(later < sooner for sooner, later in zip(divergences, divergences[10:], strict=False))
    assert divergences[-1] < 0.02


def test_k3_does_not_overflow_and_k1_k2_are_never_clamped():
    lp, rf = torch.tensor([-200.0, -0.5], requires_grad=True), torch.tensor([-0.5, -200.0])
    k3 = kl_estimate(lp, rf, KL.K3)
    torch.testing.assert_close(k3.detach(), torch.tensor([math.exp(20) - 21, 198.5]))
    torch.testing.assert_close(gradient(k3.sum(), lp), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(kl_estimate(lp, rf, KL.K1).detach(), torch.tensor([-199.5, 199.5]))
    torch.testing.assert_close(kl_estimate(lp, rf, KL.K2).detach(), torch.tensor([199.5**2 / 2] * 2))


def test_k3_keeps_its_digits_near_zero_in_float32():
    d = torch.tensor([1e-3, -1e-3])
    torch.testing.assert_close(kl_estimate(d, torch.zeros(2), KL.K3), d.square() / 2, rtol=1e-3, atol=0)


def test_adaptive_controller_by_hand():
    start = KLController(0.1, target=6.0, horizon=10_000)
    # kl 12: error clipped to 0.2; kl 6.6: error 0.1; kl 0: error clipped to -0.2
    assert start.update(12.0, 64).value == pytest.approx(0.1 * (1 + 0.2 * 64 / 10_000), rel=1e-15)
    assert start.update(6.6, 1000).value == pytest.approx(0.1 * 1.01, rel=1e-12)
    assert start.update(0.0, 5000).value == pytest.approx(0.1 * 0.9, rel=1e-15)
    assert start.update(6.0, 64).value == 0.1
    assert start.value == 0.1


def test_a_step_larger_than_five_horizons_is_refused():
    controller = KLController(0.1, target=6.0, horizon=100)
    assert controller.update(0.0, 499).value > 0
    with pytest.raises(ConfigError, match=r"--kl_horizon 100 .* 500 samples .* above 100"):
        controller.update(0.0, 500)


def test_controllers_resume_from_their_state():
    grown = KLController(0.1, target=6.0, horizon=10_000).update(12.0, 640)
    resumed = KLController(0.1, target=6.0, horizon=10_000).restored(grown.value)
    assert resumed == grown
    assert resumed.update(3.0, 640) == grown.update(3.0, 640)
    fixed = KLController(0.02)
    assert fixed.update(99.0, 10**6) == fixed
    assert fixed.restored(0.5).value == 0.02
