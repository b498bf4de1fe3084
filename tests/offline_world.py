"""A folder with tiny models and rows of every kind, and ways to run a command on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests import warm
from tests.tiny import save_tiny_model
from togi.cli import commands
from togi.cli.main import main
from togi.config.architectures import MIXTURES
from togi.methods import METHODS

ROOT = Path(__file__).parents[1]
LETTERS = "abcdefghijklmnop"


def make_world(folder: Path) -> Path:
    """Four models, the first of which can be split in two, and ``<kind>.jsonl`` of 14 rows with ``<kind>_eval.jsonl`` of 5 for
    each kind of row.
    """
    save_tiny_model(folder / "model", seed=0, num_attention_heads=4, num_key_value_heads=2)
    save_tiny_model(folder / "teacher", seed=1)
    for experts in MIXTURES:
        save_tiny_model(folder / experts, experts, seed=2)
    kinds = {"sft": answer, "pairs": pair, "kto": verdict, "steps": steps}
    for kind, row in kinds.items():
        write(folder / f"{kind}.jsonl", [row(i) for i in range(14)])
        write(folder / f"{kind}_eval.jsonl", [row(i) for i in range(14, 19)])
    return folder


def answer(i: int) -> dict[str, Any]:
    return {"q": f"say {LETTERS[i % 16]} {i}", "a": "yes " * (1 + i % 3) + "end"}


def pair(i: int) -> dict[str, Any]:
    answers = {"chosen": f"good {i}" + "!" * (i % 3), "rejected": "bad" + "." * (i % 4)}
    return {"q": f"number {i}?", **answers, "margin": i / 10}


def verdict(i: int) -> dict[str, Any]:
    return {"q": f"number {i}?", "a": f"good {i}" if i % 2 else "bad" + "." * (i % 4), "label": i % 2}


def steps(i: int) -> dict[str, Any]:
    count = 1 + i % 3
    return {
        "text": " ".join(f"step {i}{j} #" for j in range(count)),
        "label": ["+-"[j % 2] for j in range(count)],
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


DATA = {
    "sft": ("sft", "--input_key q --output_key a"),
    "kd": ("sft", "--input_key q --output_key a"),
    "rm": ("pairs", "--prompt_key q"),
    "dpo": ("pairs", "--prompt_key q"),
    "simpo": ("pairs", "--prompt_key q"),
    "orpo": ("pairs", "--prompt_key q"),
    "kto": ("kto", "--input_key q --output_key a"),
    "prm": ("steps", "--input_key text --placeholder_token # --reward_tokens + -"),
}


def flags(world: Path, command: str, run: Path, *more: str, evaluate: bool = True) -> list[str]:
    """A complete tiny command, without the name of the command; ``more`` wins."""
    kind, keys = DATA[command]
    words = ["--pretrain", world / "model", "--dataset", world / f"{kind}.jsonl", *keys.split()]
    words += ["--run_dir", run, "--save_path", run / "model", "--ckpt_path", run / "checkpoints", "--max_len", "96"]
    words += ["--train_batch_size", "4", "--max_epochs", "1", "--learning_rate", "3e-3", "--lr_scheduler", "constant"]
    if evaluate:
        words += ["--eval_dataset", world / f"{kind}_eval.jsonl", "--eval_at_start"]
    if command == "kd":
        words += ["--teacher_model", world / "teacher"]
    return [str(word) for word in (*words, *more)]


def train(world: Path, command: str, run: Path, *more: str, evaluate: bool = True) -> list[dict[str, float]]:
    """Run in this process, on one thread; returns the values of each step."""
    torch.set_num_threads(1)
    assert main([command, *flags(world, command, run, *more, evaluate=evaluate)]) == 0
    return values(run)


def module(command: str) -> str:
    """What ``python -m`` starts: the established name where there is one."""
    established = ROOT / "togi" / "cli" / f"train_{command}.py"
    return f"togi.cli.train_{command}" if established.is_file() else f"togi {command}"


def launch(world: Path, command: str, run: Path, ranks: int, *more: str) -> list[dict[str, float]]:
    """Run under torchrun."""
    launcher = [sys.executable, *f"-m torch.distributed.run --nproc_per_node {ranks} --standalone".split()]
    return run_ranked([*launcher, "-m", *module(command).split()], world, command, run, *more)


def launch_warm(world: Path, command: str, run: Path, ranks: int, *more: str) -> list[dict[str, float]]:
    """Run under what stands for torchrun, whose processes are forked."""
    launcher = [warm.torchrun(), "--standalone", "--nproc_per_node", str(ranks), "-m", "togi", command]
    return run_ranked(launcher, world, command, run, *more)


def run_ranked(
    launcher: Sequence[str | Path], world: Path, command: str, run: Path, *more: str
) -> list[dict[str, float]]:
    """The values of each step of a run that ``launcher`` starts."""
    words = [*launcher, *flags(world, command, run, *more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return values(run)


def values(run: Path) -> list[dict[str, float]]:
    return [json.loads(line)["values"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def call(module: str, argv: Sequence[str]) -> None:
    """A command in this process, named by the module that a launcher would start. Raises UserError."""
    command = module.rpartition(".train_")[2]
    if command in METHODS:
        commands.offline(command, argv)
    else:
        assert module == "togi.cli.batch_inference"
        commands.infer(argv)
