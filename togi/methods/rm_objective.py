"""The loss of reward models. Values of a pair: ``chosen`` and ``margin``. Shape letters: N sequences, P pairs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from togi.algo.preference import pairwise_reward_loss
from togi.batch import Batch
from togi.config.choices import RewardLoss
from togi.learn.objective import Loss, token_metrics
from togi.methods.preference import OverPairs, pair_metrics, pairs
from togi.model.policy import Needs, Outputs
from togi.obs import names

MARGIN = "margin"


@dataclass(frozen=True, slots=True)
class PairwiseRewardObjective(OverPairs):
    """The loss of a reward model (``togi.algo.preference.pairwise_reward_loss``), a mean over the pairs of the step.

    ``use_margin``: reads the value ``margin``. Scores are float32 whatever the model's dtype, so the loss always is what
    ``--compute_fp32_loss`` asks for. Metrics: loss, accuracy (chosen above rejected; a tie is wrong), mean scores and
    their difference.
    """

    kind: RewardLoss = RewardLoss.SIGMOID
    use_margin: bool = False

    def __post_init__(self) -> None:
        assert not (self.use_margin and self.kind is RewardLoss.LOGEXP), "--margin_loss has no effect in --loss logexp"

    @property
    def needs(self) -> Needs:
        return Needs(scores=True)

    def judge(self, outputs: Outputs, batch: Batch) -> Tensor:
        return outputs.scores_N

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        first_P, second_P = pairs(batch)
        chosen_P, rejected_P = outputs.scores_N[first_P], outputs.scores_N[second_P]
        margins_P = batch.values[MARGIN][first_P] if self.use_margin else None
        total = pairwise_reward_loss(chosen_P, rejected_P, margins_P, self.kind).sum()
        sums = pair_metrics({names.LOSS: total}, chosen_P, rejected_P)
        return Loss(total, token_metrics(sums, len(first_P), {}))
