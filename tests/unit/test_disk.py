"""What a run will write: by hand, and against the files of a run that was."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from tests import rl_world
from tests.offline_world import flags, make_world, train
from togi.cli.main import main
from togi.config.rl import RLConfig
from togi.config.shared import LoRA
from togi.errors import CheckpointError
from togi.learn.checkpoint import size
from togi.methods.rm import RM
from togi.methods.sft import SFT
from togi.model.checkpoint import Sizes, sizes
from togi.run.keep import Writing, check_room, offline_writing, rl_writing, size_of

Usage = namedtuple("Usage", "total used free")


def of(path: str, scalar: bool) -> Sizes:
    """A policy of 100 weights, a critic of 90."""
    return Sizes(90, 90, 10, 1, 10, False) if scalar else Sizes(100, 100, 10, 1, 10, False)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # without checkpoints: the model in float32, or in bfloat16
        ({}, Writing(1200, 0, 0, 0, 400)),
        ({"bf16": True}, Writing(1200, 0, 0, 0, 200)),
        # 10 steps: every 4th is two checkpoints; every 2nd is five, of which three are kept while a fourth is written
        ({"save_steps": 4}, Writing(1200, 0, 2, 0, 400)),
        ({"save_steps": 2, "save_hf_ckpt": True}, Writing(1200, 400, 4, 0, 400)),
        ({"save_steps": 2, "save_hf_ckpt": True, "disable_ds_ckpt": True}, Writing(0, 400, 4, 0, 400)),
        # two checkpoints of 1200 bytes fit into 3e-6 GB
        ({"save_steps": 2, "max_ckpt_mem": 3e-6}, Writing(1200, 0, 3, 0, 400)),
        ({"best_metric_key": "eval/loss"}, Writing(1200, 0, 0, 400, 400)),
    ],
)
def test_what_a_run_on_fixed_data_writes(settings: dict[str, Any], expected: Writing) -> None:
    assert offline_writing(SFT(**settings), 10, of) == expected


def test_a_reward_model_is_written_with_its_head() -> None:
    assert offline_writing(RM(), 10, of) == Writing(12 * 90, 0, 0, 0, 4 * 90)


def test_an_rl_run_also_writes_critic_and_average() -> None:
    """Actor 12 x 100, critic 12 x 90, the average 4 x 100; at the end both models of the actor and the critic."""
    group = RLConfig(advantage_estimator="group_norm")
    assert rl_writing(group, 10, of) == Writing(1200, 0, 0, 0, 400)
    ppo = RLConfig(enable_ema=True, save_value_network=True)
    assert rl_writing(ppo, 10, of) == Writing(1200 + 1080 + 400, 0, 0, 0, 400 + 400 + 360)


def test_a_full_disk_is_found_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 checkpoints and a model are 5200 bytes; with 5% in reserve 5460 are enough and 5459 are not."""
    config = SFT(ckpt_path=str(tmp_path / "a" / "b"), save_path=str(tmp_path / "c"))
    writing = Writing(1200, 0, 4, 0, 400)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 0, 5460))
    line = "4 x 1.2 kB checkpoints (1.2 kB masters and moments) + 400 B final model"
    assert check_room(config, writing) == f"{line}; 5.46 kB free in {tmp_path}"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 0, 5459))
    with pytest.raises(CheckpointError) as error:
        check_room(config, writing)
    assert str(error.value) == (
        f"The run would write 5.2 kB to {tmp_path} ({line}), where 5.46 kB are free: make room, choose another --ckpt_path or "
        "--save_path, or keep fewer checkpoints with --max_ckpt_num."
    )
    (tmp_path / "a" / "b" / "step_00000001").mkdir(parents=True)
    (tmp_path / "a" / "b" / "step_00000001" / "tensors").write_bytes(b"x" * 1200)
    check_room(config, writing)  # an old checkpoint is removed for a new one


@pytest.mark.parametrize("command", ["sft", "rl"])
def test_a_run_looks_at_the_disk_before_it_makes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    if command == "sft":
        words = flags(make_world(tmp_path / "world"), command, tmp_path / "run", evaluate=False)
    else:
        _, _, _, *words = rl_world.command(rl_world.make_rl_world(tmp_path / "world"), tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 0, 5))
    assert main([command, *words]) == 2
    assert "The run would write " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lora", ["", "--lora_rank 2"])
def test_what_is_written_is_what_was_foretold(tmp_path: Path, lora: str) -> None:
    """Beside tensors the files have only headers and records."""
    world = make_world(tmp_path / "world")
    train(world, "sft", tmp_path / "run", "--save_steps", "4", "--save_hf_ckpt", *lora.split(), evaluate=False)
    config = SFT(pretrain=str(world / "model"), lora_rank=2 if lora else 0)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    state = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    model = sum(file.stat().st_size for file in (checkpoint / "hf").glob("*.safetensors"))
    foretold = size_of(config)(config.pretrain, False)
    assert 0 <= state - foretold.state_bytes < 20_000
    assert 0 <= model - foretold.folder_bytes(bf16=False) < 10_000


def test_sizes_by_hand(tmp_path: Path) -> None:
    """Two layers of width 64 with 4 heads of 32, 2 for keys and values, MLP of 96, vocabulary 300, head not tied."""
    world = make_world(tmp_path / "world")
    layer = 64 * 128 * 2 + 64 * 64 * 2 + 3 * 64 * 96 + 2 * 64
    whole = 2 * 300 * 64 + 2 * layer + 64
    assert sizes(str(world / "model")) == Sizes(whole, whole, 300, 2, 64, False)
    assert sizes(str(world / "model"), scalar=True).weights == whole - 300 * 64 + 64
    lora = LoRA(2, 16, 0.0, ("q_proj",), False)
    assert sizes(str(world / "model"), lora=lora) == Sizes(whole, 2 * 2 * (64 + 128), 300, 2, 64, True)


@pytest.mark.parametrize(("nbytes", "words"), [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (5 * 10**12, "5 TB")])
def test_sizes_in_words(nbytes: int, words: str) -> None:
    assert size(nbytes) == words
