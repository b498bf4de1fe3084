"""The loss of SimPO. Shape letters: K tokens in the loss, N sequences, P pairs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from togi.algo.preference import simpo_loss
from togi.batch import Batch
from togi.learn.objective import Loss, sequence_means, token_metrics
from togi.methods.preference import OverPairs, pair_metrics, pairs
from togi.model.outputs import Needs, Outputs
from togi.obs import names


@dataclass(frozen=True, slots=True)
class SimPOObjective(OverPairs):
    """SimPO (``togi.algo.preference.simpo_loss``), a mean over the pairs of the step.

    Metrics: loss, accuracy (the chosen response has the higher reward, whatever the margin), the rewards ``beta`` x mean
    logprob and their difference, and the NLL of the chosen responses in nats per token.
    """

    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        assert self.beta > 0 and self.gamma >= 0, "--beta must be above 0 and --gamma not negative"

    @property
    def needs(self) -> Needs:
        return Needs(logprobs=True)

    def judge(self, outputs: Outputs, batch: Batch) -> Tensor:
        return self.beta * sequence_means(outputs.logprobs_K, batch)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        first_P, second_P = pairs(batch)
        means_N = sequence_means(outputs.logprobs_K, batch)
        chosen_P, rejected_P = means_N[first_P], means_N[second_P]
        total = simpo_loss(chosen_P, rejected_P, self.beta, self.gamma).sum()
        own = {names.LOSS: total, names.CHOSEN_NLL: -chosen_P.sum()}
        sums = pair_metrics(own, self.beta * chosen_P, self.beta * rejected_P)
        return Loss(total, token_metrics(sums, len(first_P), {}))
