"""Estimators and losses of the user's own in whole runs: what is stored is what the functions say, from files and from Python."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests import warm
from tests.example_scripts import run_script
from tests.offline_world import ROOT, values, write
from tests.tiny import save_tiny_model

HOOKS = ROOT / "examples" / "hooks"
EXAMPLES = ("rl_own_loss.sh",)
TINY = "--no_bf16 --rollout_engine transformers --no_enforce_eager --max_steps 2 --rollout_batch_size 2 --train_batch_size 8 "
TINY += "--n_samples_per_prompt 4 --prompt_max_len 64 --generate_max_len 8 --max_tokens_per_gpu 256 --actor_learning_rate 1e-2"
REWARD = (
    "def reward_func(queries, prompts, labels, responses):\n    return [len(response) / 10 for response in responses]\n"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    write(folder / "prompts.jsonl", [{"prompt": f"what is {i} + 1?", "answer": str(i + 1)} for i in range(8)])
    (folder / "reward.py").write_text(REWARD)
    return folder


def places(world: Path, out: Path) -> dict[str, Path]:
    return {"MODEL": world / "model", "DATA": world / "prompts.jsonl", "REWARD": world / "reward.py", "OUT": out}


def check_median(run: Path, samples: int) -> None:
    """Every stored advantage is the reward less the (lower) median of its prompt."""
    for path in sorted((run / "rollouts").glob("*train*")) or sorted((run / "rollouts").rglob("*.parquet")):
        groups: dict[str, list[tuple[float, list[float]]]] = defaultdict(list)
        for row in pq.read_table(path).to_pylist():
            groups[row["group_id"]].append((row["reward"], row["advantages"]))
        assert groups and all(len(rows) == samples for rows in groups.values())
        for rows in groups.values():
            middle = statistics.median_low([reward for reward, _ in rows])
            for reward, advantages in rows:
                assert advantages == pytest.approx([reward - middle] * len(advantages), abs=1e-6)


@pytest.mark.parametrize("name", EXAMPLES)
def test_from_files(name: str, world: Path, tmp_path: Path) -> None:
    run_script(name, *TINY.split(), **places(world, tmp_path / "run"))
    check_median(tmp_path / "run", 4)
    assert values(tmp_path / "run")[-1]["policy/ratio_max"] > 1  # the loss was used for more than one update


def test_from_python(world: Path, tmp_path: Path) -> None:
    places_of = {name: str(path) for name, path in places(world, tmp_path / "out").items()}
    environment = os.environ | places_of | {"PYTHONPATH": str(ROOT), "STEPS": "2"}
    done = subprocess.run([sys.executable, HOOKS / "train.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"model: {tmp_path / 'out' / 'model'}\n")
    check_median(tmp_path / "out", 4)


def test_a_function_that_cannot_be_right_stops_before_anything_starts(world: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def mean(logprobs_K, advantages_K):\n    return -(logprobs_K * advantages_K).mean()\n"
    )
    flags = [
        *("rl", "--pretrain", world / "model", "--prompt_data", world / "prompts.jsonl", "--input_key", "prompt"),
        *("--reward_func", world / "reward.py", "--rollout_engine", "transformers", "--init_kl_coef", "0"),
        *("--advantage_estimator", "group_norm", "--n_samples_per_prompt", "4", "--rollout_batch_size", "2"),
        *("--prompt_max_len", "64", "--generate_max_len", "8"),
        *(
            "--train_batch_size",
            "8",
            "--policy_loss_type",
            f"{tmp_path / 'own.py'}:mean",
            "--run_dir",
            tmp_path / "run",
        ),
    ]
    done = warm.run([sys.executable, "-m", "togi", *flags])
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert "own.py:mean returned a tensor of shape () for 5 tokens" in done.stderr
