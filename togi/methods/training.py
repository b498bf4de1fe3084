"""What a method is given to train with: rows and frozen models, and how the rows of a step come to this rank.

A ``Preparation`` gets the samples of the whole optimizer step, the same on every rank, and returns this rank's share, with
what the loss needs of other models in them. All ranks call it together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from togi.data.packing import Packs, pack_all
from togi.data.partition import split_ranks
from togi.data.records import Examples
from togi.learn.policy_objective import REF_LOGPROBS
from togi.learn.scorer import Scorer
from togi.model.policy import PolicyModel
from togi.parallel.process import World
from togi.sample import Sample, with_streams


@dataclass(frozen=True, slots=True, eq=False)
class Frozen:
    """A language model that is only read, and the context to run it in."""

    model: PolicyModel
    around: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """What an objective may ask for. ``teachers``: the method's ``teacher``, loaded, or none. ``vocabulary``: tokens that the
    model in training predicts, 0 with a scalar head.
    """

    rows: Examples
    teachers: tuple[Frozen, ...]
    vocabulary: int


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
