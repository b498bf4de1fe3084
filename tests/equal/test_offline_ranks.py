"""Two ranks = one process, and micro-batches = one pack, for every supervised and preference command."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.equal.offline_jobs import (
    ADAPTED,
    BALANCED,
    DEEPSPEED,
    EXPERTS,
    FEW,
    LORA,
    ON_POLICY,
    RESUMED_AFTER,
    SPLIT,
    STAGE_3,
    THREE,
    make_mistakes,
    run_all,
    run_few,
    run_more,
)
from tests.learn_tools import max_difference, run_ranks, share_apart
from tests.offline_world import DATA, make_world, train, values
from togi.obs.run_dir import read_held_out

Runs = dict[str, list[dict[str, float]]]
UNEQUAL = (
    "throughput/trained_tokens_per_second",
    "throughput/generated_tokens_per_second",
    "weights/sync_seconds",
    "tokens/shared_share",
    "tokens/padding_share",
    "tokens/rank_imbalance",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def one(world: Path) -> Runs:
    return {command: train(world, command, world / "one" / command) for command in DATA}


@pytest.fixture(scope="module")
def two(world: Path) -> Runs:
    """All commands in two gloo processes, weights and moments sharded (ZeRO stage 2)."""
    run_ranks(run_all, 2, world)
    return {command: values(world / "two" / command) for command in DATA}


@pytest.fixture(scope="module")
def more(world: Path) -> None:
    """What each pair of these ways has been shown for in ``test_combinations``, here with evaluation and every metric."""
    run_ranks(run_more, 2, world)


@pytest.mark.large
@pytest.mark.parametrize("command", STAGE_3)
def test_sharded_weights_equal_one(world: Path, one: Runs, more: None, command: str) -> None:
    """ZeRO stage 3: a scalar model, a frozen reference that is sharded too, a teacher that is not."""
    assert_equal_runs(one[command], values(world / "three" / command))


def assert_equal_runs(first: list[dict[str, float]], second: list[dict[str, float]], steps: int = 4) -> None:
    assert len(first) == len(second) == 1 + steps
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - set(UNEQUAL):
            assert a[name] == pytest.approx(b[name], rel=5e-4, abs=2e-5), name


def but_for_ties(run: list[dict[str, float]], one: list[dict[str, float]]) -> list[dict[str, float]]:
    """Up to the first step the policy and its reference are equal but for rounding: which answer is ahead means nothing."""
    tied = [{name: value for name, value in step.items() if name.endswith("accuracy")} for step in one[:2]]
    return [run[0] | tied[0], run[1] | tied[1], *run[2:]]


def assert_equal_held_out(one: Path, other: Path) -> None:
    """The worst and best held-out rows of both evaluations, each row once."""
    first, second = read_held_out(one), read_held_out(other)
    assert first.keys() == second.keys() == {0, 4}
    for a, b in zip((*first[0], *first[4]), (*second[0], *second[4]), strict=True):
        assert a.values == pytest.approx(b.values, rel=5e-4, abs=2e-5)
    assert {row.texts for row in first[4]} == {row.texts for row in second[4]}


@pytest.mark.parametrize("command", DATA)
def test_two_ranks_equal_one(world: Path, one: Runs, two: Runs, command: str) -> None:
    """Losses, norms, accuracies and held-out metrics of every step: rows are dealt, never lost or weighted anew."""
    assert_equal_runs(one[command], two[command])
    assert_equal_held_out(world / "one" / command, world / "two" / command)


@pytest.mark.parametrize("command", DATA)
def test_a_ring_of_two_equals_one(world: Path, one: Runs, two: Runs, command: str) -> None:
    """Every row is computed by both ranks and counted once: tokens, losses, norms, held-out metrics, KTO's estimate."""
    ring = values(world / "ring" / command)
    assert_equal_runs(one[command], ring)
    assert_equal_held_out(world / "one" / command, world / "ring" / command)
    for step in ring[1:]:
        assert step["tokens/padding_share"] == 0 and step["tokens/rank_imbalance"] == 1


@pytest.mark.parametrize("command", SPLIT)
def test_two_ranks_that_split_the_weights_equal_one(world: Path, one: Runs, two: Runs, command: str) -> None:
    """Under every stage; a reference is not split. What is saved is what one process saves."""
    split = values(world / "parts" / command)
    assert_equal_runs(one[command], but_for_ties(split, one[command]) if command in ("dpo", "kto") else split)
    assert_equal_held_out(world / "one" / command, world / "parts" / command)
    ours, theirs = (load_file(world / run / command / "model" / "model.safetensors") for run in ("one", "parts"))
    # Adam takes a whole step where a gradient is mere rounding: that may happen to a weight in ten thousand, and no further
    assert share_apart(ours, theirs, 1e-4) < 1e-4
    assert max_difference(ours, theirs) < 1e-3
    for step in split[1:]:
        assert step["tokens/padding_share"] == 0 and step["tokens/rank_imbalance"] == 1


@pytest.mark.large
@pytest.mark.parametrize("command", ["kto", "rm"])
def test_a_ring_on_deepspeed_equals_one(world: Path, one: Runs, more: None, command: str) -> None:
    """ZeRO stages 2 and 3."""
    assert_equal_runs(one[command], values(world / "ring_deepspeed" / command))


@pytest.mark.large
@pytest.mark.parametrize("command", ADAPTED)
def test_adapters_on_two_ranks_equal_one(world: Path, more: None, command: str) -> None:
    """The frozen base is sharded too; DPO's reference is the base inside, a reward model's head is trained whole."""
    one = train(world, command, world / "one_lora" / command, *LORA)
    assert_equal_runs(one, values(world / "lora" / command))
    if command == "dpo":
        assert_equal_runs(one, values(world / "ring_lora" / command))
    assert_equal_runs(one, values(world / "lora_deepspeed" / command))


@pytest.mark.large
@pytest.mark.parametrize("command", DEEPSPEED)
def test_deepspeed_equals_one(world: Path, one: Runs, more: None, command: str) -> None:
    """ZeRO stage 2, and stage 3 with a scalar model and with a reference; what is saved is what one process saves."""
    assert_equal_runs(one[command], values(world / "deepspeed" / command))
    ours, theirs = (load_file(world / run / command / "model" / "model.safetensors") for run in ("one", "deepspeed"))
    assert max_difference(ours, theirs) < 1e-4


@pytest.mark.large
@pytest.mark.parametrize("command", EXPERTS)
def test_experts_on_two_ranks_equal_one(world: Path, more: None, command: str) -> None:
    """With a load-balancing loss: rows one at a time on two ranks against everything in one pack."""
    model = str(world / EXPERTS[command][0])
    one = train(world, command, world / "one_experts" / command, *BALANCED, "--pretrain", model)
    plain = train(world, command, world / "unbalanced" / command, *BALANCED[2:], "--pretrain", model)
    for run in ("experts", "experts_deepspeed", "ring_experts"):
        assert_equal_runs(one, values(world / run / command), steps=3)
    assert one[1]["loss"] == plain[1]["loss"]  # it is no part of the reported loss, but of the gradient
    assert one[1]["grad_norm"] != pytest.approx(plain[1]["grad_norm"], rel=1e-3)
    assert "aux_loss" in one[1] and "aux_loss" not in plain[1]
    padded = [step["tokens/padding_share"] for step in values(world / "experts" / command)[1:]]
    assert padded[0] > 0 and padded[2] == 0  # 5 rows, then 4: two for each rank
    assert one[1]["tokens/padding_share"] == 0 and one[1]["tokens/rank_imbalance"] == 1


@pytest.mark.large
def test_a_reference_that_scores_ahead_on_two_ranks_equals_one(world: Path, one: Runs, more: None) -> None:
    """Both ranks score a part of the rows, the first one writes, and each then reads what it needs."""
    assert_equal_runs(one["dpo"], values(world / "ahead" / "dpo"))
    for run in ("ring_ahead", "parts_ahead"):
        assert_equal_runs(one["dpo"], but_for_ties(values(world / run / "dpo"), one["dpo"]))


@pytest.mark.large
def test_students_that_generate_on_two_ranks_equal_one(world: Path, more: None) -> None:
    """Each rank has an engine and answers a part of the rows; seeds belong to rows, so the responses are the same."""
    one = train(world, "kd", world / "one_own" / "kd", *ON_POLICY)
    assert [step["length/response"] > 0 for step in one[1:]] == [True] * 4
    assert_equal_runs(one, values(world / "own" / "kd"))
    assert_equal_runs(one, values(world / "ring_own" / "kd"))
    assert_equal_runs(one, values(world / "parts_own" / "kd"))


@pytest.mark.parametrize(("command", "file"), [("dpo", "model.safetensors"), ("rm", "adapter_model.safetensors")])
def test_two_ranks_resume_bit_for_bit(world: Path, two: Runs, command: str, file: str) -> None:
    """From the checkpoint of step 6 of 8, in the middle of the second epoch, with a sharded model and a reference.

    A reward model with adapters and dropout, whose random numbers must go on where they stood.
    """
    whole, part = (values(world / name / command) for name in ("whole", "part"))
    assert len(whole) == 1 + 8
    assert len(part) == 8 - RESUMED_AFTER
    for name in ("loss", "grad_norm", "lr", "reward/chosen", "tokens/seen"):
        assert [step[name] for step in part] == [step[name] for step in whole[1 + RESUMED_AFTER :]], name
    first, second = (world / name / command / "model" / file for name in ("whole", "part"))
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture(scope="module")
def few(world: Path) -> None:
    run_ranks(run_few, 4, world)


@pytest.mark.large
@pytest.mark.parametrize("command", FEW)
def test_ranks_without_any_row_equal_one(world: Path, few: None, command: str) -> None:
    one = train(world, command, world / "one_few" / command, *THREE)
    assert_equal_runs(one, values(world / "few" / command), steps=5)


@pytest.mark.large
@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_teams_without_any_row_equal_one(world: Path, few: None, command: str) -> None:
    """One row a step: in every step one of two teams has none."""
    one = train(world, command, world / "one_row" / command, "--train_batch_size", "1")
    other = values(world / "few_teams" / command)
    assert_equal_runs(one, but_for_ties(other, one) if command == "dpo" else other, steps=14)


@pytest.mark.parametrize("command", DATA)
def test_micro_batches_equal_one_pack(world: Path, one: Runs, command: str) -> None:
    """One row at a time, without packing, against everything in one pack."""
    assert_equal_runs(one[command], train(world, command, world / "split" / command, "--no_packing_samples"))


def test_a_mistake_ends_all_ranks_and_is_said_once(world: Path) -> None:
    run_ranks(make_mistakes, 2, world)
    said = {name: [(world / f"{name}_{rank}").read_text() for rank in (0, 1)] for name in ("bad", "own", "folder")}
    assert said["bad"][0].startswith("Line 1 of ") and said["bad"][1] == "2"  # the exit status
    assert said["own"][0] == said["own"][1]
    assert said["own"][0].startswith("The process of rank 1 has read other rows than that of rank 0: ")
    assert said["folder"][0].startswith("--run_dir ") and said["folder"][1] == "2"
