"""Engine mismatch: how far the engine's log-probs and expert routing are from the trainer's for the same tokens.

First the raw numbers, never clipped, which show a problem; then the correction. Not here: thresholds.
Shape letters: K tokens in the loss, T tokens, E experts, M layers with experts, C experts chosen for a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from togi.algo.aggregate import mean_of_own_sequence
from togi.config.choices import CorrectionType

TOP_SHARE = 0.99


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Statistics over the tokens of a step, with ``ratio = trainer probability / engine probability`` of the sampled token.

    ``abs_log_ratio_mean`` in nats. ``ratio_mean`` is 1 in expectation if the tokens come from the engine's reported
    distribution. ``ratio_p99`` is the smallest ratio that at least 99 % of the tokens do not exceed. ``kl``: k3
    estimate of KL(engine || trainer), the mean of ``ratio - 1 - log ratio``, in nats per token.
    """

    abs_log_ratio_mean: float
    ratio_mean: float
    ratio_p99: float
    ratio_max: float
    kl: float


def mismatch(rollout_logprobs_K: Tensor, logprobs_K: Tensor) -> Mismatch:
    """Compare the log-probs under which tokens were sampled with the trainer's for the same policy version, in float64.

    Both must be of the same distribution: same temperature, no truncation by top-p or top-k. K must not be 0.
    """
    assert rollout_logprobs_K.shape == logprobs_K.shape, "token streams differ in length"
    assert logprobs_K.numel() > 0, "no tokens to compare"
    log_ratio_K = logprobs_K.detach().double() - rollout_logprobs_K.detach().double()
    ratio_K = log_ratio_K.exp()
    rank = math.ceil(TOP_SHARE * len(ratio_K))
    return Mismatch(
        abs_log_ratio_mean=float(log_ratio_K.abs().mean()),
        ratio_mean=float(ratio_K.mean()),
        # torch.quantile refuses more than 16 million elements; a long step has more.
        ratio_p99=float(torch.kthvalue(ratio_K, rank).values),
        ratio_max=float(ratio_K.max()),
        kl=float((torch.expm1(log_ratio_K) - log_ratio_K).mean()),
    )


def chosen_experts(logits_TE: Sequence[Tensor], choices: int) -> Tensor:
    """The experts that each layer's router chooses, by the highest logits (int64, [T, M, C])."""
    return torch.stack([layer_TE.float().topk(choices, dim=-1).indices for layer_TE in logits_TE], dim=1)


def router_disagreement(engine_TMC: Tensor, trainer_TMC: Tensor) -> float:
    """The share of the trainer's choices, over tokens and layers, that the engine did not make. Their order does not count."""
    assert engine_TMC.shape == trainer_TMC.shape, "routings of different tokens, layers or numbers of choices"
    assert engine_TMC.numel() > 0, "nothing to compare"
    made_TMC = (trainer_TMC[..., :, None] == engine_TMC[..., None, :]).any(-1)
    return float((~made_TMC).double().mean())


# Weights that correct the policy gradient for the mismatch between engine and trainer.
#
# The engine samples the tokens and the trainer computes the gradients. For the same weights the two give a token slightly
# different probabilities. The correction is one weight a token, from the ratio ``trainer / engine``. It is not PPO's ratio, which
# compares the trainer with itself.
# Shape letter: K tokens in the loss.


@dataclass(frozen=True, slots=True, eq=False)
class TokenWeights:
    """Constants. ``weights_K``: within the bounds where ``kept_K``, else 0. ``truncated_K``: kept, but moved to a bound."""

    weights_K: Tensor
    kept_K: Tensor
    truncated_K: Tensor

    def select(self, terms_K: Tensor) -> Tensor:
        """The weighted terms. A masked token gives exactly 0 without a gradient, even if its term is not finite."""
        return torch.where(self.kept_K, self.weights_K * terms_K, 0.0)


def correction(
    kind: CorrectionType,
    logprobs_K: Tensor,
    rollout_logprobs_K: Tensor,
    sequences_K: Tensor,
    num_sequences: int,
    *,
    low: float,
    high: float,
) -> TokenWeights:
    """Weights from ``w = exp(logprobs - rollout_logprobs)``, the trainer's log-probs before the update and the engine's.

    * tis: ``clip(w, low, high)`` (truncated importance sampling; Yao et al. 2025, "Your Efficient RL Framework Secretly
      Brings You Off-Policy RL Training").
    * icepop: ``w`` where ``low <= w <= high``, else masked (Ling Team 2025, "Every Step Evolves", arXiv 2510.18855).
    * seq-mask-tis: ``clip(w, low, high)`` where the geometric mean of w over the token's sequence lies within the bounds,
      else the sequence is masked (Liu et al. 2025, "When Speed Kills Stability").

    A masked token still counts in the denominator of the loss, so the weight of the other tokens does not change.
    ``sequences_K`` as in ``aggregate``.
    """
    assert logprobs_K.shape == rollout_logprobs_K.shape == sequences_K.shape, "token streams differ in length"
    assert 0 <= low < high, "an empty range of ratios"
    log_ratio_K = logprobs_K.detach() - rollout_logprobs_K.detach()
    ratio_K = log_ratio_K.exp()
    bounded_K = ratio_K.clamp(low, high)
    match kind:
        case CorrectionType.TIS:
            kept_K = torch.ones_like(ratio_K, dtype=torch.bool)
        case CorrectionType.ICEPOP:
            kept_K = (ratio_K >= low) & (ratio_K <= high)
        case CorrectionType.SEQ_MASK_TIS:
            geometric_K = mean_of_own_sequence(log_ratio_K, sequences_K, num_sequences).exp()
            kept_K = (geometric_K >= low) & (geometric_K <= high)
    return TokenWeights(torch.where(kept_K, bounded_K, 0.0), kept_K, kept_K & (bounded_K != ratio_K))
