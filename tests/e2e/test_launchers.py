"""Commands as the field writes them, through each launcher, with a tiny model and rows in the place of the real ones."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.learn_tools import max_difference
from tests.offline_world import ROOT, values, write
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.busy

ROWS = 12
SFT = """
  --max_len 4096 --dataset sft.jsonl --input_key question --output_key response
  --input_template 'User: {}\nAssistant: ' --train_batch_size 256 --micro_train_batch_size 2 --max_samples 500000
  --pretrain model --save_path ./checkpoint/llama3-8b-sft --save_steps -1 --logging_steps 1 --eval_steps -1
  --zero_stage 2 --max_epochs 1 --packing_samples --bf16 --flash_attn --learning_rate 5e-6 --gradient_checkpointing
  --use_wandb TOKEN
"""
RM = """
  --save_path ./checkpoint/llama3-8b-rm --save_steps -1 --logging_steps 1 --eval_steps -1
  --train_batch_size 256 --micro_train_batch_size 1 --pretrain model --bf16 --max_epochs 1 --max_len 8192
  --zero_stage 3 --learning_rate 9e-6 --dataset pairs.jsonl --apply_chat_template
  --chosen_key chosen --rejected_key rejected --flash_attn --packing_samples --gradient_checkpointing --use_wandb TOKEN
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model", max_position_embeddings=8192)
    write(folder / "sft.jsonl", [{"question": f"what is {i}?", "response": "x" * (1 + i % 5)} for i in range(ROWS)])
    write(folder / "pairs.jsonl", [{"chosen": chat(i, "a"), "rejected": chat(i, "b")} for i in range(ROWS)])
    return folder


def chat(i: int, letter: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": letter * 3}]


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def launch(world: Path, run: Path, launcher: str, module: str, flags: str) -> tuple[list[dict[str, float]], str]:
    """Start a command in ``run`` like a user; returns the metrics of each step and what was said."""
    run.mkdir()
    for file in world.iterdir():
        (run / file.name).symlink_to(file)
    name, *more = launcher.split()
    port = ["--master_port", free_port()] if name in ("deepspeed", "torchrun") else []
    words = [str(Path(sys.executable).parent / name), *port, *more, module, *shlex.split(flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    (folder,) = (run / "runs").iterdir()
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert list(folder.glob("wandb/offline-run-*")), "no W&B run"
    assert "--flash_attn: there is no CUDA device here" in done.stdout
    return values(folder), done.stdout


def assert_equal(first: list[dict[str, float]], second: list[dict[str, float]]) -> None:
    assert len(first) == len(second) == 1  # twelve rows are one batch
    for name in ("loss", "grad_norm", "lr", "tokens/seen"):
        assert first[0][name] == pytest.approx(second[0][name], rel=1e-4), name


def test_supervised_fine_tuning(world: Path, tmp_path: Path) -> None:
    """Two processes of DeepSpeed's launcher, which adds --local_rank, as one of torchrun's and a plain one."""
    module, runs = "togi.cli.train_sft", {}
    for launcher in ("deepspeed --num_gpus 2 --module", "torchrun -m"):
        name = launcher.split()[0]
        runs[name], said = launch(world, tmp_path / name, launcher, module, SFT)
        assert said.count("run folder:") == 1, "not only the first rank speaks"
    assert_equal(runs["deepspeed"], runs["torchrun"])
    models = [load_file(tmp_path / name / "checkpoint/llama3-8b-sft/model.safetensors") for name in runs]
    assert max_difference(*models) < 1e-5


@pytest.mark.large
def test_reward_model(world: Path, tmp_path: Path) -> None:
    """With DeepSpeed's launcher and its ZeRO stage 3 in one process, and as a plain one."""
    module = "togi.cli.train_rm"
    launched, _ = launch(world, tmp_path / "deepspeed", "deepspeed --module", module, RM + "--backend deepspeed")
    plain, _ = launch(world, tmp_path / "plain", "python -m", module, RM)
    assert_equal(launched, plain)
    folders = [tmp_path / name / "checkpoint/llama3-8b-rm" for name in ("deepspeed", "plain")]
    assert max_difference(*(load_file(folder / "model.safetensors") for folder in folders)) < 1e-5
    model = AutoModelForSequenceClassification.from_pretrained(folders[0], num_labels=1)
    assert model.config.std > 0
