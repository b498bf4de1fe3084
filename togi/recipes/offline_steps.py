"""From the rows of one optimizer step to this rank's micro-batches, with what the loss needs of other models in them.

A ``Preparation`` gets the samples of the whole step, the same on every rank, and returns this rank's share. All ranks
call it together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from togi.algo.preference import kto_kl_estimate
from togi.data.packing import Packs, pack_all
from togi.data.partition import split_ranks
from togi.data.unpaired import mismatched
from togi.learn.policy_objective import REF_LOGPROBS
from togi.learn.preference_objective import KL_ESTIMATE
from togi.learn.scorer import Scorer
from togi.parallel.process import World
from togi.sample import Sample, with_streams


@dataclass(frozen=True, slots=True)
class Dealer:
    """How samples go to ranks and into micro-batches. Samples of one group are never parted.

    ``max_tokens``: budget of a micro-batch. ``max_sequences``: at most so many sequences in one, None for no limit.
    """

    world: World
    max_tokens: int
    max_sequences: int | None
    share_prefix: bool

    def places(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Which samples of a step each rank or ring gets (``World.share``), by tokens; the same on every rank."""
        return split_ranks(samples, self.world.shares, share_prefix=self.share_prefix, whole_groups=True)

    def share(self, samples: Sequence[Sample]) -> list[Sample]:
        """This rank's part of the samples of a step; the ranks of a ring have the same."""
        return [samples[i] for i in self.places(samples)[self.world.share]]

    def packs(self, samples: Sequence[Sample]) -> Packs:
        """This rank's samples, packed."""
        return pack_all(
            samples,
            max_tokens=self.max_tokens,
            max_sequences=self.max_sequences,
            share_prefix=self.share_prefix,
            whole_groups=True,
        )

    def logprobs(self, scorer: Scorer, samples: Sequence[Sample]) -> list[NDArray[np.float32]]:
        """Log-probs at each sample's tokens in the loss, in the order of ``samples``."""
        packs = self.packs(samples)
        return packs.in_order(scorer.logprobs(packs.batches))


class Preparation(Protocol):
    def __call__(self, samples: Sequence[Sample], seed: int) -> list[Sample]: ...


@dataclass(frozen=True, slots=True)
class Share:
    """Nothing but this rank's part."""

    dealer: Dealer

    def __call__(self, samples: Sequence[Sample], seed: int) -> list[Sample]:
        return self.dealer.share(samples)


@dataclass(frozen=True, slots=True)
class WithReference:
    """Adds the frozen reference's log-probs, the stream ``ref_logprobs``."""

    dealer: Dealer
    reference: Scorer

    def __call__(self, samples: Sequence[Sample], seed: int) -> list[Sample]:
        mine = self.dealer.share(samples)
        return with_streams(mine, {REF_LOGPROBS: self.dealer.logprobs(self.reference, mine)})


@dataclass(frozen=True, slots=True)
class WithKL:
    """KTO's: adds ``ref_logprobs`` and the KL estimate of the whole step, from mismatched pairs of all its rows."""

    dealer: Dealer
    reference: Scorer
    policy: Scorer

    def __call__(self, samples: Sequence[Sample], seed: int) -> list[Sample]:
        kl = self._estimate(mismatched(samples, seed))
        mine = WithReference(self.dealer, self.reference)(samples, seed)
        return [replace(sample, values={**sample.values, KL_ESTIMATE: kl}) for sample in mine]

    def _estimate(self, mismatches: Sequence[Sample]) -> float:
        """The log-probabilities of each mismatched answer, this rank's and then everybody's."""
        mine = self.dealer.share(mismatches)
        own = [self.dealer.logprobs(scorer, mine) for scorer in (self.policy, self.reference)]
        sums = [[float(row.sum(dtype=np.float64)) for row in rows] for rows in own]
        parts = self.dealer.world.gather_shares("KL estimate", sums)
        policy, reference = ([total for part in parts for total in part[which]] for which in (0, 1))
        return kto_kl_estimate(policy, reference)
