"""Weights that correct the policy gradient for the engine and the trainer disagreeing about the sampled tokens.

Tokens are drawn by the engine, gradients are the trainer's, and for the same weights the two give a token slightly different
probabilities. Here: one weight a token from the ratio ``trainer / engine``. Not here: the raw numbers, which are reported
whether or not they are corrected (``mismatch``), and the ratio of PPO, which compares the trainer with itself.
Shape letter: K tokens in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from togi.algo.aggregate import mean_of_own_sequence
from togi.config.choices import CorrectionType


@dataclass(frozen=True, slots=True, eq=False)
class TokenWeights:
    """Constants. ``weights_K`` within the bounds where ``kept_K``, else 0; ``truncated_K``: kept, and moved to a bound."""

    weights_K: Tensor
    kept_K: Tensor
    truncated_K: Tensor

    def select(self, terms_K: Tensor) -> Tensor:
        """Weighted terms; exactly 0 without a gradient where a token is masked, whatever its term is."""
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

    A masked token still counts in the denominator of the loss: it is left out of the sum, and the others weigh as before.
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
