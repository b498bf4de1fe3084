"""The losses of DPO, cDPO and IPO. Stream: ``ref_logprobs``. Shape letters: K tokens in the loss, N sequences, P pairs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from togi.algo.preference import dpo_loss, ipo_loss, sequence_sums
from togi.batch import Batch
from togi.learn.objective import REF_LOGPROBS, Loss, token_metrics
from togi.methods.preference import OverPairs, implicit_rewards, pair_metrics, pairs
from togi.model.policy import Needs, Outputs
from togi.obs import names


@dataclass(frozen=True, slots=True)
class DPOObjective(OverPairs):
    """DPO, cDPO (``label_smoothing`` > 0) or IPO, plus ``nll_loss_coef`` x -S(chosen) / tokens; a mean over pairs.

    Metrics: loss (with the NLL term), accuracy (the chosen response has the higher implicit reward), the implicit
    rewards ``beta (S_policy - S_ref)`` and their difference, and the NLL of the chosen responses.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    ipo: bool = False
    nll_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        assert self.beta > 0, "--beta must be above 0"
        assert 0 <= self.label_smoothing < 0.5, "--label_smoothing is the share of wrong labels, below 0.5"
        assert not (self.ipo and self.label_smoothing > 0), "--ipo has no label smoothing"

    @property
    def needs(self) -> Needs:
        return Needs(logprobs=True)

    def judge(self, outputs: Outputs, batch: Batch) -> Tensor:
        return implicit_rewards(self.beta, outputs, batch)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        first_P, second_P = pairs(batch)
        sequences_K, number = batch.target_sequences_K, batch.num_sequences
        # Subtract token by token first: the difference of two long sums would lose digits.
        ratios_N = sequence_sums(outputs.logprobs_K - batch.select(REF_LOGPROBS), sequences_K, number)
        gaps_P = ratios_N[first_P] - ratios_N[second_P]
        loss_P = ipo_loss(gaps_P, self.beta) if self.ipo else dpo_loss(gaps_P, self.beta, self.label_smoothing)
        nll_P = (
            -sequence_sums(outputs.logprobs_K, sequences_K, number)[first_P] / batch.tokens_per_sequence_N()[first_P]
        )
        total = (loss_P + self.nll_loss_coef * nll_P).sum() if self.nll_loss_coef > 0 else loss_P.sum()
        # Metrics have no gradient: rewards are detached.
        rewards_N = self.beta * ratios_N.detach()
        own = {names.LOSS: total, names.CHOSEN_NLL: nll_P.sum()}
        sums = pair_metrics(own, rewards_N[first_P], rewards_N[second_P])
        return Loss(total, token_metrics(sums, len(first_P), {}))
