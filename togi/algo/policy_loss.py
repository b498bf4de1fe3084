"""The clipped losses of PPO, per token: policy and value. Summing and dividing are ``aggregate``'s.

Shape letter: K tokens in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True, eq=False)
class PolicyTerms:
    """``loss_K`` has the gradient; the rest is for reports and has none.

    ``ratio_K``: exp of the log ratio held in [-20, 20]. ``clipped_K``: the PPO clip bounds the ratio, so the token has
    no gradient. ``log_ratio_K``: raw log pi_new - log pi_old. ``dual_clipped_K``: the dual clip bounds the loss, no
    gradient either; never together with ``clipped_K``.
    """

    loss_K: Tensor
    ratio_K: Tensor
    clipped_K: Tensor
    log_ratio_K: Tensor
    dual_clipped_K: Tensor


def policy_loss(
    logprobs_K: Tensor,
    old_logprobs_K: Tensor,
    advantages_K: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> PolicyTerms:
    """``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` with ``r = exp(logprobs - old_logprobs)``, per token.

    PPO (Schulman et al. 2017, arXiv 1707.06347); two different bounds: clip-higher of DAPO (arXiv 2503.14476). With
    ``dual_clip`` c > 1 (Ye et al. 2020, arXiv 1912.09729) the loss of a token with A < 0 is at most ``-c A``: it bounds
    the push away from a token that the policy has made much likelier meanwhile. Old log-probs and advantages are
    constants.
    """
    assert logprobs_K.shape == old_logprobs_K.shape == advantages_K.shape, "token streams differ in length"
    assert dual_clip is None or dual_clip > 1, "a dual clip of at most 1 would cut the unclipped region"
    old_logprobs_K, advantages_K = old_logprobs_K.detach(), advantages_K.detach()
    log_ratio_K = logprobs_K - old_logprobs_K
    ratio_K = log_ratio_K.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain_K = ratio_K * advantages_K
    bounded_K = ratio_K.clamp(1 - clip_low, 1 + clip_high) * advantages_K
    clipped_K = bounded_K < plain_K
    surrogate_K = torch.where(clipped_K, bounded_K, plain_K)
    dual_clipped_K = torch.zeros_like(clipped_K)
    if dual_clip is not None:
        floor_K = dual_clip * advantages_K
        dual_clipped_K = (advantages_K < 0) & (surrogate_K < floor_K)
        surrogate_K = torch.where(dual_clipped_K, floor_K, surrogate_K)
    return PolicyTerms(-surrogate_K, ratio_K.detach(), clipped_K, log_ratio_K.detach(), dual_clipped_K)


def value_loss(values_K: Tensor, old_values_K: Tensor, returns_K: Tensor, clip: float) -> Tensor:
    """``0.5 max((V - R)^2, (Vold + clip(V - Vold, -c, c) - R)^2)`` per token. Old values and returns are constants."""
    assert values_K.shape == old_values_K.shape == returns_K.shape, "token streams differ in length"
    assert clip > 0, "a value clip must be positive"
    old_values_K, returns_K = old_values_K.detach(), returns_K.detach()
    held_K = old_values_K + (values_K - old_values_K).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_K - returns_K).square(), (held_K - returns_K).square())
