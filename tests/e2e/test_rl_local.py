"""A run in one process: no Ray, the same numbers as under Ray bit for bit, checkpoints for both, a running event loop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.rl_world import GRPO, HF, ROOT, command, has_steps, metrics, model_bytes, train
from tests.tiny import tiny_config

pytestmark = pytest.mark.busy

MEASURED = ("time/", "throughput/", "weights/", "memory/", "peak_memory/", "released_memory/")
VLLM = ["--vllm_cpu_kv_cache_gb", "0.1"]
# Two updates of each of two rollouts, so that the engine gets what the first ones have led to.
STEPS = ["--full_determinism", "--max_steps", "2", "--train_batch_size", "8"]
IN_PROCESS = """
import asyncio, sys
import togi

async def notebook():
    return togi.rl(**settings)

def reward(queries, prompts, labels):
    return [len(query) % 7 / 7 for query in queries]

settings = {settings!r} | {{"reward": reward}}
result = asyncio.run(notebook())
assert result.rollouts == 2
assert "ray" not in sys.modules, "a local run imports Ray"
"""


def values(run: Path) -> list[dict[str, float]]:
    """What is measured of each step but time and memory."""
    kept = [record["values"] for record in metrics(run)]
    return [{name: step[name] for name in step if not name.startswith(MEASURED)} for step in kept]


@pytest.fixture(scope="module")
def scalar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("scalar")
    AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1, pad_token_id=0)).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_local_workers_equal_ray_bit_for_bit(world: Path, tmp_path: Path, scalar: Path, engine: str) -> None:
    """Actor, critic, reference and a reward model in one process have the numbers that each has alone, in both data types."""
    flags = [
        *STEPS,
        "--rollout_engine",
        engine,
        *VLLM,
        "--reward_pretrain",
        str(scalar),
        "--critic_learning_rate",
        "1e-3",
    ]
    flags += ["--bf16"] if engine == "vllm" else ["--no_bf16"]
    runs = {kind: tmp_path / kind for kind in ("local", "ray")}
    for kind, run in runs.items():
        done = train(world, run, *flags, "--save_value_network", "--workers", kind)
        unit = "workers in this process" if kind == "local" else "worker processes"
        assert f"placement: engine 1 + actor 1 + critic 1 + ref 1 + reward 1 = 5 {unit}" in done.stdout
    for ours, theirs in zip(values(runs["local"]), values(runs["ray"]), strict=True):
        # The last bits of vLLM's log-probs depend on which requests share a step, and these metrics alone read them.
        of_vllm = {name for name in ours if engine == "vllm" and name.startswith("mismatch/")}
        assert {name: ours[name] for name in of_vllm} == pytest.approx(
            {name: theirs[name] for name in of_vllm}, abs=1e-4
        )
        assert {**ours, **dict.fromkeys(of_vllm, 0)} == {**theirs, **dict.fromkeys(of_vllm, 0)}
    for model in ("model", "model_critic"):
        assert model_bytes(runs["local"] / model) == model_bytes(runs["ray"] / model)


@pytest.mark.large
def test_a_run_goes_on_with_other_workers(world: Path, tmp_path: Path) -> None:
    """The checkpoint of either kind is that of the other: local, Ray and local again end where a local run ends."""
    flags = [*GRPO, *HF, *STEPS[:1], "--rollout_batch_size", "2", "--train_batch_size", "8", "--save_steps", "1"]
    flags += ["--max_steps", "3"]
    whole, mixed = tmp_path / "whole", tmp_path / "mixed"
    train(world, whole, *flags, "--workers", "local")
    shutil.copytree(whole, mixed)
    for step, kind in ((1, "ray"), (2, "local")):  # each goes on from the checkpoint that the one before has written
        for later in range(step + 1, 4):
            shutil.rmtree(mixed / "checkpoints" / f"step_{later:08d}")
        train(world, mixed, *flags, "--load_checkpoint", "--workers", kind)
    assert model_bytes(whole / "model") == model_bytes(mixed / "model")
    assert values(whole) == values(mixed)


def test_a_run_inside_an_event_loop_imports_no_ray(world: Path, tmp_path: Path) -> None:
    """In a fresh process, as in a notebook, with the Transformers engine."""
    settings = {
        "pretrain": str(world / "model"),
        "prompt_data": str(world / "prompts.jsonl"),
        "input_key": "prompt",
        "run_dir": str(tmp_path / "run"),
        "save_path": str(tmp_path / "model"),
        "rollout_engine": "transformers",
        "advantage_estimator": "group_norm",
        "init_kl_coef": 0,
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 2,
        "train_batch_size": 8,
        "prompt_max_len": 64,
        "generate_max_len": 8,
        "max_steps": 2,
    }
    script = tmp_path / "notebook.py"
    script.write_text(IN_PROCESS.format(settings=settings))
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_interrupt_ends_a_local_run_in_order(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = command(world, run, *GRPO, *HF, "--num_episodes", "1000", "--workers", "local")
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job and its children ignore it
    try:
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 200
    while not has_steps(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--actor_num_gpus_per_node", "2"], "--actor_num_gpus_per_node 2"),
        (["--vllm_num_engines", "2"], "--vllm_num_engines 2"),
        (["--vllm_sync_backend", "gloo"], "--vllm_sync_backend gloo"),
        (["--backend", "deepspeed"], "--backend deepspeed"),
    ],
)
def test_what_takes_several_processes_is_refused_in_one(
    world: Path, tmp_path: Path, flags: list[str], named: str
) -> None:
    words = command(world, tmp_path / "run", *GRPO, *HF, "--workers", "local", *flags)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"--workers local keeps everything in one process, but {named} takes several" in done.stderr
