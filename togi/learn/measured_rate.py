"""Learning rates that follow a loss measured on held-out rows: reduce_lr_on_plateau and greedy.

They are no function of the step: what they have seen is part of a checkpoint. Both hold a rate between a floor and a
ceiling and change it by one factor. The numbers of the rules are torch's ``ReduceLROnPlateau`` and Transformers'
``GreedyLR``, but for three departures: a warm-up is possible, the bounds are shares of the starting rate (greedy's own
are 0.001 and 1, which no language model survives), and no change is too small to be made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Self

from togi.config.choices import Scheduler
from togi.config.shared import TrainSettings

# How much lower a loss must be to count as better: of plateau a share of the best one, of greedy nats.
PLATEAU_THRESHOLD = 1e-4
GREEDY_THRESHOLD = 1e-6
# So many reductions that change nothing, and greedy starts over.
GREEDY_RESTART = 500


@dataclass(frozen=True, slots=True)
class Seen:
    """What the evaluations so far have come to. ``share``: the rate as a share of the starting rate.

    ``good``, ``bad``: evaluations in a row with and without a new lowest loss. ``idle``: reductions in vain at the floor
    since the last rise.
    """

    share: float = 1.0
    best: float = math.inf
    good: int = 0
    bad: int = 0
    idle: int = 0


class MeasuredRate:
    """``start``: the first rate after ``warmup`` steps. ``floor``, ``ceiling``: bounds as shares of it.

    After more than ``patience`` evaluations in a row without a better loss the rate is multiplied by ``factor``; greedy
    (arXiv 2512.14527) also divides it by ``factor`` after more than ``patience`` better ones in a row.
    """

    def __init__(
        self,
        kind: Scheduler,
        start: float,
        *,
        warmup: int = 0,
        floor: float = 0.0,
        ceiling: float = math.inf,
        factor: float,
        patience: int,
    ) -> None:
        assert kind.follows_a_loss and 0 < factor < 1 and 0 <= floor <= 1 <= ceiling
        self.kind, self.start, self.warmup = kind, start, warmup
        self.floor, self.ceiling, self.factor, self.patience = floor, ceiling, factor, patience
        self.seen = Seen()

    @classmethod
    def of(cls, settings: TrainSettings, start: float, total: int) -> Self:
        """What the flags ask for. ``total``: planned optimizer steps, for the warm-up."""
        return cls(
            settings.lr_scheduler,
            start,
            warmup=math.ceil(settings.lr_warmup_ratio * total),
            floor=settings.min_lr_ratio,
            ceiling=settings.max_lr_ratio,
            factor=settings.lr_scheduler.factor if settings.lr_factor is None else settings.lr_factor,
            patience=settings.lr_patience,
        )

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0, by what was observed before it."""
        rising = step / self.warmup if step < self.warmup else 1.0
        return self.start * self.seen.share * rising

    def observe(self, loss: float) -> None:
        """Take the loss of one evaluation, in nats. One that is not a number counts as no better."""
        seen = self.seen
        better = loss < self._to_beat(seen.best)
        good, bad = (seen.good + 1, 0) if better else (0, seen.bad + 1)
        self.seen = replace(seen, best=loss if better else seen.best, good=good, bad=bad)
        if self.kind is Scheduler.GREEDY and good > self.patience:
            self.seen = replace(self.seen, share=min(seen.share / self.factor, self.ceiling), good=0, idle=0)
        elif bad > self.patience:
            self._lower()

    def state(self) -> dict[str, float]:
        """What a resume needs, as JSON."""
        return asdict(self.seen)

    def load_state(self, state: Mapping[str, float]) -> None:
        """Take back what ``state`` gave."""
        self.seen = Seen(state["share"], state["best"], int(state["good"]), int(state["bad"]), int(state["idle"]))

    def _to_beat(self, best: float) -> float:
        if self.kind is Scheduler.GREEDY:
            return best - GREEDY_THRESHOLD
        return best * (1 - PLATEAU_THRESHOLD)

    def _lower(self) -> None:
        share = max(self.seen.share * self.factor, self.floor)
        idle = self.seen.idle + (share <= self.floor)
        if self.kind is Scheduler.GREEDY and idle >= GREEDY_RESTART:
            self.seen = Seen()
        else:
            self.seen = replace(self.seen, share=share, bad=0, idle=idle)
