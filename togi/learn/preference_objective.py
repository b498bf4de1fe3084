"""Objectives over pairs and over single rows with a verdict: reward models, the DPO family, KTO.

The formulas are in ``togi.algo.preference``; here are the streams and values they read and the metrics they report.
Values of pairs: ``chosen`` (1 or 0) and ``margin``; of KTO's rows: ``desirable``, ``mismatched``, ``kl_estimate``. Stream of
DPO and KTO: ``ref_logprobs``. Shape letters: K tokens in the loss, N sequences, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from togi.algo.preference import (
    dpo_loss,
    ipo_loss,
    kto_loss,
    pairwise_reward_loss,
    sequence_sums,
)
from togi.batch import Batch
from togi.config.choices import RewardLoss
from togi.errors import ConfigError
from togi.learn.objective import Loss, Objective, token_metrics
from togi.learn.policy_objective import REF_LOGPROBS
from togi.model.outputs import Needs, Outputs
from togi.obs import names

CHOSEN = "chosen"
MARGIN = "margin"
DESIRABLE = "desirable"
MISMATCHED = "mismatched"
KL_ESTIMATE = "kl_estimate"


def pairs(batch: Batch) -> tuple[Tensor, Tensor]:
    """The sequence numbers of the chosen and of the rejected response of each pair (int64, P, on the batch's device).

    A pair is two neighbours, chosen first, in the list that the batch was packed from; however the layout reordered
    them. Asserts that no pair is torn apart.
    """
    assert batch.num_sequences % 2 == 0, "a pair is torn apart: pack with whole_groups"
    listed_N = torch.tensor(batch.order_N, dtype=torch.int64).argsort().to(batch.tokens_T.device)
    chosen_P, rejected_P = listed_N[0::2], listed_N[1::2]
    marks_N = batch.values[CHOSEN]
    assert bool((marks_N[chosen_P] == 1).all() & (marks_N[rejected_P] == 0).all()), "pairs are not chosen, rejected"
    return chosen_P, rejected_P


def _pair_metrics(sums: Mapping[str, Tensor], chosen_P: Tensor, rejected_P: Tensor) -> dict[str, Tensor]:
    """Sums over pairs of the rewards, their difference, and how often the chosen response has the higher one."""
    return {
        **sums,
        names.ACCURACY: (chosen_P > rejected_P).sum(),
        names.REWARD_CHOSEN: chosen_P.sum(),
        names.REWARD_REJECTED: rejected_P.sum(),
        names.REWARD_MARGIN: (chosen_P - rejected_P).sum(),
    }


def _implicit_rewards(beta: float, outputs: Outputs, batch: Batch) -> Tensor:
    """``beta (S_policy - S_ref)`` of each sequence."""
    gains_K = outputs.logprobs_K - batch.select(REF_LOGPROBS)
    return beta * sequence_sums(gains_K, batch.target_sequences_K, batch.num_sequences)


class _OverPairs(Objective):
    """Sums divided by the number of pairs of the step."""

    def count(self, batch: Batch) -> float:
        return batch.num_sequences / 2


@dataclass(frozen=True, slots=True)
class PairwiseRewardObjective(_OverPairs):
    """A reward model, ``togi.algo.preference.pairwise_reward_loss``, a mean over the pairs of the step.

    ``use_margin`` reads the value ``margin``. Scores are float32 whatever the model's dtype, so the loss always is
    what ``--compute_fp32_loss`` asks for. Metrics: loss, accuracy (chosen above rejected; a tie is wrong), mean scores
    and their difference.
    """

    kind: RewardLoss = RewardLoss.SIGMOID
    use_margin: bool = False

    def __post_init__(self) -> None:
        if self.use_margin and self.kind is RewardLoss.LOGEXP:
            raise ConfigError("--margin_loss has no effect in --loss logexp: use --loss sigmoid or drop the margin")

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
        sums = _pair_metrics({names.LOSS: total}, chosen_P, rejected_P)
        return Loss(total, token_metrics(sums, len(first_P), {}))


@dataclass(frozen=True, slots=True)
class DPOObjective(_OverPairs):
    """DPO, cDPO (``label_smoothing`` > 0) or IPO, plus ``nll_loss_coef`` x -S(chosen) / tokens; a mean over pairs.

    Metrics: loss (with the NLL term), accuracy (the chosen response has the higher implicit reward), the implicit
    rewards ``beta (S_policy - S_ref)`` and their difference, and the NLL of the chosen responses.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    ipo: bool = False
    nll_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"--beta is {self.beta}: it must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"--label_smoothing is {self.label_smoothing}: it is the share of wrong labels, 0 or more and below 0.5"
            )
        if self.ipo and self.label_smoothing > 0:
            raise ConfigError("--ipo has no label smoothing: drop --ipo or --label_smoothing")

    @property
    def needs(self) -> Needs:
        return Needs(logprobs=True)

    def judge(self, outputs: Outputs, batch: Batch) -> Tensor:
        return _implicit_rewards(self.beta, outputs, batch)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        first_P, second_P = pairs(batch)
        sequences_K, number = batch.target_sequences_K, batch.num_sequences
        # token by token first: the difference of two long sums would lose digits
        ratios_N = sequence_sums(outputs.logprobs_K - batch.select(REF_LOGPROBS), sequences_K, number)
        gaps_P = ratios_N[first_P] - ratios_N[second_P]
        loss_P = ipo_loss(gaps_P, self.beta) if self.ipo else dpo_loss(gaps_P, self.beta, self.label_smoothing)
        nll_P = (
            -sequence_sums(outputs.logprobs_K, sequences_K, number)[first_P] / batch.tokens_per_sequence_N()[first_P]
        )
        total = (loss_P + self.nll_loss_coef * nll_P).sum() if self.nll_loss_coef > 0 else loss_P.sum()
        rewards_N = self.beta * ratios_N.detach()
        own = {names.LOSS: total, names.CHOSEN_NLL: nll_P.sum()}
        sums = _pair_metrics(own, rewards_N[first_P], rewards_N[second_P])
        return Loss(total, token_metrics(sums, len(first_P), {}))


@dataclass(frozen=True, slots=True)
class KTOObjective(Objective):
    """KTO, ``togi.algo.preference.kto_loss``, a mean over the rows of the step.

    It needs one number before any loss: the KL estimate of the whole step. So a step is three things: score mismatched
    copies of its rows with policy and reference, join the sums of all ranks in ``togi.algo.preference.kto_kl_estimate``,
    and write the number into the value ``kl_estimate`` of every row. Mismatched copies themselves are never trained on.

    Metrics: loss, the estimate, the implicit rewards ``beta (S_policy - S_ref)`` of desirable and undesirable rows
    (under the names of chosen and rejected) and their difference, and accuracy: desirable rows above the estimate,
    undesirable ones below.
    """

    beta: float = 0.01
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"--beta is {self.beta}: it must be above 0")
        if min(self.desirable_weight, self.undesirable_weight) < 0:
            raise ConfigError("--desirable_loss_weight and --undesirable_loss_weight cannot be negative")

    @property
    def needs(self) -> Needs:
        return Needs(logprobs=True)

    def judge(self, outputs: Outputs, batch: Batch) -> Tensor:
        return _implicit_rewards(self.beta, outputs, batch)

    def count(self, batch: Batch) -> float:
        return float(batch.num_sequences)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        assert not bool(batch.values[MISMATCHED].any()), "mismatched rows are for the KL estimate only"
        sequences_K, number = batch.target_sequences_K, batch.num_sequences
        ref_K = batch.select(REF_LOGPROBS)
        ratios_N = sequence_sums(outputs.logprobs_K - ref_K, sequences_K, number)
        desirable_N, kl_N = batch.values[DESIRABLE] == 1, batch.values[KL_ESTIMATE]
        total = kto_loss(
            ratios_N,
            desirable_N,
            kl_N,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        ).sum()
        ratios_N = ratios_N.detach()
        right_N = torch.where(desirable_N, ratios_N > kl_N, ratios_N < kl_N)
        sums = {names.LOSS: total, names.ACCURACY: right_N.sum(), names.KL_ESTIMATE: kl_N.sum()}
        metrics = token_metrics(sums, number, {})
        for name, rows_N in ((names.REWARD_CHOSEN, desirable_N), (names.REWARD_REJECTED, ~desirable_N)):
            rewards = self.beta * ratios_N[rows_N]
            metrics |= token_metrics({name: rewards.sum()}, len(rewards), {})
        return Loss(total, metrics)

    def summary(self, values: Mapping[str, float]) -> dict[str, float]:
        """Adds the difference of the mean rewards; NaN in a step that has only one kind of row."""
        return {**values, names.REWARD_MARGIN: values[names.REWARD_CHOSEN] - values[names.REWARD_REJECTED]}
