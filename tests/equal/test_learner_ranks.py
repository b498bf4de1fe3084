"""The moving average and a mixed-in objective over two sharded processes, on either backend, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.equal.parallel_jobs import precise_learner
from tests.learn_tools import (
    CPU,
    learner,
    max_difference,
    packs,
    partition_small_weights,
    policy,
    rollouts,
    run_ranks,
    solo,
    weights,
)
from togi.config.choices import BackendName
from togi.learn.learner import Learner, Mixed, UpdateReport
from togi.learn.learner_state import Ema
from togi.learn.objective import SFTObjective
from togi.parallel import trainable
from togi.parallel.backend import BackendOptions
from togi.parallel.process import World

BETA = 0.75
LAYOUTS = (BackendName.FSDP2, 0), (BackendName.FSDP2, 3), (BackendName.DEEPSPEED, 2), (BackendName.DEEPSPEED, 3)


def average(world: World, folder: Path) -> None:
    """Two steps in each layout; the average as it should be is made of whole weights on the side."""
    partition_small_weights()
    for backend, stage in LAYOUTS:
        options = BackendOptions(bf16=True, backend=backend, zero_stage=stage)
        model = learner(trainable(policy(), world, options))
        ema = Ema(model.backend, BETA, CPU)
        expected: dict[str, Tensor] = weights(model.backend)
        for step in range(2):
            model.update(packs(rollouts(4, seed=step)[world.rank * 2 : world.rank * 2 + 2], [1, 1]))
            ema.update()
            for name, tensor in weights(model.backend).items():
                expected[name] = BETA * expected[name] + (1 - BETA) * tensor
        ema.save(folder / f"{backend}{stage}")
        found = {name: tensor.clone() for name, tensor in ema.full_parameters()}
        assert max_difference(found, expected) < 1e-6
        assert max_difference(found, weights(model.backend)) > 1e-4
        if world.is_first:
            torch.save(expected, folder / f"{backend}{stage}.pt")


def mixed(world: World, folder: Path) -> None:
    """Two steps of policy and supervised loss; of the rows the first rank has none in the first step."""
    for layout in ("fsdp20", "fsdp23"):
        model = precise_learner(world, layout)
        reports = [mixed_step(model, step) for step in range(2)]
        if world.is_first:
            torch.save(weights(model.backend), folder / f"mixed_{layout}.pt")
            torch.save([dict(report.metrics) for report in reports], folder / f"metrics_{layout}.pt")
        else:
            weights(model.backend)


def mixed_step(model: Learner, step: int) -> UpdateReport:
    world = model.backend.world
    samples, rows = rollouts(4, seed=step), rollouts(3, seed=10 + step)
    cuts = [0, 4, 0, 3] if world.size == 1 else [[0, 1, 0, step], [1, 4, step, 3]][world.rank]
    own, added = samples[cuts[0] : cuts[1]], rows[cuts[2] : cuts[3]]
    batches = packs(added, [1] * len(added))
    return model.update(packs(own, [1] * len(own)), Mixed("ptx", SFTObjective(), batches, 0.5))


def both(world: World, folder: Path) -> None:
    average(world, folder)
    mixed(world, folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averages")
    run_ranks(both, 2, folder)
    return folder


@pytest.mark.parametrize(("backend", "stage"), LAYOUTS)
def test_an_average_of_two_ranks_goes_on_in_one(runs: Path, backend: BackendName, stage: int) -> None:
    ema = Ema(solo().backend, BETA, CPU)
    ema.load(runs / f"{backend}{stage}")
    expected = torch.load(runs / f"{backend}{stage}.pt")
    assert max_difference(dict(ema.full_parameters()), expected) < 1e-6


@pytest.mark.parametrize("layout", ["fsdp20", "fsdp23"])
def test_a_mixed_objective_of_two_ranks_equals_one_process(runs: Path, layout: str) -> None:
    model, tolerance = precise_learner(World.solo(CPU), "fsdp20"), 1e-9
    reports = [mixed_step(model, step) for step in range(2)]
    for ours, theirs in zip(torch.load(runs / f"metrics_{layout}.pt"), reports, strict=True):
        assert ours.keys() == theirs.metrics.keys()
        assert ours == pytest.approx(dict(theirs.metrics), rel=tolerance, abs=tolerance)
    assert max_difference(torch.load(runs / f"mixed_{layout}.pt"), weights(model.backend)) < tolerance
