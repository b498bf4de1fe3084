"""The ``Objective`` protocol: which outputs the model must compute, and how they and the batch give a loss sum and metrics.

The sum is not divided here. Its denominator, ``count``, is known before any forward, so the learner can add it up over
micro-batches and ranks and divide once. Also here: cross-entropy, the objective of supervised fine-tuning, which ``togi rl`` can
mix in.

The two objectives of online RL over packed batches: the policy loss and the clipped value loss.

The mathematics is in ``togi.algo``. Here are the streams that it reads and the metrics that it reports. Streams of the policy:
``advantages``; ``old_logprobs`` if the same rollouts get more than one update; ``rollout_logprobs``, those of the engine, if the
loss is corrected for them; ``ref_logprobs`` if the KL to a reference is part of the loss. The KL coefficient is then the value
``kl_coef`` of every sequence. Streams of the critic: ``old_values``, ``returns``. Shape letter: K tokens in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from togi.algo import policy
from togi.algo.kl import kl_estimate
from togi.batch import Batch
from togi.config.choices import Aggregation, CorrectionType, KLEstimator, PolicyLossType
from togi.config.fields import Hook
from togi.learn.hooks import load_policy_loss
from togi.model.policy import Needs, Outputs
from togi.obs import names
from togi.obs.metrics import Metric, maximum, mean


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """``sum``: a scalar with a gradient, to be divided by the step's count. ``metrics``: this batch's part of each."""

    sum: Tensor
    metrics: Mapping[str, Metric]


class Objective(Protocol):
    """Inherit from this class to get its ``count``, ``forward``, ``judge`` and ``summary``."""

    @property
    def needs(self) -> Needs: ...

    def count(self, batch: Batch) -> float:
        """This batch's share of the denominator (tokens, sequences, pairs, ...), at least 0. Needs no forward.

        Here: the tokens in the loss.
        """
        return float(batch.targets_K.numel())

    def loss(self, outputs: Outputs, batch: Batch) -> Loss: ...

    def forward(self, model: nn.Module, batch: Batch, *, balance: bool = False) -> Outputs:
        """Call the model. Override it to pass more arguments, such as a temperature.

        ``balance``: also compute the load-balancing loss, which the learner adds.
        """
        outputs: Outputs = model(batch, replace(self.needs, balance=balance))
        return outputs

    def judge(self, outputs: Outputs, batch: Batch) -> Tensor:
        """One number a sequence, shape [N], to show how each held-out sequence did. Empty if the objective has none."""
        return torch.empty(0)

    def summary(self, values: Mapping[str, float]) -> dict[str, float]:
        """The step's metrics after reduction. Override it to derive metrics that are not means, such as ratios."""
        return dict(values)


def sequence_means(values_K: Tensor, batch: Batch) -> Tensor:
    """The mean of each sequence's values at its tokens in the loss, shape [N]."""
    sums_N = values_K.new_zeros(batch.num_sequences).index_add(0, batch.target_sequences_K, values_K)
    return sums_N / batch.tokens_per_sequence_N()


def token_metrics(sums: Mapping[str, Tensor], weight: float, maxima: Mapping[str, Tensor]) -> dict[str, Metric]:
    """Metrics of the tokens of one batch: means, from scalar sums over ``weight`` tokens, and maxima.

    All of them take one transfer from the device.
    """
    with torch.no_grad():
        numbers = torch.stack([value.detach().double() for value in (*sums.values(), *maxima.values())]).tolist()
    means = {name: mean(number, weight) for name, number in zip(sums, numbers, strict=False)}
    return means | {name: maximum(number) for name, number in zip(maxima, numbers[len(sums) :], strict=True)}


# Supervised fine-tuning and continued pre-training: cross-entropy on the tokens in the loss, which ``togi.data`` chooses.

MAX_EXPONENT = 700.0


@dataclass(frozen=True, slots=True)
class SFTObjective(Objective):
    """``-log p(token)``, an exact mean over the tokens in the loss of the whole optimizer step, in nats.

    Not a mean of means: a token weighs the same in a long and in a short micro-batch, on every rank.
    """

    needs = Needs(logprobs=True)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        total = -outputs.logprobs_K.sum()
        return Loss(total, token_metrics({names.LOSS: total}, outputs.logprobs_K.numel(), {}))

    def judge(self, outputs: Outputs, batch: Batch) -> Tensor:
        return sequence_means(-outputs.logprobs_K, batch)

    def summary(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add the perplexity, exp(loss), from the mean loss of the step: perplexities themselves cannot be averaged."""
        loss = values[names.LOSS]
        return {**values, names.PERPLEXITY: math.inf if loss > MAX_EXPONENT else math.exp(loss)}


ADVANTAGES = "advantages"
OLD_LOGPROBS = "old_logprobs"
ROLLOUT_LOGPROBS = "rollout_logprobs"
REF_LOGPROBS = "ref_logprobs"
OLD_VALUES = "old_values"
RETURNS = "returns"
KL_COEF = "kl_coef"

RATIO_MAX = "policy/ratio_max"
VALUE_RETURN = "value/return"
EXPLAINED_VARIANCE = "value/explained_variance"
_RETURN_SQUARED = "value/return_squared"
_ERROR = "value/error"
_ERROR_SQUARED = "value/error_squared"


@dataclass(frozen=True, slots=True)
class EngineCorrection:
    """The correction of ``togi.algo.policy``: its kind and its bounds on the ratio trainer / engine."""

    kind: CorrectionType
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PolicyObjective(Objective):
    """A surrogate of ``togi.algo.policy`` - ``entropy_coef`` x entropy + the KL penalty, all aggregated alike.

    A batch without ``old_logprobs`` gets the first and only update on its rollouts. Its old log-probs are the forward's own,
    detached: the ratio is exactly 1, and no scoring pass is needed. With a ``correction`` the surrogate's terms are weighted. With
    ``against_engine`` the engine's log-probs replace the old ones. ``constant`` is the divisor of ``Aggregation.CONSTANT`` in
    tokens; ``temperature`` is that of sampling.
    """

    clip_low: float
    clip_high: float
    aggregation: Aggregation
    kind: PolicyLossType | Hook = PolicyLossType.PPO
    dual_clip: float | None = None
    constant: float = 1.0
    kl: KLEstimator | None = None
    entropy_coef: float = 0.0
    correction: EngineCorrection | None = None
    against_engine: bool = False
    temperature: float = 1.0

    needs = Needs(logprobs=True, entropy=True)

    def forward(self, model: nn.Module, batch: Batch, *, balance: bool = False) -> Outputs:
        outputs: Outputs = model(batch, replace(self.needs, balance=balance), self.temperature)
        return outputs

    def count(self, batch: Batch) -> float:
        return policy.count(self.aggregation, batch.target_sequences_K, batch.num_sequences, self.constant)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        logprobs_K, entropy_K = outputs.logprobs_K, outputs.entropy_K
        # the surrogate of each token
        old_K = (
            batch.streams[OLD_LOGPROBS].to(logprobs_K.dtype) if OLD_LOGPROBS in batch.streams else logprobs_K.detach()
        )
        loss_K, log_ratio_K, clipped_K = self._surrogate(logprobs_K, old_K, batch)
        # the weights against the engine: the terms whose ratio is out of bounds are bounded or masked
        own = (batch.target_sequences_K, batch.num_sequences)
        sums = dict[str, Tensor]()
        if (by := self.correction) is not None:
            engine_K = batch.streams[ROLLOUT_LOGPROBS]
            trust = policy.correction(by.kind, old_K, engine_K, *own, low=by.low, high=by.high)
            masked_K = ~trust.kept_K
            loss_K = trust.select(loss_K)
            sums = {
                names.MISMATCH_CORRECTED_SHARE: (trust.truncated_K | masked_K).sum(),
                names.MISMATCH_MASKED_SHARE: masked_K.sum(),
                names.MISMATCH_MEAN_WEIGHT: trust.weights_K.sum(),
            }
        # the aggregation: a weighted sum over tokens
        weights_K = policy.token_weights(self.aggregation, *own, logprobs_K.dtype)
        total = (weights_K * loss_K).sum()
        sums |= {
            names.POLICY_LOSS: loss_K.sum(),
            names.POLICY_CLIP_FRACTION: clipped_K.sum(),
            names.POLICY_PPO_KL: -log_ratio_K.sum(),
            names.ENTROPY: entropy_K.sum(),
        }
        # entropy bonus and KL penalty, with the weights of the surrogate
        if self.entropy_coef > 0:
            total = total - self.entropy_coef * (weights_K * entropy_K).sum()
        if self.kl is not None:
            kl_K = kl_estimate(logprobs_K, batch.streams[REF_LOGPROBS], self.kl)
            coef = batch.values[KL_COEF][0]  # the same for all sequences: a controller changes it only between rollouts
            total = total + coef * (weights_K * kl_K).sum()
            sums[names.KL_REFERENCE] = kl_K.sum()
        # metrics: the total over the count of the step, all others over tokens
        tokens = logprobs_K.numel()
        maxima = {RATIO_MAX: policy.bounded_ratio(log_ratio_K).max()} if tokens > 0 else {}
        minimised = token_metrics({names.POLICY_TOTAL_LOSS: total}, self.count(batch), {})
        return Loss(total, minimised | token_metrics(sums, tokens, maxima))

    def _surrogate(self, logprobs_K: Tensor, old_K: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the log ratio and whether the clip changes it, of each token (``togi.algo.policy``)."""
        base_K = batch.streams[ROLLOUT_LOGPROBS] if self.against_engine else old_K
        streams = (logprobs_K, base_K, batch.streams[ADVANTAGES])
        low, high, dual = self.clip_low, self.clip_high, self.dual_clip
        match self.kind:
            case PolicyLossType.PPO:
                return policy.policy_loss(*streams, clip_low=low, clip_high=high, dual_clip=dual)
            case PolicyLossType.GSPO:
                own = (batch.target_sequences_K, batch.num_sequences)
                return policy.gspo_loss(*streams, *own, clip_low=low, clip_high=high, dual_clip=dual)
            case PolicyLossType.CISPO:
                return policy.cispo_loss(*streams, clip_low=low, clip_high=high)
            case Hook() as hook:
                return self._hooked(hook, *streams, batch.target_sequences_K)

    def _hooked(
        self, hook: Hook, logprobs_K: Tensor, base_K: Tensor, advantages_K: Tensor, sequences_K: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The user's loss. The clip fraction counts the ratios outside of the clip range, whatever the loss does there."""
        if logprobs_K.numel() == 0:  # no token to train on this rank: do not call the user's function
            loss_K = logprobs_K
        else:
            loss_K = load_policy_loss(hook)(
                logprobs_K=logprobs_K,
                old_logprobs_K=base_K.clone(),
                advantages_K=advantages_K.clone(),
                sequences_K=sequences_K,
                clip_low=self.clip_low,
                clip_high=self.clip_high,
            )
        # Losses are summed over many tokens: never in a lower precision than that of the log-probs.
        loss_K = loss_K.to(torch.promote_types(loss_K.dtype, logprobs_K.dtype))
        log_ratio_K = (logprobs_K - base_K).detach()
        ratio_K = policy.bounded_ratio(log_ratio_K)
        return loss_K, log_ratio_K, (ratio_K < 1 - self.clip_low) | (ratio_K > 1 + self.clip_high)


@dataclass(frozen=True, slots=True)
class ValueObjective(Objective):
    """The critic's clipped squared error (``togi.algo.policy.value_loss``), a mean over the tokens of the step."""

    clip: float

    needs = Needs(values=True)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        values_K = outputs.values_K
        old_K, returns_K = (batch.streams[name].to(values_K.dtype) for name in (OLD_VALUES, RETURNS))
        loss_K = policy.value_loss(values_K, old_K, returns_K, self.clip)
        errors_K = returns_K - values_K.detach()
        # first and second moments over tokens, from which ``summary`` derives the variances
        sums: dict[str, Tensor] = {
            names.VALUE_LOSS: loss_K.sum(),
            names.VALUE_MEAN: values_K.sum(),
            VALUE_RETURN: returns_K.sum(),
            _RETURN_SQUARED: returns_K.square().sum(),
            _ERROR: errors_K.sum(),
            _ERROR_SQUARED: errors_K.square().sum(),
        }
        return Loss(loss_K.sum(), token_metrics(sums, values_K.numel(), {}))

    def summary(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add the explained variance, ``1 - Var(return - value) / Var(return)``: 1 for a perfect critic, 0 for a constant.

        NaN if all returns are equal.
        """
        shown = dict(values)
        error_variance = shown.pop(_ERROR_SQUARED) - shown.pop(_ERROR) ** 2
        variance = shown.pop(_RETURN_SQUARED) - shown[VALUE_RETURN] ** 2
        shown[EXPLAINED_VARIANCE] = 1 - error_variance / variance if variance > 0 else torch.nan
        return shown
