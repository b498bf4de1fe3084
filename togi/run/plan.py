"""How many steps a run has and what is in each: arithmetic that is printed before anything starts.

``--best_metric_key``: which metrics an evaluation has, and which direction of each is good. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from togi.algo.best_of_n import reported_ks
from togi.config.rl import RLConfig
from togi.config.shared import NO_METRIC, OutputSettings
from togi.errors import ConfigError
from togi.learn.checkpoint import Aim
from togi.methods.method import Good, Measure, Method
from togi.obs import names

PREFIX = "eval/"


def offline_aim(config: Method) -> Aim | None:
    """The metric of the best model of this run; None if none is kept. Raises ConfigError."""
    return _aim(config, [Measure(names.LOSS, Good.LOW), *config.measures])


def rl_aim(config: RLConfig, sources: Iterable[str]) -> Aim | None:
    """Like ``offline_aim``, for an RL run with held-out prompts of these data sources."""
    keys = [f"pass{k}" for k in reported_ks(config.eval_n_samples_per_prompt)]
    good = {names.EVAL_REWARD: Good.HIGH, names.EVAL_LENGTH: Good.EITHER, names.EVAL_TRUNCATED: Good.LOW}
    good |= {names.eval_of(source, key): Good.HIGH for source in sources for key in keys}
    return _aim(config, [Measure(name.removeprefix(PREFIX), which) for name, which in good.items()])


def check_rl_metric(config: RLConfig) -> None:
    """Check ``rl_aim`` before the prompts are read, when any data source is still possible."""
    source = config.best_metric_key.removeprefix(PREFIX).rpartition("/")[0]
    rl_aim(config, [source] if source else [])


def _aim(config: OutputSettings, measures: Sequence[Measure]) -> Aim | None:
    if config.best_metric_key == NO_METRIC:
        return None
    name = config.best_metric_key.removeprefix(PREFIX)
    found = next((measure for measure in measures if measure.name == name), None)
    if found is None:
        measured = ", ".join(map(_logged, measures))
        raise ConfigError(
            f"--best_metric_key {config.best_metric_key}: an evaluation of this run has {measured}: choose one of them."
        )
    if config.best_metric_mode != "auto":
        return Aim(_logged(found), config.best_metric_mode == "max")
    if found.good is Good.EITHER:
        raise ConfigError(
            f"--best_metric_key {config.best_metric_key} may be good high or low: say which with --best_metric_mode min or max."
        )
    return Aim(_logged(found), found.good is Good.HIGH)


def _logged(measure: Measure) -> str:
    return f"{PREFIX}{measure.name}"


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """``rows`` in batches of ``batch`` (the last batch of an epoch is smaller), ``epochs`` times.

    The rows of an optimizer step are a pure function of the step, so a resume needs the step only.
    """

    rows: int
    batch: int
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """ceil(rows / batch)."""
        return -(-self.rows // self.batch)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    @property
    def smallest_batch(self) -> int:
        """Rows of the last batch of an epoch."""
        return self.rows - (self.steps_per_epoch - 1) * self.batch

    def rows_of(self, step: int) -> list[int]:
        """The rows of step ``step``, counted from 0. Every epoch has its own seeded permutation of all rows."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, self.rows)
        rows: list[int] = order[place * self.batch : (place + 1) * self.batch].tolist()
        return rows

    def rows_before(self, step: int) -> int:
        """How many rows the steps before ``step`` had, over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return epoch * self.rows + place * self.batch

    def describe(self) -> str:
        """The batch arithmetic in one line."""
        rest = (
            "" if self.smallest_batch == min(self.batch, self.rows) else f", the last of an epoch {self.smallest_batch}"
        )
        return (
            f"{self.rows} rows in batches of {min(self.batch, self.rows)}{rest}: {self.steps_per_epoch} optimizer steps "
            f"an epoch, {self.epochs} epochs, {self.steps} steps in all"
        )


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """The permutation of all rows in an epoch, cached because every step takes a slice of it."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """``prompts`` of each rollout of one episode; ``rollouts`` and ``updates`` of the whole run.

    ``actor_updates``: updates of the actor, which may be frozen at first.
    """

    prompts: tuple[int, ...]
    rollouts: int
    updates: int
    actor_updates: int

    @classmethod
    def of(cls, config: RLConfig, num_prompts: int) -> StepPlan:
        """The plan for ``num_prompts`` prompts. The last rollout of an episode takes those that remain; none is dropped."""
        full, rest = divmod(num_prompts, config.rollout_batch_size)
        prompts = (config.rollout_batch_size,) * full + ((rest,) if rest > 0 else ())
        every = prompts * config.num_episodes
        used = every if config.max_steps < 0 else every[: config.max_steps]
        # A rollout is trained `max_epochs` times in batches of `train_batch_size` samples.
        per_update, samples = config.train_batch_size, config.n_samples_per_prompt
        updates = [-(-count * samples // per_update) * config.max_epochs for count in used]
        return cls(prompts, len(used), sum(updates), sum(updates[max(0, config.freezing_actor_steps) :]))

    def describe(self, config: RLConfig) -> str:
        """The batch arithmetic in one line. With filtering a rollout needs more prompts, so the counts are upper bounds."""
        most = "at most " if config.dynamic_filtering else ""
        frozen = f", {most}{self.actor_updates} of the actor" if self.actor_updates < self.updates else ""
        return (
            f"{self.prompts[0]} prompts x {config.n_samples_per_prompt} samples = "
            f"{self.prompts[0] * config.n_samples_per_prompt} samples a rollout -> "
            f"{-(-self.prompts[0] * config.n_samples_per_prompt // config.train_batch_size) * config.max_epochs} updates of up to "
            f"{config.train_batch_size}; {most}{self.rollouts} rollouts, {most}{self.updates} updates in all{frozen}"
        )
