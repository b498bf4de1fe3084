"""The losses over pairs: reward models, DPO with cDPO and IPO, SimPO, ORPO. Each is a mean over the pairs of the step.

Values of pairs: ``chosen`` (1 or 0), ``margin``. Stream: ``ref_logprobs``. The formulas are in ``togi.algo.preference``. Shape
letters: K tokens in the loss, N sequences, P pairs.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from togi.algo import preference
from togi.batch import Batch
from togi.config.choices import RewardLoss
from togi.learn.objective import REF_LOGPROBS, Loss, Objective, sequence_means, token_metrics
from togi.model.policy import Needs, Outputs
from togi.obs import names

CHOSEN = "chosen"
MARGIN = "margin"

PerPair = tuple[Tensor, dict[str, Tensor]]
"""The loss of each pair (P), and more metrics of each pair (P) by name."""


def pairs(batch: Batch) -> tuple[Tensor, Tensor]:
    """The sequence numbers of the chosen and of the rejected response of each pair (int64, P, on the batch's device).

    A pair is two neighbours, chosen first.
    """
    numbers_N = torch.arange(batch.num_sequences, device=batch.tokens_T.device)
    return numbers_N[0::2], numbers_N[1::2]


def log_ratios(outputs: Outputs, batch: Batch) -> Tensor:
    """``S_policy - S_ref`` of each sequence, shape (N)."""
    # Subtract token by token first: the difference of two long sums would lose digits.
    gains_K = outputs.logprobs_K - batch.streams[REF_LOGPROBS]
    return preference.sequence_sums(gains_K, batch.target_sequences_K, batch.num_sequences)


class OverPairs(Objective):
    """Losses that are divided by the number of pairs of the step, by a reward of each response (``judge``).

    Metrics: loss, accuracy (the chosen response has the higher reward; a tie is wrong), the mean rewards and their difference, and
    those of ``per_pair``.
    """

    @property
    def needs(self) -> Needs:
        return Needs(logprobs=True)

    def count(self, batch: Batch) -> float:
        """The number of pairs. Asserts that none is split: here, since a loss would wait for the device to know."""
        assert batch.num_sequences % 2 == 0, "a pair is torn apart: pack with whole_groups"
        marks_PC = torch.stack([batch.values[CHOSEN][numbers_P] for numbers_P in pairs(batch)], dim=1)
        assert bool((marks_PC == marks_PC.new_tensor([1, 0])).all()), "pairs are not chosen, rejected"
        return batch.num_sequences / 2

    @abstractmethod
    def per_pair(self, outputs: Outputs, batch: Batch, first_P: Tensor, second_P: Tensor) -> PerPair:
        """The losses. ``first_P``, ``second_P``: the numbers of a pair's chosen and of its rejected sequence."""

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        first_P, second_P = pairs(batch)
        losses_P, more = self.per_pair(outputs, batch, first_P, second_P)
        total = losses_P.sum()
        # Metrics have no gradient: rewards are detached.
        rewards_N = self.judge(outputs, batch).detach()
        chosen_P, rejected_P = rewards_N[first_P], rewards_N[second_P]
        sums = {
            names.LOSS: total,
            **{name: each_P.sum() for name, each_P in more.items()},
            names.ACCURACY: (chosen_P > rejected_P).sum(),
            names.REWARD_CHOSEN: chosen_P.sum(),
            names.REWARD_REJECTED: rejected_P.sum(),
            names.REWARD_MARGIN: (chosen_P - rejected_P).sum(),
        }
        return Loss(total, token_metrics(sums, len(first_P), {}))


@dataclass(frozen=True, slots=True)
class PairwiseRewardObjective(OverPairs):
    """The loss of a reward model (``togi.algo.preference.pairwise_reward_loss``).

    ``use_margin``: reads the value ``margin``. Scores are float32 whatever the model's dtype, so the loss always is what
    ``--compute_fp32_loss`` asks for. Rewards are the scores.
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

    def per_pair(self, outputs: Outputs, batch: Batch, first_P: Tensor, second_P: Tensor) -> PerPair:
        margins_P = batch.values[MARGIN][first_P] if self.use_margin else None
        chosen_P, rejected_P = outputs.scores_N[first_P], outputs.scores_N[second_P]
        return preference.pairwise_reward_loss(chosen_P, rejected_P, margins_P, self.kind), {}


@dataclass(frozen=True, slots=True)
class DPOObjective(OverPairs):
    """DPO, cDPO (``label_smoothing`` > 0) or IPO, plus ``nll_loss_coef`` x -S(chosen) / tokens.

    The loss metric has the NLL term. Rewards are the implicit ones, ``beta (S_policy - S_ref)``. The NLL of the chosen responses
    is a metric too.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    ipo: bool = False
    nll_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        assert self.beta > 0, "--beta must be above 0"
        assert 0 <= self.label_smoothing < 0.5, "--label_smoothing is the share of wrong labels, below 0.5"
        assert not (self.ipo and self.label_smoothing > 0), "--ipo has no label smoothing"

    def judge(self, outputs: Outputs, batch: Batch) -> Tensor:
        return self.beta * log_ratios(outputs, batch)

    def per_pair(self, outputs: Outputs, batch: Batch, first_P: Tensor, second_P: Tensor) -> PerPair:
        ratios_N = log_ratios(outputs, batch)
        gaps_P = ratios_N[first_P] - ratios_N[second_P]
        loss_P = preference.dpo_loss(gaps_P, self.beta, self.label_smoothing)
        if self.ipo:
            loss_P = preference.ipo_loss(gaps_P, self.beta)
        nll_P = -sequence_means(outputs.logprobs_K, batch)[first_P]
        return loss_P + self.nll_loss_coef * nll_P if self.nll_loss_coef > 0 else loss_P, {names.CHOSEN_NLL: nll_P}


class OverMeans(OverPairs):
    """Losses of pairs by the mean logprob of each response, without a reference.

    Rewards are ``scale`` x mean logprob. The NLL of the chosen responses, in nats per token, is a metric too.
    """

    @property
    @abstractmethod
    def scale(self) -> float:
        """Reward per nat of mean logprob."""

    @abstractmethod
    def of_means(self, chosen_P: Tensor, rejected_P: Tensor) -> PerPair:
        """The losses from the mean logprobs of the responses (P)."""

    def judge(self, outputs: Outputs, batch: Batch) -> Tensor:
        return self.scale * sequence_means(outputs.logprobs_K, batch)

    def per_pair(self, outputs: Outputs, batch: Batch, first_P: Tensor, second_P: Tensor) -> PerPair:
        means_N = sequence_means(outputs.logprobs_K, batch)
        losses_P, more = self.of_means(means_N[first_P], means_N[second_P])
        return losses_P, {names.CHOSEN_NLL: -means_N[first_P], **more}


@dataclass(frozen=True, slots=True)
class SimPOObjective(OverMeans):
    """SimPO (``togi.algo.preference.simpo_loss``). Accuracy does not depend on the target margin ``gamma``."""

    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        assert self.beta > 0 and self.gamma >= 0, "--beta must be above 0 and --gamma not negative"

    @property
    def scale(self) -> float:
        return self.beta

    def of_means(self, chosen_P: Tensor, rejected_P: Tensor) -> PerPair:
        return preference.simpo_loss(chosen_P, rejected_P, self.beta, self.gamma), {}


@dataclass(frozen=True, slots=True)
class ORPOObjective(OverMeans):
    """``NLL(chosen) - coef log sigmoid(log odds(chosen) - log odds(rejected))``.

    Hong et al. 2024, arXiv 2403.07691, equations 6 and 7. The NLL is a mean over the response's tokens, and so is the
    logprob whose odds are compared. The log odds ratio is a metric too.
    """

    coef: float = 0.1

    def __post_init__(self) -> None:
        assert self.coef > 0, "--odds_ratio_coef must be above 0"

    @property
    def scale(self) -> float:
        return self.coef

    def of_means(self, chosen_P: Tensor, rejected_P: Tensor) -> PerPair:
        ratios_P = preference.log_odds(chosen_P) - preference.log_odds(rejected_P)
        return -chosen_P - self.coef * logsigmoid(ratios_P), {"log_odds_ratio": ratios_P}
