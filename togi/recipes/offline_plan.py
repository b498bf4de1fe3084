"""Which rows make up which optimizer step: a pure function of the step, so that a resume needs the step only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """``rows`` are dealt in batches of ``batch`` (the last one of an epoch is smaller), ``epochs`` times."""

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
        """The rows of step ``step``, counted from 0. Every epoch has its own seeded order of all rows."""
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
    """The order of all rows in an epoch, kept as every step of it asks for a part."""
    return np.random.default_rng([seed, epoch]).permutation(rows)
