"""How far the generation engine's log-probs, and its routing of tokens to experts, are from the trainer's, for the same tokens.

Raw numbers, never clipped: this is the alarm, not a correction. Not here: thresholds and what to do about them.
Shape letters: K tokens in the loss, T tokens, E experts, M layers with experts, C experts chosen for a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOP_SHARE = 0.99


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Over the tokens of a step, with ``ratio = trainer probability / engine probability`` of the sampled token.

    ``abs_log_ratio_mean`` in nats. ``ratio_mean`` is 1 in expectation when the tokens really come from the engine's
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
    """The experts that each layer's router chooses: those of the highest logits (int64, T x M x C)."""
    return torch.stack([layer_TE.float().topk(choices, dim=-1).indices for layer_TE in logits_TE], dim=1)


def router_disagreement(engine_TMC: Tensor, trainer_TMC: Tensor) -> float:
    """Share of the trainer's choices, over tokens and layers, that the engine did not make; their order does not count."""
    assert engine_TMC.shape == trainer_TMC.shape, "routings of different tokens, layers or numbers of choices"
    assert engine_TMC.numel() > 0, "nothing to compare"
    made_TMC = (trainer_TMC[..., :, None] == engine_TMC[..., None, :]).any(-1)
    return float((~made_TMC).double().mean())
