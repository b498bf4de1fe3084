"""Shared code of objectives over pairs and over labelled rows: pairing, rewards, metrics, and pairs without a reference.

Values of pairs: ``chosen`` (1 or 0). The formulas are in ``togi.algo.preference``. Shape letters: K tokens in the loss, N
sequences, P pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from togi.algo.preference import sequence_sums
from togi.batch import Batch
from togi.learn.objective import REF_LOGPROBS, Loss, Objective, sequence_means, token_metrics
from togi.model.policy import Needs, Outputs
from togi.obs import names

CHOSEN = "chosen"


def pairs(batch: Batch) -> tuple[Tensor, Tensor]:
    """The sequence numbers of the chosen and of the rejected response of each pair (int64, P, on the batch's device).

    A pair is two neighbours, chosen first, in the list that the batch was packed from, however the layout reordered
    them. Asserts that no pair is split.
    """
    assert batch.num_sequences % 2 == 0, "a pair is torn apart: pack with whole_groups"
    # `order_N` has the list's place of each sequence; argsort inverts it.
    listed_N = torch.tensor(batch.order_N, dtype=torch.int64).argsort().to(batch.tokens_T.device)
    chosen_P, rejected_P = listed_N[0::2], listed_N[1::2]
    marks_N = batch.values[CHOSEN]
    assert bool((marks_N[chosen_P] == 1).all() & (marks_N[rejected_P] == 0).all()), "pairs are not chosen, rejected"
    return chosen_P, rejected_P


def pair_metrics(sums: Mapping[str, Tensor], chosen_P: Tensor, rejected_P: Tensor) -> dict[str, Tensor]:
    """Sums over pairs: the rewards, their difference, and how often the chosen response has the higher reward."""
    return {
        **sums,
        names.ACCURACY: (chosen_P > rejected_P).sum(),
        names.REWARD_CHOSEN: chosen_P.sum(),
        names.REWARD_REJECTED: rejected_P.sum(),
        names.REWARD_MARGIN: (chosen_P - rejected_P).sum(),
    }


def implicit_rewards(beta: float, outputs: Outputs, batch: Batch) -> Tensor:
    """``beta (S_policy - S_ref)`` of each sequence, shape (N)."""
    gains_K = outputs.logprobs_K - batch.select(REF_LOGPROBS)
    return beta * sequence_sums(gains_K, batch.target_sequences_K, batch.num_sequences)


class OverPairs(Objective):
    """Losses that are divided by the number of pairs of the step."""

    def count(self, batch: Batch) -> float:
        return batch.num_sequences / 2


class OverMeans(OverPairs):
    """Losses of pairs by the mean logprob of each response, without a reference: a mean over the pairs of the step.

    Metrics: loss, accuracy (the chosen response has the higher reward), the rewards ``scale`` x mean logprob and their
    difference, the NLL of the chosen responses in nats per token, and those of ``per_pair``.
    """

    @property
    @abstractmethod
    def scale(self) -> float:
        """Reward per nat of mean logprob."""

    @abstractmethod
    def per_pair(self, chosen_P: Tensor, rejected_P: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair (P) from the mean logprobs of its responses (P), and more metrics of each pair (P) by name."""

    @property
    def needs(self) -> Needs:
        return Needs(logprobs=True)

    def judge(self, outputs: Outputs, batch: Batch) -> Tensor:
        return self.scale * sequence_means(outputs.logprobs_K, batch)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        first_P, second_P = pairs(batch)
        means_N = sequence_means(outputs.logprobs_K, batch)
        chosen_P, rejected_P = means_N[first_P], means_N[second_P]
        losses_P, more = self.per_pair(chosen_P, rejected_P)
        total = losses_P.sum()
        own = {names.LOSS: total, names.CHOSEN_NLL: -chosen_P.sum()} | {name: each.sum() for name, each in more.items()}
        sums = pair_metrics(own, self.scale * chosen_P, self.scale * rejected_P)
        return Loss(total, token_metrics(sums, len(first_P), {}))
