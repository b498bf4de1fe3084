"""What a method trains with: rows and frozen models, and how the rows of a step are assigned to this rank.

A ``Preparation`` gets the samples of the whole optimizer step, the same on every rank, and returns this rank's share
with the values that the loss needs from other models. All ranks call it together.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from togi.batch import Batch
from togi.data.packing import in_order, pack_all, split_ranks
from togi.data.records import Examples
from togi.learn.objective import REF_LOGPROBS
from togi.learn.scorer import Scorer
from togi.model.policy import PolicyModel
from togi.parallel.process import World
from togi.sample import Sample, with_streams


@dataclass(frozen=True, slots=True, eq=False)
class Frozen:
    """A frozen language model, and the context to run it in."""

    model: PolicyModel
    around: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """The inputs of an objective. ``teachers``: the method's ``teacher``, loaded, or none. ``vocabulary``: tokens that the
    model in training predicts, 0 with a scalar head.
    """

    rows: Examples
    teachers: tuple[Frozen, ...]
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Dealer:
    """Assigns samples to ranks and micro-batches. Samples of one group are never split.

    ``max_tokens``: budget of a micro-batch. ``max_sequences``: sequences per micro-batch at most, None for no limit.
    """

    world: World
    max_tokens: int
    max_sequences: int | None
    share_prefix: bool

    def places(self, samples: Sequence[Sample]) -> list[list[int]]:
        """The samples of a step for each rank or ring (``World.share``), balanced by tokens; the same on every rank."""
        return split_ranks(samples, self.world.shares, share_prefix=self.share_prefix, whole_groups=True)

    def share(self, samples: Sequence[Sample]) -> list[Sample]:
        """This rank's share of the samples of a step; the ranks of a ring have the same share."""
        return [samples[i] for i in self.places(samples)[self.world.share]]

    def packs(self, samples: Sequence[Sample]) -> list[Batch]:
        """This rank's samples, packed."""
        return pack_all(
            samples,
            max_tokens=self.max_tokens,
            max_sequences=self.max_sequences,
            share_prefix=self.share_prefix,
            whole_groups=True,
        )

    def logprobs(self, scorer: Scorer, samples: Sequence[Sample]) -> list[NDArray[np.float32]]:
        """Logprobs at each sample's tokens in the loss, in the order of ``samples``."""
        packs = self.packs(samples)
        return in_order(packs, scorer.logprobs(packs))


class Preparation(Protocol):
    def __call__(self, samples: Sequence[Sample], seed: int) -> list[Sample]: ...


@dataclass(frozen=True, slots=True)
class Share:
    """Only this rank's share."""

    dealer: Dealer

    def __call__(self, samples: Sequence[Sample], seed: int) -> list[Sample]:
        return self.dealer.share(samples)


@dataclass(frozen=True, slots=True)
class WithReference:
    """Adds the frozen reference's logprobs as the stream ``ref_logprobs``."""

    dealer: Dealer
    reference: Scorer

    def __call__(self, samples: Sequence[Sample], seed: int) -> list[Sample]:
        mine = self.dealer.share(samples)
        return with_streams(mine, {REF_LOGPROBS: self.dealer.logprobs(self.reference, mine)})
