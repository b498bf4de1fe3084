"""Losses of preference training: reward models (Bradley-Terry), DPO, cDPO, IPO, SimPO, ORPO's odds, KTO
with its KL estimate.

Pure functions of scores and of log-probabilities summed or averaged over a response. They return one term a pair or row, and the
learner divides the sum once. Not here: which rows are a pair.
Shape letters: K tokens in the loss, N sequences, P pairs, M mismatched rows.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from togi.config.choices import RewardLoss


def sequence_sums(values_K: Tensor, sequences_K: Tensor, num_sequences: int) -> Tensor:
    """The sum of each sequence's values, shape [N]; 0 for a sequence without tokens. Of log-probs: S(y), in nats."""
    return values_K.new_zeros(num_sequences).index_add(0, sequences_K, values_K)


def pairwise_reward_loss(
    chosen_P: Tensor, rejected_P: Tensor, margins_P: Tensor | None, kind: RewardLoss = RewardLoss.SIGMOID
) -> Tensor:
    """The negative log-likelihood that the chosen response wins, shape P (Bradley & Terry 1952).

    sigmoid: ``-log sigmoid(chosen - rejected - margin)``, the loss of InstructGPT (Ouyang et al. 2022, arXiv
    2203.02155) with the margin of Llama 2 (Touvron et al. 2023, arXiv 2307.09288); ``margins_P`` None is no margin.
    logexp: ``log(1 + exp(rejected - chosen))``, equal to sigmoid without a margin; it takes no margin. Both are computed
    as log-sigmoid, which cannot overflow.
    """
    assert kind is RewardLoss.SIGMOID or margins_P is None, "logexp has no margin"
    gaps_P = chosen_P - rejected_P
    return -logsigmoid(gaps_P if margins_P is None else gaps_P - margins_P)


def dpo_loss(log_ratios_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """``-(1 - e) log sigmoid(b h) - e log sigmoid(-b h)``, shape P.

    ``log_ratios_P``: h = (S_policy(chosen) - S_policy(rejected)) - (S_ref(chosen) - S_ref(rejected)), with S the
    log-probability of the whole response. e = 0 is DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7); e > 0 is
    conservative DPO, which takes each label to be wrong with probability e (Mitchell 2023, "A note on DPO with noisy
    preferences & relationship to IPO").
    """
    logits_P = beta * log_ratios_P
    if label_smoothing == 0:
        return -logsigmoid(logits_P)
    return -(1 - label_smoothing) * logsigmoid(logits_P) - label_smoothing * logsigmoid(-logits_P)


def ipo_loss(log_ratios_P: Tensor, beta: float) -> Tensor:
    """``(h - 1 / (2 b))^2``, shape P (Azar et al. 2023, arXiv 2310.12036, equation 17; their tau is b).

    h as in ``dpo_loss``: of sums over responses, as in the paper, not of means over their tokens.
    """
    return (log_ratios_P - 1 / (2 * beta)).square()


def simpo_loss(chosen_P: Tensor, rejected_P: Tensor, beta: float, gamma: float) -> Tensor:
    """``-log sigmoid(b (chosen - rejected) - g)``, shape P (Meng et al. 2024, arXiv 2405.14734, equation 6).

    ``chosen_P``, ``rejected_P``: mean log-probability of the response's tokens, in nats. No reference.
    """
    return -logsigmoid(beta * (chosen_P - rejected_P) - gamma)


def log_odds(means_N: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of ``p = exp(mean log-probability of a response's tokens)``, shape N.

    Hong et al. 2024, arXiv 2403.07691, equation 4. A response whose tokens are all certain has infinite odds. It gets
    the odds of the largest probability below 1, and no gradient.
    """
    below_N = means_N.clamp(max=-torch.finfo(means_N.dtype).eps)
    return below_N - torch.log(-torch.expm1(below_N))


def kto_kl_estimate(policy_sums: Sequence[float], reference_sums: Sequence[float]) -> float:
    """The reference point of KTO: ``max(0, mean over M of (S_policy - S_ref))``, in nats a row.

    Ethayarajh et al. 2024, arXiv 2402.01306, section 4.1. The rows are mismatched: the prompt of one row with the
    response of another. They must be those of the whole optimizer step, of all ranks and micro-batches: a mean of
    local maxima would be larger. It has no gradient.
    """
    assert len(policy_sums) == len(reference_sums) > 0, "the KL estimate needs both models on the same mismatched rows"
    gaps = (float(p) - float(r) for p, r in zip(policy_sums, reference_sums, strict=True))
    return max(0.0, math.fsum(gaps) / len(policy_sums))


def kto_loss(
    log_ratios_N: Tensor,
    desirable_N: Tensor,
    kl_N: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Desirable rows: ``w_D (1 - sigmoid(b (d - KL)))``; undesirable: ``w_U (1 - sigmoid(b (KL - d)))``. Shape N.

    Ethayarajh et al. 2024, arXiv 2402.01306, equation 8, with d = S_policy - S_ref (``log_ratios_N``) and their
    lambdas as weights. ``desirable_N`` is bool; ``kl_N`` is ``kto_kl_estimate`` repeated, a constant.
    """
    signs_N = torch.where(desirable_N, 1.0, -1.0).to(log_ratios_N.dtype)
    weights_N = torch.where(desirable_N, desirable_weight, undesirable_weight).to(log_ratios_N.dtype)
    # 1 - sigmoid(x) = sigmoid(-x), without the subtraction that loses the digits of a small loss.
    return weights_N * torch.sigmoid(-beta * signs_N * (log_ratios_N - kl_N.detach()))
