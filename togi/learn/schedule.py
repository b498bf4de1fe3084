"""Learning rates: Transformers' schedules by their names, as functions of the number of optimizer steps taken.

The unit is optimizer steps, never micro-batches, rollouts or samples. The first step is number 0. So with a warm-up its rate is
0, as in Transformers (except cosine_warmup_with_min_lr, which counts from 1). reduce_lr_on_plateau and greedy are no functions of
the step: they follow a loss on held-out rows, and their state is part of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

import torch

from togi.config.choices import Scheduler
from togi.config.shared import TrainSettings

# The state of a rule that follows a loss, by the names in its state_dict; all other entries are settings.
_SEEN = ("best", "num_bad_epochs", "num_good_epochs", "reset_start", "last_epoch", "_last_lr")


class LearningRate(Protocol):
    """The rate of each optimizer step. ``observe`` takes the loss of an evaluation; ``state`` goes into checkpoints."""

    def rate(self, step: int) -> float: ...

    def observe(self, loss: float) -> None: ...

    def state(self) -> dict[str, object]: ...

    def load_state(self, state: Mapping[str, object]) -> None: ...


@dataclass(frozen=True)
class Schedule:
    """``peak``: the highest rate. ``total``: planned optimizer steps. ``warmup``: steps of linear warm-up.

    ``floor``: the lowest rate as a share of the peak, for the kinds that have one. ``cycles``: waves of the cosine, or its
    number of restarts; None for the kind's default. ``power``: exponent of polynomial. ``decay``: the last steps of
    warmup_stable_decay, in which the rate falls. Steps past ``total`` keep the last rate, except that inverse_sqrt decays further.
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
    def of(cls, settings: TrainSettings, peak: float, total: int) -> Self:
        """The schedule that the flags describe. Shares of the run are rounded up to whole steps."""
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
        return self.peak * self._share(step if self.kind is Scheduler.INVERSE_SQRT else min(step, self._last))

    def observe(self, loss: float) -> None:
        """Ignore the loss: the rate depends on the step alone."""

    def state(self) -> dict[str, object]:
        """Empty: the rate depends on the step alone."""
        return {}

    def load_state(self, state: Mapping[str, object]) -> None:
        assert not state, f"{self.kind} was given the state of a measured rate"

    @property
    def _last(self) -> int:
        """The last step of the schedule. After it some of Transformers' schedules would rise again."""
        return max(self.total, self.warmup + 1) - (self.kind is Scheduler.COSINE_WARMUP_WITH_MIN_LR)

    @cached_property
    def _share(self) -> Callable[[int], float]:
        """Transformers' own function from the step to the rate, as a share of the peak."""
        kind, options = self.kind, {} if self.cycles is None else {"num_cycles": self.cycles}
        match kind:
            case Scheduler.COSINE_WITH_MIN_LR | Scheduler.COSINE_WARMUP_WITH_MIN_LR:
                options["min_lr_rate"] = self.floor
            case Scheduler.POLYNOMIAL if self.floor < 1:
                options = {"lr_end": self.floor, "power": self.power}
            case Scheduler.POLYNOMIAL:  # floor = peak, which Transformers refuses
                kind, options = Scheduler.CONSTANT_WITH_WARMUP, {}
            case Scheduler.WARMUP_STABLE_DECAY:
                options |= {"num_decay_steps": self.decay, "min_lr_ratio": self.floor}
        share: Callable[[int], float] = _scheduler(
            kind, options, num_warmup_steps=self.warmup, num_training_steps=max(self.total, self.warmup + 1)
        ).lr_lambdas[0]
        return share


class MeasuredRate:
    """A rate that follows a held-out loss by torch's ``ReduceLROnPlateau`` or Transformers' ``GreedyLR`` (arXiv 2512.14527).

    ``start``: the first rate after ``warmup`` steps. ``floor``, ``ceiling``: bounds as shares of ``start``. (GreedyLR's own
    defaults, 0.001 and 1, are far too high for a language model.) After more than ``patience`` evaluations in a row without a
    better loss the rate is multiplied by ``factor`` (None: the rule's default). Greedy also divides it by ``factor`` after more
    than ``patience`` better losses in a row. Even the smallest change is applied.
    """

    def __init__(
        self,
        kind: Scheduler,
        start: float,
        *,
        warmup: int = 0,
        floor: float = 0.0,
        ceiling: float = math.inf,
        factor: float | None = None,
        patience: int,
    ) -> None:
        assert kind.follows_a_loss and 0 <= floor <= 1 <= ceiling
        self.start, self.warmup = start, warmup
        options: dict[str, float] = {"min_lr": floor, "patience": patience, "eps": 0.0}
        options |= {} if factor is None else {"factor": factor}
        options |= {"max_lr": ceiling} if kind is Scheduler.GREEDY else {}
        self.rule = _scheduler(kind, options)

    @classmethod
    def of(cls, settings: TrainSettings, start: float, total: int) -> Self:
        """The rate that the flags describe. ``total``: planned optimizer steps, for the warm-up."""
        return cls(
            settings.lr_scheduler,
            start,
            warmup=math.ceil(settings.lr_warmup_ratio * total),
            floor=settings.min_lr_ratio,
            ceiling=settings.max_lr_ratio,
            factor=settings.lr_factor,
            patience=settings.lr_patience,
        )

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


def planned(settings: TrainSettings, peak: float, total: int) -> Schedule | MeasuredRate:
    """The rate that the flags describe, over ``total`` optimizer steps."""
    return (MeasuredRate if settings.lr_scheduler.follows_a_loss else Schedule).of(settings, peak, total)


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


def _scheduler(kind: Scheduler, options: Mapping[str, float], **steps: int) -> Any:
    """Transformers' scheduler over a dummy optimizer with a rate of 1, so that its rates are shares."""
    from transformers import get_scheduler  # slow: it imports PEFT too

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return get_scheduler(kind.value, optimizer, scheduler_specific_kwargs=dict(options), **steps)
