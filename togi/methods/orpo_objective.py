"""The loss of ORPO. Shape letters: K tokens in the loss, N sequences, P pairs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from togi.algo.preference import log_odds
from togi.batch import Batch
from togi.learn.objective import Loss, sequence_means, token_metrics
from togi.methods.preference import OverPairs, pair_metrics, pairs
from togi.model.outputs import Needs, Outputs
from togi.obs import names


@dataclass(frozen=True, slots=True)
class ORPOObjective(OverPairs):
    """``NLL(chosen) - coef log sigmoid(log odds(chosen) - log odds(rejected))``, a mean over the pairs of the step.

    Hong et al. 2024, arXiv 2403.07691, equations 6 and 7. The NLL is a mean over the response's tokens, and so is the
    logprob whose odds are compared. Metrics: loss, accuracy (the chosen response has the higher mean logprob), the
    rewards ``coef`` x mean logprob and their difference, the NLL of the chosen responses in nats per token, the log odds ratio.
    """

    coef: float = 0.1

    def __post_init__(self) -> None:
        assert self.coef > 0, "--odds_ratio_coef must be above 0"

    @property
    def needs(self) -> Needs:
        return Needs(logprobs=True)

    def judge(self, outputs: Outputs, batch: Batch) -> Tensor:
        return self.coef * sequence_means(outputs.logprobs_K, batch)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        first_P, second_P = pairs(batch)
        means_N = sequence_means(outputs.logprobs_K, batch)
        chosen_P, rejected_P = means_N[first_P], means_N[second_P]
        ratios_P = log_odds(chosen_P) - log_odds(rejected_P)
        total = (-chosen_P - self.coef * logsigmoid(ratios_P)).sum()
        own = {names.LOSS: total, names.CHOSEN_NLL: -chosen_P.sum(), "log_odds_ratio": ratios_P.sum()}
        sums = pair_metrics(own, self.coef * chosen_P, self.coef * rejected_P)
        return Loss(total, token_metrics(sums, len(first_P), {}))
