"""Learning rates: Transformers' schedules by their names, as functions of the number of optimizer steps taken.

The unit is optimizer steps, never micro-batches, rollouts or samples. The first step is number 0. So with a warm-up its rate is
0, as in Transformers (except cosine_warmup_with_min_lr, which counts from 1). reduce_lr_on_plateau and greedy are no functions of
the step: they follow a loss on held-out rows, and their state is part of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from togi.config.choices import Scheduler
from togi.config.shared import TrainSettings

# The state of a rule that follows a loss, by the names in its state_dict; all other entries are settings.
_SEEN = ("best", "num_bad_epochs", "num_good_epochs", "reset_start", "last_epoch", "_last_lr")
INVERSE_SQRT_STEPS = 10_000
"""The time scale of inverse_sqrt without a warm-up, as in Transformers."""


@dataclass(frozen=True)
class Schedule:
    """The rate that the flags describe, a function of the step. ``peak``: the highest rate; ``total``: planned optimizer steps.

    Shares of the run are rounded up to whole steps. Steps past ``total`` keep the last rate, except that inverse_sqrt decays
    further.
    """

    settings: TrainSettings
    peak: float
    total: int

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up."""
        return math.ceil(self.settings.lr_warmup_ratio * self.total)

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0."""
        return self.peak * self._share(
            step if self.settings.lr_scheduler is Scheduler.INVERSE_SQRT else min(step, self._last)
        )

    def observe(self, loss: float) -> None:
        """Ignore the loss: the rate depends on the step alone."""

    def state(self) -> dict[str, object]:
        """Empty: the rate depends on the step alone."""
        return {}

    def load_state(self, state: Mapping[str, object]) -> None:
        assert not state, f"{self.settings.lr_scheduler} was given the state of a measured rate"

    @property
    def _last(self) -> int:
        """The last step of the schedule. After it some of Transformers' schedules would rise again."""
        return max(self.total, self.warmup + 1) - (self.settings.lr_scheduler is Scheduler.COSINE_WARMUP_WITH_MIN_LR)

    def _share(self, step: int) -> float:
        """The rate as a share of the peak: the formulas of Transformers' functions, which cannot be imported without PEFT."""
        settings, end = self.settings, max(self.total, self.warmup + 1)
        kind, floor, cycles = settings.lr_scheduler, settings.min_lr_ratio, settings.lr_num_cycles
        taken = step + (kind is Scheduler.COSINE_WARMUP_WITH_MIN_LR)
        if step < self.warmup and kind is not Scheduler.CONSTANT:
            rising = taken / self.warmup
            return rising * (1 - floor) + floor if kind is Scheduler.WARMUP_STABLE_DECAY else rising
        done = (taken - self.warmup) / (end - self.warmup)
        waves = 0.5 if cycles is None else cycles
        match kind:
            case Scheduler.CONSTANT | Scheduler.CONSTANT_WITH_WARMUP:
                share = 1.0
            case Scheduler.LINEAR:
                share = 1 - done
            case Scheduler.POLYNOMIAL:
                share = (1 - floor) * (1 - done) ** settings.lr_power + floor
            case Scheduler.INVERSE_SQRT:
                scale = self.warmup or INVERSE_SQRT_STEPS
                share = math.sqrt(scale / (step - self.warmup + scale))
            case Scheduler.COSINE_WITH_RESTARTS:
                share = _wave((cycles or 1.0) * done % 1) if done < 1 else 0.0
            case Scheduler.WARMUP_STABLE_DECAY:
                decay = math.ceil(settings.lr_decay_ratio * self.total)
                falling = (step - (end - decay)) / max(1, decay)
                share = 1.0 if falling < 0 else _wave(2 * waves * falling) * (1 - floor) + floor
                share = share if step < end else floor
            case Scheduler.COSINE:
                share = _wave(2 * waves * done)
            case _:
                share = _wave(2 * waves * done) * (1 - floor) + floor
        return share


def _wave(done: float) -> float:
    """Half a cosine, from 1 down to 0."""
    return 0.5 * (1 + math.cos(math.pi * done))


class MeasuredRate:
    """A rate that follows a held-out loss by torch's ``ReduceLROnPlateau`` or Transformers' ``GreedyLR`` (arXiv 2512.14527).

    ``start``: the first rate after the warm-up. ``--min_lr_ratio`` and ``--max_lr_ratio`` bound it as shares of ``start``.
    (GreedyLR's own bounds, 0.001 and 1, are far too high for a language model.) After more than ``--lr_patience`` evaluations in
    a row without a better loss the rate is multiplied by ``--lr_factor`` (None: the rule's default). Greedy also divides it by
    that factor after more than ``--lr_patience`` better losses in a row. Even the smallest change is applied.
    """

    def __init__(self, settings: TrainSettings, start: float, total: int) -> None:
        """The rate that the flags describe. ``total``: planned optimizer steps, for the warm-up."""
        kind = settings.lr_scheduler
        assert kind.follows_a_loss
        self.start, self.warmup = start, math.ceil(settings.lr_warmup_ratio * total)
        options: dict[str, float] = {"min_lr": settings.min_lr_ratio, "patience": settings.lr_patience, "eps": 0.0}
        options |= {} if settings.lr_factor is None else {"factor": settings.lr_factor}
        options |= {"max_lr": settings.max_lr_ratio} if kind is Scheduler.GREEDY else {}
        if kind is Scheduler.GREEDY:
            from transformers.optimization import GreedyLR as Rule  # slow: it imports PEFT too
        else:
            from torch.optim.lr_scheduler import ReduceLROnPlateau as Rule
        # over a dummy optimizer with a rate of 1, so that its rates are shares
        self.rule: Any = Rule(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), **options)

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0, after the losses observed before it."""
        rising = step / self.warmup if step < self.warmup else 1.0
        share: float = self.rule.optimizer.param_groups[0]["lr"]
        return self.start * share * rising

    def observe(self, loss: float) -> None:
        """Update the rate from the loss of one evaluation, in nats. NaN counts as no better."""
        self.rule.step(loss)

    def state(self) -> dict[str, object]:
        """The state for a resume, as JSON."""
        return {name: value for name, value in self.rule.state_dict().items() if name in _SEEN}

    def load_state(self, state: Mapping[str, object]) -> None:
        """Load what ``state`` returned."""
        self.rule.load_state_dict(dict(state))
        self.rule.optimizer.param_groups[0]["lr"] = self.rule.get_last_lr()[0]


LearningRate = Schedule | MeasuredRate
"""The rate of each optimizer step. ``observe`` takes the loss of an evaluation; ``state`` goes into checkpoints."""


def planned(settings: TrainSettings, peak: float, total: int) -> LearningRate:
    """The rate that the flags describe, over ``total`` optimizer steps."""
    return (MeasuredRate if settings.lr_scheduler.follows_a_loss else Schedule)(settings, peak, total)


def highest(settings: TrainSettings, peak: float, total: int) -> float:
    """The highest rate of ``total`` optimizer steps: of very few it is below the peak. 0 for no step."""
    return max(map(planned(settings, peak, total).rate, range(total)), default=0.0)


def standing_still(settings: TrainSettings, peak: float, total: int) -> str:
    """A sentence if the schedule makes the rate of every optimizer step 0, such as a warm-up of one step; else ""."""
    # it ends at the first update with a rate above 0, most often the second
    if peak == 0 or total == 0 or any(map(planned(settings, peak, total).rate, range(total))):
        return ""
    return (
        f"The run has {total} updates, and --lr_scheduler {settings.lr_scheduler} with --lr_warmup_ratio "
        f"{settings.lr_warmup_ratio:g} gives them learning rate 0, which changes no weight: plan more updates, or take "
        "--lr_scheduler constant."
    )
