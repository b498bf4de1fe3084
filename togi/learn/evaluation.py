"""An objective on held-out batches: the same loss and metrics as in training, without gradients.

Sums and counts are added over batches and ranks and divided once, so every row counts alike however rows are packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from togi.batch import Batch
from togi.learn.objective import Objective
from togi.learn.ragged import even_rounds
from togi.obs.metrics import Metric, merge, reduced
from togi.parallel.process import World


@dataclass(frozen=True, slots=True)
class Measured:
    """Part of an evaluation: the loss as sum and count, and partial metrics. Parts of one set add up.

    ``judged``: ``Objective.judge`` of each sequence, batch after batch, each in the order of the list it was packed from.
    """

    total: float
    count: float
    metrics: Mapping[str, Metric]
    judged: tuple[float, ...] = ()

    @classmethod
    def merged(cls, parts: Iterable[Measured]) -> Measured:
        """Several parts as one."""
        every = list(parts)
        metrics = merge(part.metrics for part in every)
        judged = tuple(value for part in every for value in part.judged)
        return cls(sum(part.total for part in every), sum(part.count for part in every), metrics, judged)


def measure(module: nn.Module, objective: Objective, world: World, batches: Sequence[Batch]) -> Measured:
    """One part of an evaluation, from this rank's batches; all ranks call together. The result is this rank's share."""
    module.eval()
    parts = [Measured(0.0, 0.0, {})]
    for batch, real, _ in even_rounds(world, batches):
        with torch.no_grad():
            outputs = objective.forward(module, batch)
            if real:
                loss = objective.loss(outputs, batch)
                judged_N = objective.judge(outputs, batch).float().cpu().numpy()
                listed = tuple(judged_N[np.argsort(batch.order_N)].tolist()) if len(judged_N) > 0 else ()
                parts.append(Measured(float(loss.sum), objective.count(batch), loss.metrics, listed))
    return Measured.merged(parts)


def conclude(objective: Objective, world: World, measured: Measured) -> tuple[float, dict[str, float]]:
    """(loss, metrics) over all ranks: total / count, and the objective's summary of the merged metrics."""
    whole = Measured.merged(world.gather_shares("evaluation", measured))
    assert whole.count > 0, "nothing of the evaluation set is in the loss"
    return whole.total / whole.count, objective.summary(reduced(whole.metrics))
