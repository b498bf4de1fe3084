"""The moving average over two sharded processes, on either backend, against the whole weights; loaded again in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

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
from togi.learn.ema import Ema
from togi.parallel.backend import BackendOptions
from togi.parallel.build import trainable
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averages")
    run_ranks(average, 2, folder)
    return folder


@pytest.mark.parametrize(("backend", "stage"), LAYOUTS)
def test_an_average_of_two_ranks_goes_on_in_one(runs: Path, backend: BackendName, stage: int) -> None:
    ema = Ema(solo().backend, BETA, CPU)
    ema.load(runs / f"{backend}{stage}")
    expected = torch.load(runs / f"{backend}{stage}.pt")
    assert max_difference(dict(ema.full_parameters()), expected) < 1e-6
