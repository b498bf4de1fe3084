"""Estimates of KL(policy || reference) from sampled tokens, controllers of the KL coefficient, and KL of two whole distributions.

Not here: whether the estimate goes into the reward or into the loss (never both). It matters, because the estimators agree
in value and differ in gradient. With tokens drawn from the current policy, the expected gradient of

* k1 is zero. As a loss it only adds noise; it belongs in the reward.
* k2 is that of KL(policy || reference): the one for the loss.
* k3 is that of KL(reference || policy), the other direction.

With tokens from an older policy all of these are biased unless weighted by the ratio.
Shape letter: K tokens in the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from togi.config.choices import Divergence, KLEstimator
from togi.errors import ConfigError

MAX_LOG_RATIO = 20.0
MAX_RELATIVE_ERROR = 0.2


def kl_estimate(logprobs_K: Tensor, ref_logprobs_K: Tensor, estimator: KLEstimator) -> Tensor:
    """One estimate per token, in nats (Schulman, "Approximating KL Divergence", 2020). Shape [K], differentiable.

    With ``d = logprobs - ref_logprobs``: k1 = d (unbiased, may be negative), k2 = d^2 / 2 (biased, low variance),
    k3 = exp(-d) - 1 + d (unbiased, never negative). Only k3 can overflow, so only its d is clamped to at least -20: a
    token that is more than e^20 times less likely under the policy than under the reference counts as e^20 - 21, with no
    gradient. k1 and k2 are never clamped.
    """
    log_ratio_K = logprobs_K - ref_logprobs_K
    match estimator:
        case KLEstimator.K1:
            return log_ratio_K
        case KLEstimator.K2:
            return log_ratio_K.square() / 2
        case KLEstimator.K3:
            bounded_K = log_ratio_K.clamp(min=-MAX_LOG_RATIO)
            # expm1: near d = 0, the usual case, exp(-d) - 1 would lose the digits of d^2 / 2.
            return torch.expm1(-bounded_K) + bounded_K


@dataclass(frozen=True, slots=True)
class KLController:
    """The KL coefficient of a run: constant, or with a ``target`` steered towards it (Ziegler et al. 2019, arXiv 1909.08593).

    ``value`` is the coefficient now, ``target`` in nats per token, ``horizon`` in samples.
    """

    value: float
    target: float | None = None
    horizon: int = 1

    def __post_init__(self) -> None:
        assert self.target is None or (self.target > 0 and self.horizon > 0), "target and horizon must be positive"

    def update(self, kl: float, n: int) -> KLController:
        """The controller after a step of ``n`` samples with mean KL ``kl`` over the tokens in the loss.

        With a target: ``value *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon``. Raises ConfigError if a step is so
        large for the horizon that the factor could be zero or negative, which would turn the penalty into a bonus.
        """
        if self.target is None:
            return self
        assert math.isfinite(kl), "the measured KL is not a finite number"
        if MAX_RELATIVE_ERROR * n >= self.horizon:
            raise ConfigError(
                f"--kl_horizon {self.horizon} is too short for steps of {n} samples (the KL coefficient could fall to "
                f"zero or below in one step): set it above {MAX_RELATIVE_ERROR * n:.0f}"
            )
        error = min(max(kl / self.target - 1, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        return replace(self, value=self.value * (1 + error * n / self.horizon))

    def restored(self, value: float) -> KLController:
        """This controller with the coefficient of a checkpoint. A constant comes from the flag after a resume too."""
        return self if self.target is None else replace(self, value=value)


# The divergence between a teacher's and a student's distribution over the vocabulary, and its gradient.
#
# Both functions take the log-probabilities of one block of tokens. Not here: computing them block by block, without the logits of
# all tokens (``togi.model.heads``).
# Shape letters: k tokens of a block, V the whole vocabulary, v a slice of it.


def divergence(teacher_logp_kV: Tensor, student_logp_kV: Tensor, kind: Divergence) -> Tensor:
    """KL divergence between the two, in nats, shape [k].

    forward: ``sum_v pT (log pT - log pS)`` (Hinton, Vinyals & Dean 2015, arXiv 1503.02531, whose cross-entropy is
    this plus the teacher's entropy, a constant). reverse: ``sum_v pS (log pS - log pT)`` (MiniLLM: Gu et al. 2023,
    arXiv 2306.08543).
    """
    if kind is Divergence.FORWARD:
        return (teacher_logp_kV.exp() * (teacher_logp_kV - student_logp_kV)).sum(1)
    return (student_logp_kV.exp() * (student_logp_kV - teacher_logp_kV)).sum(1)


def divergence_gradient(
    teacher_logp_kv: Tensor, student_logp_kv: Tensor, divergence_k: Tensor, kind: Divergence
) -> Tensor:
    """d divergence / d student's logits, for any slice of the vocabulary. Shape [k, v].

    forward: ``pS - pT``. reverse: ``pS (log pS - log pT - D)``, with D the divergence over the whole vocabulary.
    """
    if kind is Divergence.FORWARD:
        return student_logp_kv.exp() - teacher_logp_kv.exp()
    return student_logp_kv.exp() * (student_logp_kv - teacher_logp_kv - divergence_k[:, None])
