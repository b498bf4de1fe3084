"""FSDP2: what is whole on a rank and when, and shards within groups of ranks, against one process."""

from pathlib import Path

import torch

from tests.equal import fsdp2_jobs
from tests.equal import parallel_jobs as jobs
from tests.learn_tools import CPU, run_ranks, weights
from togi.parallel.process import World


def test_a_forward_alone_leaves_no_whole_weights_and_rounds_nothing(tmp_path: Path) -> None:
    run_ranks(fsdp2_jobs.scoring_leaves_shards, 2, tmp_path)


def test_shards_within_groups_equal_one_process(tmp_path: Path) -> None:
    """Two groups of two ranks, with ragged batches. What is the same over all ranks or from a checkpoint, the job asserts."""
    alone = jobs.precise_learner(World.solo(CPU), "fsdp20")
    expected = jobs.record(jobs.train(alone, range(jobs.STEPS)), weights(alone.backend))
    run_ranks(fsdp2_jobs.groups_of_shards, 4, tmp_path)
    files = sorted(tmp_path.glob("groups*.pt"))
    assert len(files) == 4 * 2 * len(fsdp2_jobs.STAGES)
    for file in files:
        jobs.assert_same(torch.load(file), expected)
