"""Two and four processes, ragged and sharded, against one; and resuming in fresh processes, bit for bit."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.equal import parallel_jobs as jobs
from tests.equal.parallel_jobs import assert_same
from tests.learn_tools import (
    CPU,
    assert_nearly_as_far,
    critic,
    learner,
    max_difference,
    packs,
    policy,
    rollouts,
    run_ranks,
    solo,
    weights,
)
from togi.learn.learner_state import load_learner
from togi.learn.scorer import Scorer
from togi.parallel import replicated
from togi.parallel.backend import BackendOptions
from togi.parallel.fsdp2 import Sharded
from togi.parallel.process import World
from togi.parallel.replicated import Replicated

# The covering array of test_combinations has the same losses, gradients and weights every time.
pytestmark = pytest.mark.large


@pytest.fixture(scope="module")
def alone() -> dict[str, object]:
    model = jobs.precise_learner(World.solo(CPU), "fsdp20")
    return jobs.record(jobs.train(model, range(jobs.STEPS)), weights(model.backend))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Processes start slowly, so that each group of them does all it can."""
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(jobs.two_ranks, 2, folder)
    run_ranks(jobs.one_rank, 1, folder)
    run_ranks(jobs.two_ranks_again, 2, folder)
    return folder


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("layout", jobs.LAYOUTS)
def test_every_layout_equals_one_plain_process(runs: Path, alone: dict[str, object], layout: str, size: int) -> None:
    """Five steps of ragged ranks, of different numbers of micro-batches, once of none."""
    for rank in range(size):
        result = torch.load(runs / f"{layout}_{size}_{rank}.pt")
        assert_same(result, alone, 1e-4 if layout.startswith("deepspeed") else 1e-9)


def test_what_ranks_compute_to_keep_in_step_is_counted(runs: Path, alone: dict[str, object]) -> None:
    """By hand from the plan of the ranks' batches; a dummy has two positions."""
    assert alone["loads"] == [(0.0, 1.0)] * jobs.STEPS
    for step, (padding, imbalance) in enumerate(torch.load(runs / "fsdp22_2_1.pt")["loads"]):
        lengths = [len(sample.tokens) for sample in rollouts(6, seed=step)]
        first = sum(jobs.PLANS[2][step % 5][0])  # the first rank's samples
        dummies = [2, 1, 2, 2, 0][step % 5]  # [3, 1], [1, 0], [0, 2], [2, 4] and [1, 1] batches
        assert padding == pytest.approx(2 * dummies / (sum(lengths) + 2 * dummies))
        assert imbalance == pytest.approx(max(sum(lengths[:first]), sum(lengths[first:])) / (sum(lengths) / 2))


def test_four_ragged_ranks_equal_one_process(tmp_path: Path, alone: dict[str, object]) -> None:
    run_ranks(jobs.four, 4, tmp_path)
    for rank in range(4):
        assert_same(torch.load(tmp_path / f"four{rank}.pt"), alone)


@pytest.mark.parametrize("bf16", [False, True])
def test_fully_shard_on_one_rank_equals_plain_pytorch_bit_for_bit(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's AdamW on both sides; the kernel of one process is compared with it in test_parallel_replicated."""
    monkeypatch.setattr(replicated, "compiled", lambda: None)
    options = BackendOptions(bf16=bf16, zero_stage=2, l2=0.1)
    plain = learner(Replicated(policy(), World.solo(CPU), options))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = learner(Sharded(policy(), World.solo(CPU), options))
        for step in range(3):
            batches = packs(rollouts(4, seed=step), [3, 1])
            assert sharded.update(batches).grad_norm == plain.update(batches).grad_norm
        assert max_difference(weights(sharded.backend), weights(plain.backend)) == 0.0
    finally:
        dist.destroy_process_group()


def test_sleeping_between_steps_changes_nothing_and_takes_out_the_state(runs: Path) -> None:
    """That results are the same bit for bit, the job asserts. Here: bytes, by hand from the number of parameters."""
    count = sum(parameter.numel() for parameter in policy().parameters())
    for rank in range(2):
        sizes = torch.load(runs / f"sleep{rank}.pt")
        for layout, nbytes in sizes.items():
            sharded, masters = not layout.endswith("0"), not layout.startswith("fsdp2") or layout == "fsdp20"
            state = (12 if masters else 8) * count / (2 if sharded else 1)
            assert state <= nbytes + 64 * count / 100, (layout, nbytes, state)


def test_a_sharded_scorer_equals_a_whole_one(runs: Path) -> None:
    """One whose shards lie in host memory gave the same bits, as the job asserts."""
    scores = [score for rank in torch.load(runs / "scores0.pt") for score in rank]
    whole = Scorer(critic(), World.solo(CPU)).scores(jobs.own_batches(World.solo(CPU), 0))
    assert scores == pytest.approx(whole.tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", ["solo", *jobs.KEEPERS])
def test_resumed_equals_uninterrupted_bit_for_bit(runs: Path, kind: str) -> None:
    straight = torch.load(runs / f"{kind}_uninterrupted")
    again = torch.load(runs / f"{kind}_resumed")
    assert again["metrics"] == straight["metrics"]
    assert again["draws"] == straight["draws"]
    assert again["steps"] == straight["steps"] == 4
    assert max_difference(again["weights"], straight["weights"]) == 0.0


@pytest.mark.parametrize("kind", jobs.KEEPERS)
def test_a_bfloat16_checkpoint_of_two_ranks_goes_on_in_one(runs: Path, kind: str) -> None:
    straight = torch.load(runs / f"{kind}_uninterrupted")
    model = solo(bf16=True)
    load_learner(model, runs / kind, jobs.IDENTITY)
    saved = weights(model.backend)
    reports = jobs.train(model, range(2, 4))
    for ours, theirs in zip(reports, straight["metrics"], strict=True):
        assert ours.metrics["policy/loss"] == pytest.approx(theirs["policy/loss"], abs=0.02)
    assert_nearly_as_far(saved, weights(model.backend), straight["weights"])
    assert max_difference(weights(model.backend), straight["weights"]) < 2e-3


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("layout", jobs.KEEPERS)
def test_checkpoints_go_on_in_any_layout_and_number_of_ranks(runs: Path, layout: str, size: int) -> None:
    """What was loaded is bit for bit what was saved (the job asserts it), and the next steps are the same."""
    straight = torch.load(runs / f"{layout}_straight")
    files = sorted(runs.glob(f"crossed_{size}_{layout}_*"))
    assert len(files) == 3
    for file in files:
        again = torch.load(file)
        assert again["steps"] == straight["steps"] == 5
        assert_same(again, straight, 1e-4)
