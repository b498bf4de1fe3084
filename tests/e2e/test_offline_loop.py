"""What an offline run writes on its way: checkpoints and their pruning, trackers, time left; and that it repeats."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from tests.offline_world import flags, make_world, train
from togi.cli.main import main


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(["--max_ckpt_num", "2"], ["step_00000003", "step_00000004"]), (["--max_ckpt_mem", "1e-9"], ["step_00000004"])],
)
def test_checkpoints_are_written_and_pruned(world: Path, tmp_path: Path, limit: list[str], kept: list[str]) -> None:
    """14 rows in batches of 4 are four steps."""
    train(world, "kto", tmp_path / "run", "--save_steps", "1", *limit, evaluate=False)
    assert names(tmp_path / "run" / "checkpoints") == ["latest", *kept]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000004"
    assert "learner.json" in names(tmp_path / "run" / "checkpoints" / "step_00000004")


def test_model_folders_alone(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--disable_ds_ckpt leaves what --pretrain takes, and says so when a resume is tried."""
    run, only_model = tmp_path / "run", ["--save_steps", "3", "--save_hf_ckpt", "--disable_ds_ckpt"]
    train(world, "dpo", run, *only_model, evaluate=False)
    folder = run / "checkpoints" / "step_00000003"
    assert names(folder) == ["hf", "manifest.json", "state.json"]
    assert main(["dpo", *flags(world, "dpo", run, *only_model, "--load_checkpoint")]) == 2
    assert "was written with --disable_ds_ckpt and cannot be resumed" in capsys.readouterr().err
    again = train(world, "dpo", tmp_path / "again", "--pretrain", str(folder / "hf"), "--learning_rate", "0")
    assert again[0]["eval/accuracy"] >= 0


def test_a_deterministic_run_repeats_bit_for_bit(world: Path, tmp_path: Path) -> None:
    lora = ["--full_determinism", "--lora_rank", "4", "--lora_dropout", "0.2"]
    try:
        runs = [train(world, "rm", tmp_path / name, *lora) for name in ("one", "two")]
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*runs, strict=True):
        assert [a[name] for name in a if "throughput" not in name] == [
            b[name] for name in b if "throughput" not in name
        ]
    first, second = ((tmp_path / name / "model" / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second


def test_trackers_get_every_second_step_and_every_evaluation(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", ["togi"])
    board, run = tmp_path / "board", tmp_path / "run"
    told = ["--use_tensorboard", str(board), "--use_wandb", "offline", "--logging_steps", "2", "--eval_steps", "3"]
    steps = train(world, "sft", run, *told)
    (file,) = (path for path in board.rglob("*") if path.is_file())
    seen = {
        (event.step, value.tag): value.simple_value or value.tensor.float_val[0]
        for event in loader.EventFileLoader(str(file)).Load()
        for value in event.summary.value
    }
    losses = {step: value for (step, tag), value in seen.items() if tag == "train/loss"}
    assert losses == pytest.approx({step: steps[step]["loss"] for step in (2, 3, 4)})  # 3 has an evaluation
    held_out = {step: value for (step, tag), value in seen.items() if tag == "eval/loss"}
    assert held_out == pytest.approx({step: steps[step]["eval/loss"] for step in (0, 3, 4)})
    (stored,) = run.rglob("*.wandb")
    content = stored.read_bytes()
    for name in (b"eval/loss", b"perplexity", b"tokens/rank_imbalance", b"learning_rate"):
        assert name in content, name
    told = capsys.readouterr().err
    assert "step 1/4 | loss" in told and "to go" in told
