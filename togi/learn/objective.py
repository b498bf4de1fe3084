"""The ``Objective`` protocol: which outputs the model must compute, and how they and the batch give a loss sum and metrics.

The sum is not divided here. Its denominator, ``count``, is known before any forward, so the learner can add it up over
micro-batches and ranks and divide once. Also here: cross-entropy, the objective of supervised fine-tuning, which ``togi rl`` can
mix in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from togi.batch import Batch
from togi.model.outputs import Needs, Outputs
from togi.obs import names
from togi.obs.metrics import Metric, maximum, mean


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """``sum``: a scalar with a gradient, to be divided by the step's count. ``metrics``: this batch's part of each."""

    sum: Tensor
    metrics: Mapping[str, Metric]


class Objective(Protocol):
    """Inherit from this class to get its ``forward``, ``judge`` and ``summary``."""

    @property
    def needs(self) -> Needs: ...

    def count(self, batch: Batch) -> float:
        """This batch's share of the denominator (tokens, sequences, pairs, ...), at least 0. Needs no forward."""
        ...

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

    @property
    def needs(self) -> Needs:
        return Needs(logprobs=True)

    def count(self, batch: Batch) -> float:
        return float(batch.targets_K.numel())

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        total = -outputs.logprobs_K.sum()
        return Loss(total, token_metrics({names.LOSS: total}, outputs.logprobs_K.numel(), {}))

    def judge(self, outputs: Outputs, batch: Batch) -> Tensor:
        return sequence_means(-outputs.logprobs_K, batch)

    def summary(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add the perplexity, exp(loss), from the mean loss of the step: perplexities themselves cannot be averaged."""
        loss = values[names.LOSS]
        return {**values, names.PERPLEXITY: math.inf if loss > MAX_EXPONENT else math.exp(loss)}
