"""FSDP2: what is whole on a rank, and when."""

from pathlib import Path

from tests.equal import fsdp2_jobs
from tests.learn_tools import run_ranks


def test_a_forward_alone_leaves_no_whole_weights_and_rounds_nothing(tmp_path: Path) -> None:
    run_ranks(fsdp2_jobs.scoring_leaves_shards, 2, tmp_path)
