"""Learning-rate schedules: pure functions of the number of optimizer steps taken, equal to Transformers' of the same
name.

The unit is optimizer steps, never micro-batches, rollouts or samples. The first step is number 0, so with a warm-up
it is taken at a rate of 0, as in Transformers (but for cosine_warmup_with_min_lr, which counts it from 1). Not here:
schedules that follow a measured loss (``measured_rate``): they are no function of the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from togi.config.choices import Scheduler
from togi.config.shared import TrainSettings

# What Transformers takes where it is not told: half a wave falls from the peak to the floor, one cycle does not restart.
HALF_WAVE = 0.5
ONE_CYCLE = 1.0
# The time scale of inverse_sqrt without a warm-up, in steps.
TIMESCALE = 10_000


class LearningRate(Protocol):
    """The rate of each optimizer step. ``observe`` takes the loss of an evaluation; ``state`` goes into checkpoints."""

    def rate(self, step: int) -> float: ...

    def observe(self, loss: float) -> None: ...

    def state(self) -> dict[str, float]: ...

    def load_state(self, state: Mapping[str, float]) -> None: ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """``peak``: the highest rate. ``total``: planned optimizer steps. ``warmup``: steps of linear warm-up.

    ``floor``: the lowest rate as a share of the peak, of the kinds that have one. ``cycles``: waves of the cosine, or its
    number of restarts; None for the kind's own. ``power``: exponent of polynomial. ``decay``: last steps of
    warmup_stable_decay, in which the rate falls. Steps past ``total`` keep the last rate (inverse_sqrt goes on).
    """

    kind: Scheduler
    peak: float
    total: int
    warmup: int = 0
    floor: float = 0.1
    cycles: float | None = None
    power: float = 1.0
    decay: int = 0

    @classmethod
    def of(cls, settings: TrainSettings, peak: float, total: int) -> Schedule:
        """The schedule that the flags ask for: shares of the run are rounded up to whole steps."""
        return cls(
            settings.lr_scheduler,
            peak,
            total,
            warmup=math.ceil(settings.lr_warmup_ratio * total),
            floor=settings.min_lr_ratio,
            cycles=settings.lr_num_cycles,
            power=settings.lr_power,
            decay=math.ceil(settings.lr_decay_ratio * total),
        )

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0."""
        return self.peak * self._factor(step)

    def observe(self, loss: float) -> None:
        """Nothing: the step alone decides."""

    def state(self) -> dict[str, float]:
        """Empty: the step alone decides."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> None:
        assert not state, f"{self.kind} was given the state of a measured rate"

    def _factor(self, step: int) -> float:
        """The rate as a share of the peak."""
        if self.kind is Scheduler.CONSTANT:
            return 1.0
        share = self._rising(step) if step < self.warmup else self._falling(step)
        # the warm-up of all but one starts from 0, not from the floor
        lifted = self.kind.has_floor and (step >= self.warmup or self.kind is Scheduler.WARMUP_STABLE_DECAY)
        return share * (1 - self.floor) + self.floor if lifted else share

    def _rising(self, step: int) -> float:
        return (step + (self.kind is Scheduler.COSINE_WARMUP_WITH_MIN_LR)) / self.warmup

    def _falling(self, step: int) -> float:
        """What is left of the way from the peak to the floor (or to 0)."""
        after, span = step - self.warmup, max(1, self.total - self.warmup)
        done = min(1.0, after / span)
        match self.kind:
            case Scheduler.LINEAR:
                share = 1 - done
            case Scheduler.COSINE | Scheduler.COSINE_WITH_MIN_LR:
                share = self._wave(done)
            case Scheduler.COSINE_WARMUP_WITH_MIN_LR:
                share = self._wave(min(1.0, (after + 1) / span))
            case Scheduler.COSINE_WITH_RESTARTS:
                cycles = ONE_CYCLE if self.cycles is None else self.cycles
                share = 0.0 if done == 1 else 0.5 * (1 + math.cos(math.pi * (cycles * done % 1)))
            case Scheduler.POLYNOMIAL:
                share = (1 - done) ** self.power
            case Scheduler.INVERSE_SQRT:
                scale = self.warmup or TIMESCALE
                share = 1 / math.sqrt((after + scale) / scale)
            case Scheduler.WARMUP_STABLE_DECAY:
                falling = step - (self.total - self.decay)
                share = 1.0 if falling < 0 else self._wave(falling / self.decay) if falling < self.decay else 0.0
            case _:
                assert self.kind is Scheduler.CONSTANT_WITH_WARMUP, f"{self.kind} is no function of the step"
                share = 1.0
        return share

    def _wave(self, done: float) -> float:
        """From 1 to 0 and, with more than half a wave, up again."""
        cycles = HALF_WAVE if self.cycles is None else self.cycles
        return 0.5 * (1 + math.cos(math.pi * cycles * 2 * done))
