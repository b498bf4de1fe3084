"""The policy losses of online RL (PPO, GSPO, CISPO), how their terms are averaged, and the correction for the engine's log-probs.

First the raw numbers of the mismatch between engine and trainer, never clipped, which show a problem; then the correction.
Shape letters: K tokens in the loss, T tokens, E experts, M layers with experts, C experts chosen for a token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from togi.batch import tokens_per_sequence
from togi.config.choices import Aggregation, CorrectionType


def token_weights(
    aggregation: Aggregation, sequences_K: Tensor, num_sequences: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight of each token's term. Shape [K], on the device of ``sequences_K``.

    token_mean and constant: 1. sequence_mean: 1 / number of tokens in the loss of the token's own sequence.
    """
    if aggregation is Aggregation.SEQUENCE_MEAN:
        return tokens_per_sequence(sequences_K, num_sequences)[sequences_K].to(dtype).reciprocal()
    return torch.ones(sequences_K.shape, dtype=dtype, device=sequences_K.device)


def count(aggregation: Aggregation, sequences_K: Tensor, num_sequences: int, constant: float) -> float:
    """This part's share of the denominator; the shares of all parts are added.

    token_mean: tokens. sequence_mean: sequences with at least one token in the loss. constant (Dr. GRPO,
    arXiv 2503.20783): all sequences times ``constant``, the generation limit in tokens, so that the length of an answer cannot
    change it.
    """
    match aggregation:
        case Aggregation.TOKEN_MEAN:
            return float(sequences_K.numel())
        case Aggregation.SEQUENCE_MEAN:
            return float((tokens_per_sequence(sequences_K, num_sequences) > 0).sum())
        case Aggregation.CONSTANT:
            assert constant > 0, "the constant divisor must be positive"
            return float(num_sequences * constant)


def mean_of_own_sequence(values_K: Tensor, sequences_K: Tensor, num_sequences: int) -> Tensor:
    """For each token the mean over the tokens in the loss of its own sequence. Shape [K], differentiable."""
    sums_N = values_K.new_zeros(num_sequences).index_add(0, sequences_K, values_K)
    lengths_N = tokens_per_sequence(sequences_K, num_sequences)
    # gathered before the division: a sequence without tokens would divide by 0
    return sums_N[sequences_K] / lengths_N[sequences_K]


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
        case CorrectionType.RATIO:
            raise AssertionError("a coupled ratio has no weights")
    return TokenWeights(torch.where(kept_K, bounded_K, 0.0), kept_K, kept_K & (bounded_K != ratio_K))


# The policy losses. Each returns (loss, log ratio, clipped), all [K]. The loss has the gradient, the others are for metrics.
#
# The log ratio is the raw log pi_new - log pi_old of the token or (GSPO) of its sequence. ``clipped`` (bool) is where the clip
# changes the ratio; in PPO and GSPO the token then has no gradient, in CISPO a bounded one.

MAX_LOG_RATIO = 20.0


def bounded_ratio(log_ratio_K: Tensor) -> Tensor:
    """exp of the log ratio clamped to [-20, 20]: the ratio in all losses."""
    return log_ratio_K.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def policy_loss(
    logprobs_K: Tensor,
    old_logprobs_K: Tensor,
    advantages_K: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
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
) -> tuple[Tensor, Tensor, Tensor]:
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
) -> tuple[Tensor, Tensor, Tensor]:
    """``-sg[clip(r, 1 - clip_low, 1 + clip_high)] A logprobs``, per token: the weight is bounded, no gradient is dropped.

    CISPO (MiniMax-M1, arXiv 2506.13585, section 3.1). The paper has no lower bound, which is ``clip_low`` 1.
    """
    assert logprobs_K.shape == old_logprobs_K.shape == advantages_K.shape, "token streams differ in length"
    log_ratio_K = (logprobs_K - old_logprobs_K).detach()
    ratio_K = bounded_ratio(log_ratio_K)
    weight_K = ratio_K.clamp(1 - clip_low, 1 + clip_high)
    return -weight_K * advantages_K.detach() * logprobs_K, log_ratio_K, weight_K != ratio_K


def _clipped(
    log_ratio_K: Tensor, advantages_K: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    assert log_ratio_K.shape == advantages_K.shape, "token streams differ in length"
    assert dual_clip is None or dual_clip > 1, "a dual clip of at most 1 would cut the unclipped region"
    advantages_K = advantages_K.detach()
    ratio_K = bounded_ratio(log_ratio_K)
    plain_K = ratio_K * advantages_K
    bounded_K = ratio_K.clamp(1 - clip_low, 1 + clip_high) * advantages_K
    clipped_K = bounded_K < plain_K
    surrogate_K = torch.where(clipped_K, bounded_K, plain_K)
    if dual_clip is not None:
        # A < 0 only: the surrogate r A has no lower bound there
        floor_K = dual_clip * advantages_K
        surrogate_K = torch.where((advantages_K < 0) & (surrogate_K < floor_K), floor_K, surrogate_K)
    return -surrogate_K, log_ratio_K.detach(), clipped_K


def value_loss(values_K: Tensor, old_values_K: Tensor, returns_K: Tensor, clip: float) -> Tensor:
    """``0.5 max((V - R)^2, (Vold + clip(V - Vold, -c, c) - R)^2)`` per token. Old values and returns are constants."""
    assert values_K.shape == old_values_K.shape == returns_K.shape, "token streams differ in length"
    assert clip > 0, "a value clip must be positive"
    old_values_K, returns_K = old_values_K.detach(), returns_K.detach()
    held_K = old_values_K + (values_K - old_values_K).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_K - returns_K).square(), (held_K - returns_K).square())
