"""A mixture of experts through every command, with its load-balancing loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.offline_world import DATA, flags, make_world, train
from togi.cli.main import main


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("command", DATA)
def test_every_command_balances_its_experts(world: Path, tmp_path: Path, command: str) -> None:
    """With a large weight the loss falls towards 2, the experts that a token uses, where all are used alike."""
    settings = ["--pretrain", str(world / "qwen3_moe"), "--aux_loss_coef", "20", "--max_epochs", "3"]
    settings += ["--learning_rate", "1e-3"]
    steps = train(world, command, tmp_path / "run", *settings)
    losses = [values["aux_loss"] for values in steps[1:]]
    assert sum(losses[-4:]) / 4 < losses[0] - 0.02
    assert "aux_loss" in (tmp_path / "run" / "report.html").read_text()


def test_adapters_beside_frozen_experts_are_balanced_too(world: Path, tmp_path: Path) -> None:
    lora = ["--lora_rank", "4", "--aux_loss_coef", "20", "--max_epochs", "3"]
    steps = train(world, "sft", tmp_path / "run", "--pretrain", str(world / "mixtral"), *lora)
    assert steps[-1]["aux_loss"] < steps[1]["aux_loss"] - 0.05


def test_the_final_model_is_a_plain_mixture(world: Path, tmp_path: Path) -> None:
    train(world, "sft", tmp_path / "run", "--pretrain", str(world / "mixtral"), "--aux_loss_coef", "0.1")
    folder = tmp_path / "run" / "model"
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "mixtral"
    assert json.loads((folder / "config.json").read_text())["output_router_logits"] is False


def test_a_model_without_experts_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        ([], "--aux_loss_coef balances the experts of a mixture (mixtral, qwen3_moe), but --pretrain"),
        (
            [
                "--pretrain",
                str(world / "mixtral"),
                "--gradient_checkpointing",
                "--gradient_checkpointing_use_reentrant",
            ],
            "--aux_loss_coef has no gradient with --gradient_checkpointing_use_reentrant: leave the second out.",
        ),
        (["--aux_loss_coef", "-1"], "--aux_loss_coef -1: must be at least 0."),
    ]
    for change, sentence in cases:
        words = flags(world, "sft", tmp_path / "run", "--aux_loss_coef", "0.1", *change)
        assert main(["sft", *words]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
