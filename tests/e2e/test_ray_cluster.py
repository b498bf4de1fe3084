"""The established interface's hybrid-engine command, submitted as a job to a Ray cluster with declared GPUs.

Only model, data and sizes are replaced, and the module renamed. The cluster is a head node of its own, which is ended by its
process group: ``ray stop`` would end those of others too.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.offline_world import ROOT
from tests.tiny import save_tiny_model, tiny_config

pytestmark = pytest.mark.busy

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
    "WANDB_MODE": "offline",
    "RAY_worker_niceness": "0",
    # The job server lets nobody in without a token: these clusters have one of their own.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}
RAY = Path(sys.executable).with_name("ray")
HAS_JOBS = all(importlib.util.find_spec(name) is not None for name in ("aiohttp_cors", "opencensus"))  # ray[default]
HYBRID = (
    "--ref_num_nodes 1 --ref_num_gpus_per_node GPUS --reward_num_nodes 1 --reward_num_gpus_per_node GPUS "
    "--critic_num_nodes 1 --critic_num_gpus_per_node GPUS --actor_num_nodes 1 --actor_num_gpus_per_node GPUS "
    "--vllm_num_engines ENGINES --vllm_tensor_parallel_size 2 --colocate_all_models --vllm_gpu_memory_utilization 0.5 "
    "--pretrain DATA/model --reward_pretrain DATA/reward --save_path OUT/rlhf --ckpt_path OUT/rlhf_ckpt --save_hf_ckpt "
    "--micro_train_batch_size 8 --train_batch_size 4 --micro_rollout_batch_size 16 --rollout_batch_size 4 "
    "--n_samples_per_prompt 1 --max_epochs 1 --prompt_max_len 1024 --max_samples 8 --generate_max_len 8 --zero_stage 3 "
    "--bf16 --actor_learning_rate 5e-7 --critic_learning_rate 9e-6 --init_kl_coef 0.01 --prompt_data DATA/prompts.jsonl "
    "--input_key context_messages --apply_chat_template --normalize_reward --gradient_checkpointing --packing_samples "
    "--enforce_eager --vllm_enable_sleep --deepspeed_enable_sleep --use_wandb TOKEN"
)
HERE = " --run_dir OUT/run --save_steps 2 --vllm_cpu_kv_cache_gb 0.1"


def command(data: Path, out: Path, gpus: int, engines: int, more: str = "") -> list[str]:
    """The command with ``gpus`` for each role."""
    places = {"DATA": data, "OUT": out, "GPUS": gpus, "ENGINES": engines}
    words = f"{HYBRID}{HERE} {more}".split()
    for name, value in places.items():
        words = [word.replace(name, str(value)) for word in words]
    return [sys.executable, "-m", "togi.cli.train_ppo_ray", *words]


def make_data(folder: Path) -> Path:
    save_tiny_model(
        folder / "model", seed=0, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096
    )
    torch.manual_seed(1)
    config = tiny_config(num_labels=1, pad_token_id=0, max_position_embeddings=4096)
    config.mean, config.std = 0.25, 2.0
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    rows = [{"context_messages": [{"role": "user", "content": f"write number {i}"}]} for i in range(16)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where it is. ``jobs`` is the address to submit to; empty where Ray was installed without its job server."""

    gcs: str
    jobs: str


@contextmanager
def cluster(gpus: int) -> Iterator[Cluster]:
    """A head node that declares so many GPUs."""
    ports = [free_port() for _ in range(5)]
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # socket paths must be short
    flags = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    flags += ["--head", "--block", "--node-ip-address=127.0.0.1", f"--num-gpus={gpus}", f"--temp-dir={temporary}"]
    flags += ["--object-store-memory=200000000", "--disable-usage-stats", f"--include-dashboard={HAS_JOBS}"]
    head = subprocess.Popen(
        [RAY, "start", *flags],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    place = Cluster(f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}" if HAS_JOBS else "")
    ready = job(place, "list") if HAS_JOBS else [str(RAY), "status", f"--address={place.gcs}"]
    try:
        deadline = time.monotonic() + 120
        while subprocess.run(ready, env=ENVIRONMENT, capture_output=True, check=False).returncode != 0:
            assert head.poll() is None and time.monotonic() < deadline, "no Ray head"
            time.sleep(1)
        yield place
    finally:
        end(head.pid)
        shutil.rmtree(temporary, ignore_errors=True)


def end(session: int) -> None:
    """Every process of a session, whichever group it is in."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rpartition(")")[2].split()
                if int(fields[3]) == session:
                    os.kill(int(status.parent.name), kind)
            except (FileNotFoundError, ProcessLookupError):
                continue
        time.sleep(2)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def job(place: Cluster, *words: str) -> list[str]:
    return [str(RAY), "job", *words[:1], f"--address={place.jobs}", *words[1:]]


def submit(place: Cluster, folder: Path, words: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Start the job in an empty working folder and wait for its end. Without a job server, do what it does to the job."""
    working = folder / "empty"
    working.mkdir(exist_ok=True)
    environment = ENVIRONMENT
    if HAS_JOBS:
        runtime = json.dumps({"working_dir": str(working)})
        words = job(place, "submit", f"--runtime-env-json={runtime}", "--", *words)
    else:
        environment = environment | {"RAY_ADDRESS": place.gcs}
    return subprocess.run(
        words, cwd=working, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )


@pytest.mark.large
def test_a_job_that_asks_for_more_than_there_is_ends_at_once(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    with cluster(gpus=2) as place:
        refused = submit(place, tmp_path, command(data, tmp_path, 4, 2), 120)
        assert refused.returncode != 0
        assert (
            "engine 2 x 2, actor, critic, ref, reward 4 = 4 GPUs but the cluster has 2"
            in refused.stdout + refused.stderr
        )


@pytest.mark.large
def test_the_hybrid_command_as_a_job(tmp_path: Path) -> None:
    """Everything on two declared GPUs, with an engine of two processes."""
    data = make_data(tmp_path)
    with cluster(gpus=2) as place:
        run_job(place, data, tmp_path, 2, 1)


@pytest.mark.large
def test_the_hybrid_command_with_all_its_workers(tmp_path: Path) -> None:
    """Eight declared GPUs for each role and four engines of two processes, as in the command: 16 GB."""
    data = make_data(tmp_path)
    with cluster(gpus=8) as place:
        run_job(place, data, tmp_path, 8, 4, "--train_batch_size 8 --rollout_batch_size 8 --max_samples 16")


def run_job(place: Cluster, data: Path, folder: Path, gpus: int, engines: int, more: str = "") -> None:
    done = submit(place, folder, command(data, folder, gpus, engines, more), 900)
    assert done.returncode == 0, done.stdout[-6000:]
    assert f"placement: engine {engines} x 2, actor, critic, ref, reward {gpus} = {gpus} GPUs" in done.stdout
    assert "declared only" in done.stdout
    check_run(folder)


def check_run(folder: Path) -> None:
    """Two steps were trained and what they led to was saved."""
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        values = record["values"]
        for name in ("reward/mean", "policy/loss", "policy/grad_norm", "value/loss", "value/grad_norm"):
            assert math.isfinite(values[name]), (name, values)
        assert values["mismatch/probe_mean_abs"] < 0.05
        # Everything was asked to sleep: what each phase took is known.
        assert {
            "peak_memory/generate/engines",
            "peak_memory/train/learners",
            "peak_memory/score/scorers",
        } <= values.keys()
        assert values["released_memory/engines"] > 0 and values["released_memory/learners"] > 0
    assert "peak_memory/train/learners" in (folder / "run" / "report.html").read_text()
    before, after = (load_file(path / "model.safetensors") for path in (folder / "model", folder / "rlhf"))
    assert before.keys() == after.keys()
    assert any((before[name].bfloat16() != after[name]).any() for name in before)
    assert (folder / "rlhf_ckpt" / "step_00000002" / "hf" / "config.json").is_file()
