"""The training step that all methods share: a trainable model, an objective, a schedule.

``update`` is one optimizer step. Its denominator is the sum of ``Objective.count`` over all micro-batches of all ranks, known
before the first forward. Every micro-batch's loss is divided by it, and gradients are summed. So packing, accumulation and world
size cannot change a gradient. The load-balancing loss of a mixture of experts does not depend on the objective: it is added as a
mean over the sequences of the step. A second objective (``Mixed``) has its own denominator. Not here: batches (``togi.data``),
sharding (``togi.parallel``), files (``learner_state``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from togi.batch import Batch
from togi.data.packing import PackStats, pack_stats
from togi.errors import RunError
from togi.learn.objective import Objective, token_metrics
from togi.learn.schedule import LearningRate
from togi.learn.scorer import DUMMY_TOKENS, even_rounds, nothing, per_sequence
from togi.obs import names
from togi.obs.metrics import Metric, merge, reduced
from togi.parallel.backend import Backend

logger = logging.getLogger(__name__)
NOT_FINITE_AT_MOST = 3
"""A run ends after so many updates in a row without a finite gradient. One alone may be the fault of a single row."""


class StepOutcome(StrEnum):
    UPDATED = "updated"
    SKIPPED_EMPTY = "skipped_empty"
    """No token or row was in the loss on any rank."""
    SKIPPED_NOT_FINITE = "skipped_not_finite"
    """The gradient norm was NaN or infinite. The weights are unchanged."""


@dataclass(frozen=True, slots=True, eq=False)
class UpdateReport:
    """One call of ``Learner.update``. All but ``packed`` and ``logprobs`` is the same on every rank.

    ``steps``: optimizer steps taken so far. ``learning_rate``: that of this step. ``grad_norm``: global L2 norm before
    clipping, NaN if no gradient was computed. ``count``: the denominator. ``padding_share``: the share of positions without a
    token among those computed on all ranks. ``imbalance``: tokens of the busiest rank / mean over ranks, at least 1. ``packed``:
    the tokens of this rank. ``logprobs``: this rank's log-probs (nats) at the tokens in the loss before the step, one array a
    sequence: batch after batch, each in the order of the list it was packed from. Empty if the objective computes none.
    """

    outcome: StepOutcome
    steps: int
    learning_rate: float
    grad_norm: float
    count: float
    padding_share: float
    imbalance: float
    packed: PackStats
    metrics: Mapping[str, float]
    logprobs: Sequence[NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class Mixed:
    """A second objective in the same step. It adds ``coef`` x its sum / its count, over all its batches on all ranks.

    Its metrics are reported as ``name``/metric.
    """

    name: str
    objective: Objective
    batches: Sequence[Batch]
    coef: float


class Divergence:
    """Says which updates of one model were skipped, and ends a run that has diverged.

    ``rate``: the flag of the model's learning rate, for the message. ``in_a_row``: the latest updates without a finite gradient.
    """

    def __init__(self, rate: str) -> None:
        self.rate = rate
        self.in_a_row = 0

    def watch(self, step: int, reports: Iterable[UpdateReport]) -> None:
        """Look at the updates of the run's step ``step``. Raises RunError after ``NOT_FINITE_AT_MOST`` in a row."""
        for report in reports:
            if report.outcome is StepOutcome.SKIPPED_EMPTY:
                logger.warning("step %d: an update was skipped, as no token or row is in the loss", step)
                continue
            if report.outcome is StepOutcome.UPDATED:
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            logger.warning("step %d: an update was skipped, as the gradient norm is %s", step, report.grad_norm)
            if self.in_a_row == NOT_FINITE_AT_MOST:
                raise RunError(
                    f"Training has diverged: {NOT_FINITE_AT_MOST} updates in a row, the last of them in step {step}, had a "
                    f"gradient that is not finite. Lower {self.rate} or --max_norm, or look for extreme values in the data of "
                    "these steps, and start again, or from an earlier checkpoint."
                )


@dataclass(eq=False)
class Learner:
    """Trains one model. ``max_norm``: bound on the global gradient norm; ``math.inf`` for none.

    ``aux_loss_coef``: weight of the load-balancing loss (``togi.algo.balance``), only for a mixture of experts.
    """

    backend: Backend
    objective: Objective
    schedule: LearningRate
    max_norm: float
    aux_loss_coef: float = 0.0
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        assert self.max_norm > 0 and self.aux_loss_coef >= 0

    def update(self, micro_batches: Sequence[Batch], mixed: Mixed | None = None) -> UpdateReport:
        """One optimizer step on the micro-batches of all ranks. Ranks may have different numbers of micro-batches, also none.

        ``mixed`` adds a second objective, on all ranks or on none. The step is skipped and reported if the first objective
        has no token or row in its loss, or if the gradient is not finite.
        """
        backend, rate = self.backend, self.schedule.rate(self.steps)
        world = backend.world
        # the denominators, over all ranks, before the first forward
        own = [sum(self.objective.count(b) for b in micro_batches), sum(b.num_sequences for b in micro_batches)]
        if mixed is not None:
            own.append(sum(mixed.objective.count(b) for b in mixed.batches))
        count, sequences, *others = world.sum_shares("loss count", own)
        assert math.isfinite(count) and count >= 0, f"a loss count of {count}"
        packed = sum((pack_stats(batch) for batch in micro_batches), PackStats(0, 0))
        if count == 0:
            return UpdateReport(StepOutcome.SKIPPED_EMPTY, self.steps, rate, math.nan, count, 0.0, 1.0, packed, {}, ())
        # forward and backward: gradients are summed over micro-batches and, after the last one, over ranks
        balanced_over = sequences if self.aux_loss_coef > 0 else None
        metrics, logprobs = self._accumulate(
            self.objective, micro_batches, count, balanced_over=balanced_over, last=mixed is None
        )
        if mixed is not None:
            assert others[0] > 0, "nothing is in the loss of the second objective"
            added, _ = self._accumulate(mixed.objective, mixed.batches, others[0] / mixed.coef, last=True)
        # clip and step, or drop a gradient that is not finite: every rank sees the same norm
        grad_norm = backend.clip(self.max_norm)
        if math.isfinite(grad_norm):
            backend.step(rate)
            self.steps += 1
            outcome = StepOutcome.UPDATED
        else:
            backend.drop_gradients()
            outcome = StepOutcome.SKIPPED_NOT_FINITE
        # metrics over all ranks
        values = self.objective.summary(reduced(merge(world.gather_shares("metrics", metrics))))
        if mixed is not None:
            others_values = mixed.objective.summary(reduced(merge(world.gather_shares("mixed metrics", added))))
            values |= {f"{mixed.name}/{name}": value for name, value in others_values.items()}
        load = self._load(micro_batches)
        return UpdateReport(outcome, self.steps, rate, grad_norm, count, *load, packed, values, logprobs)

    def _load(self, micro_batches: Sequence[Batch]) -> tuple[float, float]:
        """(padding share, imbalance) of a step. A rank computes a dummy batch if another has more batches.

        The ranks of a ring count as one.
        """
        tokens, world = float(sum(batch.num_tokens for batch in micro_batches)), self.backend.world
        highest, rounds = world.max("load", [tokens, len(micro_batches)])
        every, batches = world.sum_shares("load", [tokens, len(micro_batches)])
        padding = (rounds * world.shares - batches) * DUMMY_TOKENS
        return padding / (every + padding), highest * world.shares / every

    def _accumulate(
        self,
        objective: Objective,
        micro_batches: Sequence[Batch],
        divisor: float,
        *,
        balanced_over: float | None = None,
        last: bool,
    ) -> tuple[dict[str, Metric], tuple[NDArray[np.float32], ...]]:
        """Forward and backward over this rank's micro-batches of one objective. Returns its metrics and log-probs.

        ``divisor`` divides the sum of the loss. ``balanced_over``: the number of sequences of the step on all ranks, over which
        the balance loss is a mean; None for no balance loss. ``last``: no other batches follow in this step.
        """
        balanced = balanced_over is not None
        parts: list[Mapping[str, Metric]] = []
        logprobs: list[NDArray[np.float32]] = []
        model = self.backend.module.train()
        for batch, real, ends in even_rounds(self.backend.world, micro_batches):
            outputs = objective.forward(model, batch, balance=balanced)
            if real:
                # divide each micro-batch by the count of the whole step
                loss = objective.loss(outputs, batch)
                parts.append(loss.metrics)
                if objective.needs.logprobs:
                    logprobs += per_sequence(outputs.logprobs_K, batch)
                total = loss.sum / divisor
                if balanced_over is not None:
                    aux_loss = outputs.balance_N.sum()
                    total = total + self.aux_loss_coef * aux_loss / balanced_over
                    parts.append(token_metrics({names.AUX_LOSS: aux_loss}, batch.num_sequences, {}))
                self.backend.backward(total, ends and last)
            else:
                # a dummy batch: its zero gradient keeps this rank in the collectives of the others
                self.backend.backward(nothing(outputs), ends and last)
        return merge(parts), tuple(logprobs)
