"""A second objective in the same step: the gradient is the weighted sum of both, each divided by its own count."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.learn_tools import CPU, objective, packs, policy, rollouts, scheduled
from togi.config.choices import Scheduler
from togi.learn.learner import Learner, Mixed, UpdateReport
from togi.learn.objective import Objective, SFTObjective
from togi.parallel import trainable
from togi.parallel.backend import BackendOptions
from togi.parallel.process import World

COEF = 0.25  # a power of two scales without rounding
POLICY, ROWS = rollouts(4, seed=0), rollouts(5, seed=1)


def gradient(
    main: Objective, batches: Sequence[object], mixed: Mixed | None = None
) -> tuple[dict[str, Tensor], UpdateReport]:
    """The gradient of one step in float64, seen before it is used."""
    backend = trainable(policy(dtype=torch.float64), World.solo(CPU), BackendOptions(bf16=False))
    seen: dict[str, Tensor] = {}

    def look(_: float) -> None:
        seen.update({name: p.grad.clone() for name, p in backend.module.named_parameters()})
        backend.drop_gradients()

    backend.step = look
    report = Learner(backend, main, scheduled(Scheduler.CONSTANT, 1.0, 1), math.inf).update(batches, mixed)
    return seen, report


@pytest.mark.parametrize(("sizes", "row_sizes"), [([4], [5]), ([1, 3], [2, 1, 2])], ids=["one", "several"])
def test_gradients_add_up_and_packing_changes_nothing(sizes: list[int], row_sizes: list[int]) -> None:
    alone, first = gradient(objective(), packs(POLICY, [2, 2]))
    supervised, second = gradient(SFTObjective(), packs(ROWS, [3, 2]))
    mixed = Mixed("ptx", SFTObjective(), packs(ROWS, row_sizes), COEF)
    both, report = gradient(objective(), packs(POLICY, sizes), mixed)
    for name in both:
        torch.testing.assert_close(both[name], alone[name] + COEF * supervised[name], rtol=1e-5, atol=1e-7)
    assert report.count == first.count
    assert report.metrics["policy/loss"] == pytest.approx(first.metrics["policy/loss"], rel=1e-6)
    assert report.metrics["ptx/loss"] == pytest.approx(second.metrics["loss"], rel=1e-6)
    assert report.metrics["ptx/perplexity"] == pytest.approx(math.exp(second.metrics["loss"]), rel=1e-6)
    assert len(report.logprobs) == len(POLICY)  # of the rollouts only
