"""Supervised fine-tuning and continued pre-training: cross-entropy on the tokens in the loss.

Which tokens those are is the data's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from togi.batch import Batch
from togi.learn.objective import Loss, Objective, sequence_means, token_metrics
from togi.model.outputs import Needs, Outputs
from togi.obs import names

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
        """Adds the perplexity, exp(loss): of the mean over the step, since means of perplexities do not add up."""
        loss = values[names.LOSS]
        return {**values, names.PERPLEXITY: math.inf if loss > MAX_EXPONENT else math.exp(loss)}
