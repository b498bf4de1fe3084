"""Groups of ranks that part the weights = one process: losses, norms, weights, checkpoints; alone and beside data parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.equal import tensor_jobs as jobs
from tests.equal.parallel_jobs import assert_same
from tests.learn_tools import CPU, assert_nearly_as_far, max_difference, run_ranks, weights
from togi.config.shared import check_splittable
from togi.errors import ConfigError
from togi.learn.learner_state import load_learner
from togi.parallel.process import World


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensor")
    run_ranks(jobs.two_ranks, 2, folder)
    return folder


@pytest.mark.parametrize("arch", jobs.ARCHS)
def test_a_group_of_two_equals_one_process(runs: Path, arch: str) -> None:
    """Float64, several micro-batches, clipping; stage 3 with recomputed activations. What each rank says is the same."""
    alone = jobs.trained(World.solo(CPU), arch, 0)
    files = sorted(runs.glob(f"{arch}_*_*.pt"))
    assert len(files) == 2 * (3 if arch == jobs.ARCHS[0] else 1)
    for file in files:
        assert_same(torch.load(file), alone)


def test_resumed_equals_uninterrupted_bit_for_bit(runs: Path) -> None:
    """The second in another ZeRO stage. And the checkpoint goes on in one process."""
    straight, again = (torch.load(runs / name) for name in ("uninterrupted", "resumed"))
    assert again["metrics"] == straight["metrics"]
    assert max_difference(again["weights"], straight["weights"]) == 0.0
    model = jobs.learner_of(World.solo(CPU), "qwen3", 0, bf16=True)
    load_learner(model, runs / "saved", jobs.IDENTITY)
    assert jobs.same_state(model, runs / "saved")
    saved = weights(model.backend)
    jobs.train(model, range(2, 4))
    assert_nearly_as_far(saved, weights(model.backend), straight["weights"])


def test_two_groups_of_two_equal_one_process(runs: Path) -> None:
    """Ragged shares, of different numbers of micro-batches, once of none."""
    run_ranks(jobs.four_ranks, 4, runs)
    for arch, stage in (("qwen3", 3), ("llama", 1)):
        alone = jobs.trained(World.solo(CPU), arch, 0)
        for rank in range(4):
            assert_same(torch.load(runs / f"{arch}_{stage}_{rank}.pt"), alone)


def test_models_that_cannot_be_split_are_refused() -> None:
    sound = {"model_type": "qwen3", "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 96}
    check_splittable(2, "pretrain", "m", sound)
    check_splittable(1, "pretrain", "m", {"model_type": "mixtral"})
    with pytest.raises(
        ConfigError, match="--ds_tensor_parallel_size 4 does not divide the 8 heads, the 2 key/value heads"
    ):
        check_splittable(4, "pretrain", "m", sound)
    with pytest.raises(ConfigError, match="--pretrain m is a mixtral model"):
        check_splittable(2, "pretrain", "m", {"model_type": "mixtral"})
