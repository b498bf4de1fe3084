"""Two and four processes, ragged and sharded, against one; and resuming in fresh processes, bit for bit."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.equal import parallel_jobs as jobs
from tests.learn_tools import CPU, critic, learner, max_difference, packs, policy, rollouts, run_ranks, solo, weights
from togi.learn.learner_state import load_learner
from togi.learn.scorer import Scorer
from togi.parallel.backend import BackendOptions
from togi.parallel.fsdp2 import Sharded
from togi.parallel.process import World
from togi.parallel.replicated import Replicated


@pytest.fixture(scope="module")
def alone() -> dict[str, object]:
    model = jobs.double_learner(World.solo(CPU), 0)
    return jobs.record(jobs.train(model, range(jobs.STEPS)), weights(model.backend))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    run_ranks(jobs.stages, 2, folder)
    return folder


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    run_ranks(jobs.begin, 2, folder)
    run_ranks(jobs.resume, 2, folder)
    return folder


def assert_same(result: dict[str, object], reference: dict[str, object]) -> None:
    for step, (ours, theirs) in enumerate(zip(result["metrics"], reference["metrics"], strict=True)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-9, abs=1e-12), (step, name)
    assert max_difference(result["weights"], reference["weights"]) < 1e-9


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ragged_ranks_equal_one_process(pair: Path, alone: dict[str, object], stage: int) -> None:
    for rank in (0, 1):
        assert_same(torch.load(pair / f"stage{stage}_rank{rank}.pt"), alone)


def test_what_ranks_compute_to_keep_in_step_is_counted(pair: Path, alone: dict[str, object]) -> None:
    """By hand from the plan of the ranks' batches; a dummy has two positions."""
    assert alone["loads"] == [(0.0, 1.0)] * jobs.STEPS
    for step, (padding, imbalance) in enumerate(torch.load(pair / "stage2_rank1.pt")["loads"]):
        lengths = [len(sample.tokens) for sample in rollouts(6, seed=step)]
        first = sum(jobs.PLANS[2][step][0])  # the first rank's samples
        dummies = [2, 1, 2, 2, 0][step]  # [3, 1], [1, 0], [0, 2], [2, 4] and [1, 1] batches
        assert padding == pytest.approx(2 * dummies / (sum(lengths) + 2 * dummies))
        assert imbalance == pytest.approx(max(sum(lengths[:first]), sum(lengths[first:])) / (sum(lengths) / 2))


def test_four_ragged_ranks_equal_one_process(tmp_path: Path, alone: dict[str, object]) -> None:
    run_ranks(jobs.four, 4, tmp_path)
    for rank in range(4):
        assert_same(torch.load(tmp_path / f"four{rank}.pt"), alone)


@pytest.mark.parametrize("bf16", [False, True])
def test_fully_shard_on_one_rank_equals_plain_pytorch_bit_for_bit(bf16: bool) -> None:
    options = BackendOptions(bf16=bf16, zero_stage=2, weight_decay=0.1)
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


def test_a_sharded_scorer_equals_a_whole_one(pair: Path) -> None:
    """One whose shards lie in host memory gave the same bits, as the job asserts."""
    scores = [score for rank in torch.load(pair / "scores0.pt") for score in rank]
    whole = Scorer(critic(), World.solo(CPU)).scores(jobs.own_batches(World.solo(CPU), 0))
    assert scores == pytest.approx(whole.tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", ["solo", "pair"])
def test_resumed_equals_uninterrupted_bit_for_bit(resumed: Path, kind: str) -> None:
    straight = torch.load(resumed / f"{kind}_uninterrupted")
    again = torch.load(resumed / f"{kind}_resumed")
    assert again["metrics"] == straight["metrics"]
    assert again["draws"] == straight["draws"]
    assert again["steps"] == straight["steps"] == 4
    assert max_difference(again["weights"], straight["weights"]) == 0.0


def test_a_checkpoint_of_two_ranks_goes_on_in_one(resumed: Path) -> None:
    straight = torch.load(resumed / "pair_uninterrupted")
    model = solo(bf16=True)
    load_learner(model, resumed / "pair", jobs.IDENTITY)
    reports = jobs.train(model, range(2, 4))
    for ours, theirs in zip(reports, straight["metrics"], strict=True):
        assert ours.metrics["policy/loss"] == pytest.approx(theirs["policy/loss"], abs=0.02)
    # bfloat16 rounds differently in other packs, and Adam makes full steps of small gradients: at most two steps apart.
    assert max_difference(weights(model.backend), straight["weights"]) < 2e-3
