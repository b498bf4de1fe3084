"""Two ragged ranks, replicated and fully sharded, take the same steps as one process, for every kind of objective."""

from pathlib import Path

import pytest
import torch

from tests.equal import objective_jobs as jobs
from tests.learn_tools import CPU, max_difference, run_ranks
from togi.parallel.process import World


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    run_ranks(jobs.everything, 2, folder)
    return folder


@pytest.mark.parametrize("name", jobs.NAMES)
def test_two_ranks_equal_one_process(pair: Path, name: str) -> None:
    alone = jobs.train(World.solo(CPU), name, 0)
    for stage in (0, 3):
        both = torch.load(pair / f"{name}_{stage}.pt")
        for ours, theirs in zip(both["metrics"], alone["metrics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-8, abs=1e-9)
        assert max_difference(both["weights"], alone["weights"]) < 1e-8
