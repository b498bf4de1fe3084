"""What the ranks of ``test_parallel_ranks`` run; every function is started by ``run_ranks`` in fresh processes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.learn_tools import critic, learner, packs, policy, rollouts, solo, weights
from togi.batch import Batch
from togi.learn.learner import Learner, StepOutcome, UpdateReport
from togi.learn.learner_state import load_learner, save_learner
from togi.learn.scorer import Scorer
from togi.parallel.backend import BackendOptions
from togi.parallel.build import frozen, frozen_on_host, trainable
from togi.parallel.process import World

STEPS = 5
IDENTITY = {"model": "tiny"}
# For each step, which sizes of micro-batches every rank gets: ragged on purpose, once nothing at all.
PLANS = {
    1: [[[6]]] * STEPS,
    2: [[[2, 1, 1], [2]], [[6], []], [[], [1, 5]], [[1, 1], [1, 1, 1, 1]], [[3], [3]]],
    4: [
        [[2], [1, 1], [], [2]],
        [[6], [], [], []],
        [[1], [1], [2], [2]],
        [[1], [1, 1], [1, 1], [1]],
        [[3], [1], [1], [1]],
    ],
}


def own_batches(world: World, step: int) -> list[Batch]:
    """This rank's part of the six rollouts of a step."""
    samples, plan = rollouts(6, seed=step), PLANS[world.size][step]
    start = sum(sum(sizes) for sizes in plan[: world.rank])
    sizes = plan[world.rank]
    return packs(samples[start : start + sum(sizes)], sizes)


def double_learner(world: World, zero_stage: int) -> Learner:
    options = BackendOptions(bf16=False, zero_stage=zero_stage, weight_decay=0.1)
    return learner(trainable(policy(dtype=torch.float64), world, options))


def train(model: Learner, steps: range) -> list[UpdateReport]:
    return [model.update(own_batches(model.backend.world, step)) for step in steps]


def record(reports: list[UpdateReport], final: dict[str, Tensor]) -> dict[str, object]:
    metrics = [{**report.metrics, "grad_norm": report.grad_norm, "count": report.count} for report in reports]
    loads = [(report.load.padding_share, report.load.imbalance) for report in reports]
    return {"metrics": metrics, "weights": final, "loads": loads}


def stages(world: World, folder: Path) -> None:
    """Five float64 steps under every stage, what a non-finite rank does, and scoring with a sharded frozen model."""
    for stage in (0, 1, 2, 3):
        model = double_learner(world, stage)
        reports = train(model, range(STEPS))
        everyone = world.gather("test", [dict(report.metrics) for report in reports])
        assert all(one == everyone[0] for one in everyone), "ranks report different metrics"
        torch.save(record(reports, weights(model.backend)), folder / f"stage{stage}_rank{world.rank}.pt")
        skip_non_finite(world, model)
        Scorer(model.backend.module, world).logprobs(own_batches(world, 1))
    options = BackendOptions(bf16=False, zero_stage=3)
    scores = Scorer(frozen(critic(), world, options), world).scores(own_batches(world, 0))
    torch.save(world.gather("test", scores.tolist()), folder / f"scores{world.rank}.pt")
    on_host = critic()
    around = frozen_on_host(on_host, world, options)
    assert all(isinstance(p, DTensor) and p.to_local().device.type == "cpu" for p in on_host.parameters())
    assert np.array_equal(Scorer(on_host, world, around).scores(own_batches(world, 0)), scores)
    different_start(world)


def skip_non_finite(world: World, model: Learner) -> None:
    """One rank's NaN must stop the step on every rank."""
    before = weights(model.backend)
    batches = own_batches(world, 0)
    if world.rank == 0:
        bad = batches[0].streams["advantages"].clone().fill_(math.nan)
        batches[0] = dataclasses.replace(batches[0], streams={**batches[0].streams, "advantages": bad})
    report = model.update(batches)
    assert report.outcome is StepOutcome.SKIPPED_NOT_FINITE
    assert model.update([]).outcome is StepOutcome.SKIPPED_EMPTY
    after = weights(model.backend)
    assert all(torch.equal(before[name], after[name]) for name in before)


def different_start(world: World) -> None:
    """Ranks that bring different weights are refused, whatever the stage."""
    for stage in (0, 2):
        try:
            trainable(policy(seed=world.rank), world, BackendOptions(zero_stage=stage))
        except AssertionError as error:
            assert "seed every rank alike" in str(error)
        else:
            raise AssertionError("different weights were accepted")


def four(world: World, folder: Path) -> None:
    """Stage 3 with recomputed activations."""
    model = double_learner(world, 3)
    model.backend.module.hf.gradient_checkpointing_enable({"use_reentrant": False})
    reports = train(model, range(STEPS))
    torch.save(record(reports, weights(model.backend)), folder / f"four{world.rank}.pt")


def mixed(world: World) -> Learner:
    """bfloat16 over float32 masters, as in a real run."""
    return learner(trainable(policy(), world, BackendOptions(bf16=True, zero_stage=2, weight_decay=0.1)))


def begin(world: World, folder: Path) -> None:
    """Two steps, save, two more."""
    model = mixed(world)
    train(model, range(2))
    torch.manual_seed(5 + world.rank)
    np.random.seed(7 + world.rank)
    save_learner(model, folder / "pair", IDENTITY)
    reports = train(model, range(2, 4))
    finish(world, model, reports, folder / "pair_uninterrupted")
    if world.rank == 0:
        alone = solo(bf16=True)
        train(alone, range(2))
        save_learner(alone, folder / "solo", IDENTITY)
        finish(alone.backend.world, alone, train(alone, range(2, 4)), folder / "solo_uninterrupted")


def resume(world: World, folder: Path) -> None:
    """Load in fresh processes and take the last two steps; the same cold, without the checkpoint's moments."""
    model = mixed(world)
    load_learner(model, folder / "pair", IDENTITY)
    reports = train(model, range(2, 4))
    finish(world, model, reports, folder / "pair_resumed")
    if world.rank == 0:
        alone = solo(bf16=True)
        load_learner(alone, folder / "solo", IDENTITY)
        finish(alone.backend.world, alone, train(alone, range(2, 4)), folder / "solo_resumed")


def finish(world: World, model: Learner, reports: list[UpdateReport], path: Path) -> None:
    draws = world.gather("test", (torch.rand(3).tolist(), np.random.rand(3).tolist()))
    final = weights(model.backend)
    if world.rank == 0:
        torch.save({**record(reports, final), "draws": draws, "steps": model.steps}, path)
