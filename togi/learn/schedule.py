"""Learning-rate schedules: pure functions of the number of optimizer steps taken, equal to Transformers' of the same
name.

The unit is optimizer steps, never micro-batches, rollouts or samples. The first step is number 0, so with a warm-up
it is taken at a rate of 0, as in Transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from togi.config.choices import Scheduler


@dataclass(frozen=True, slots=True)
class Schedule:
    """``peak``: the highest rate. ``total``: planned optimizer steps. ``warmup``: steps of linear warm-up.

    ``floor`` is the lowest rate of cosine_with_min_lr as a share of the peak. Steps past ``total`` keep the last rate.
    """

    kind: Scheduler
    peak: float
    total: int
    warmup: int = 0
    floor: float = 0.1

    @classmethod
    def with_warmup_ratio(cls, kind: Scheduler, peak: float, total: int, ratio: float, floor: float = 0.1) -> Schedule:
        """A warm-up of ``ceil(ratio * total)`` steps."""
        return cls(kind, peak, total, math.ceil(ratio * total), floor)

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0."""
        if self.kind is Scheduler.CONSTANT:
            return self.peak
        if step < self.warmup:
            return self.peak * step / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        match self.kind:
            case Scheduler.CONSTANT_WITH_WARMUP:
                return self.peak
            case Scheduler.LINEAR:
                return self.peak * (1 - done)
            case Scheduler.COSINE:
                return self.peak * cosine
            case Scheduler.COSINE_WITH_MIN_LR:
                return self.peak * (self.floor + (1 - self.floor) * cosine)
