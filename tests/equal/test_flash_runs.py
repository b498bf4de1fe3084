"""Whole runs with FlashAttention, its operators in plain torch: the same numbers as without it, from the flags to the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests import rl_world
from tests.flash_stand_in import flash_on_cpu
from tests.offline_world import make_world, train, values
from togi.cli.main import main


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def assert_equal(ours: list[dict[str, float]], theirs: list[dict[str, float]], names: set[str]) -> None:
    assert len(ours) == len(theirs) > 1
    assert names <= {name for step in theirs for name in step}
    for one, other in zip(ours, theirs, strict=True):
        for name in names & set(other):
            assert one[name] == pytest.approx(other[name], rel=2e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("command", "more", "causal"),
    [
        ("sft", "", {True, False}),
        ("dpo", "", {True, False}),
        ("kd", "", {True, False}),
        ("rm", "--gradient_checkpointing", {True, False}),
    ],
)
def test_fixed_data(world: Path, tmp_path: Path, command: str, more: str, causal: set[bool]) -> None:
    """Rows share how they begin: their continuations attend to it in a call of its own, which is not causal."""
    with flash_on_cpu() as calls:
        ours = train(world, command, tmp_path / "flash", *more.split())
    assert {is_causal for _, is_causal, _, _ in calls} == causal
    assert {way for way, *_ in calls} == {"forward", "backward"}
    with flash_on_cpu() as calls:
        theirs = train(world, command, tmp_path / "sdpa", "--no_flash_attn", *more.split())
    assert calls == []
    assert_equal(ours, theirs, {"loss", "grad_norm", "eval/loss"})


def test_reinforcement_learning(tmp_path: Path) -> None:
    """GRPO with a reference: the actor and the reference score and train groups that share a prompt."""
    torch.set_num_threads(1)
    folder = rl_world.make_rl_world(tmp_path)
    more = [
        "--workers",
        "local",
        "--rollout_engine",
        "transformers",
        "--advantage_estimator",
        "group_norm",
        "--full_determinism",
    ]
    found: Mapping[str, list[dict[str, float]]] = {"flash": [], "sdpa": []}
    for name, flag in (("flash", "--flash_attn"), ("sdpa", "--no_flash_attn")):
        words = rl_world.command(folder, tmp_path / name, *more, flag)[3:]
        with flash_on_cpu() as calls:
            assert main(["rl", *words]) == 0
        assert ({is_causal for _, is_causal, _, _ in calls} == {True, False}) is (name == "flash")
        found[name].extend(values(tmp_path / name))
    assert_equal(found["flash"], found["sdpa"], {"policy/loss", "policy/grad_norm", "reward/mean"})
