"""The losses of the policy (PPO, GSPO, CISPO) and of the critic, per token. ``aggregate`` sums and divides them.

Shape letter: K tokens in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from togi.algo.aggregate import mean_of_own_sequence

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True, eq=False)
class PolicyTerms:
    """``loss_K`` has the gradient. The rest is for metrics and has none.

    ``ratio_K``: exp of the log ratio clamped to [-20, 20], of the token or (GSPO) of its sequence. ``clipped_K``: where the clip
    changes the ratio; in PPO and GSPO the token then has no gradient, in CISPO a bounded one. ``log_ratio_K``: raw
    log pi_new - log pi_old.
    """

    loss_K: Tensor
    ratio_K: Tensor
    clipped_K: Tensor
    log_ratio_K: Tensor


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
    the push away from a token that has become much likelier since. Old log-probs and advantages are
    constants.
    """
    assert logprobs_K.shape == old_logprobs_K.shape, "token streams differ in length"
    log_ratio_K = logprobs_K - old_logprobs_K.detach()
    return _clipped(log_ratio_K, advantages_K, clip_low, clip_high, dual_clip)


def gspo_loss(
    logprobs_K: Tensor,
    old_logprobs_K: Tensor,
    advantages_K: Tensor,
    sequences_K: Tensor,
    num_sequences: int,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> PolicyTerms:
    """PPO's clipped loss with one ratio for a whole sequence, ``s = exp(mean over its tokens of logprobs - old_logprobs)``.

    GSPO (Zheng et al. 2025, arXiv 2507.18071), in the paper's token form (section 4.3): each token's ratio is
    ``sg[s] exp(logprobs - sg[logprobs])``. Where the tokens of a sequence have one advantage, loss and gradient are
    exactly those of the sequence form; where they differ, as with a KL in the reward, each token uses its own advantage.
    The paper's loss is a mean over sequences of means over tokens: aggregate with sequence_mean. ``sequences_K`` as in
    ``aggregate``; ``dual_clip`` as in ``policy_loss``.
    """
    assert logprobs_K.shape == old_logprobs_K.shape == sequences_K.shape, "token streams differ in length"
    # the value of the sequence's ratio, with the gradient of the token's own log-prob
    fixed_K = logprobs_K.detach()
    mean_K = mean_of_own_sequence(fixed_K - old_logprobs_K.detach(), sequences_K, num_sequences)
    return _clipped(mean_K + (logprobs_K - fixed_K), advantages_K, clip_low, clip_high, dual_clip)


def cispo_loss(
    logprobs_K: Tensor, old_logprobs_K: Tensor, advantages_K: Tensor, *, clip_low: float, clip_high: float
) -> PolicyTerms:
    """``-sg[clip(r, 1 - clip_low, 1 + clip_high)] A logprobs``, per token: the weight is bounded, no gradient is dropped.

    CISPO (MiniMax-M1, arXiv 2506.13585, section 3.1). The paper has no lower bound, which is ``clip_low`` 1.
    """
    assert logprobs_K.shape == old_logprobs_K.shape == advantages_K.shape, "token streams differ in length"
    log_ratio_K = (logprobs_K - old_logprobs_K).detach()
    ratio_K = log_ratio_K.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weight_K = ratio_K.clamp(1 - clip_low, 1 + clip_high)
    loss_K = -weight_K * advantages_K.detach() * logprobs_K
    return PolicyTerms(loss_K, ratio_K, weight_K != ratio_K, log_ratio_K)


def with_ratio(loss_K: Tensor, log_ratio_K: Tensor, clip_low: float, clip_high: float) -> PolicyTerms:
    """Any loss, with the metrics of the ratio. ``clipped_K``: where the ratio is outside of [1 - clip_low, 1 + clip_high]."""
    ratio_K = log_ratio_K.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    beyond_K = (ratio_K < 1 - clip_low) | (ratio_K > 1 + clip_high)
    return PolicyTerms(loss_K, ratio_K, beyond_K, log_ratio_K)


def _clipped(
    log_ratio_K: Tensor, advantages_K: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> PolicyTerms:
    assert log_ratio_K.shape == advantages_K.shape, "token streams differ in length"
    assert dual_clip is None or dual_clip > 1, "a dual clip of at most 1 would cut the unclipped region"
    advantages_K = advantages_K.detach()
    ratio_K = log_ratio_K.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain_K = ratio_K * advantages_K
    bounded_K = ratio_K.clamp(1 - clip_low, 1 + clip_high) * advantages_K
    clipped_K = bounded_K < plain_K
    surrogate_K = torch.where(clipped_K, bounded_K, plain_K)
    if dual_clip is not None:
        # A < 0 only: the surrogate r A has no lower bound there
        floor_K = dual_clip * advantages_K
        surrogate_K = torch.where((advantages_K < 0) & (surrogate_K < floor_K), floor_K, surrogate_K)
    return PolicyTerms(-surrogate_K, ratio_K.detach(), clipped_K, log_ratio_K.detach())


def value_loss(values_K: Tensor, old_values_K: Tensor, returns_K: Tensor, clip: float) -> Tensor:
    """``0.5 max((V - R)^2, (Vold + clip(V - Vold, -c, c) - R)^2)`` per token. Old values and returns are constants."""
    assert values_K.shape == old_values_K.shape == returns_K.shape, "token streams differ in length"
    assert clip > 0, "a value clip must be positive"
    old_values_K, returns_K = old_values_K.detach(), returns_K.detach()
    held_K = old_values_K + (values_K - old_values_K).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_K - returns_K).square(), (held_K - returns_K).square())
