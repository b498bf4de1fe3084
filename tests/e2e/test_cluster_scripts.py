"""The SLURM scripts on two nodes that are this machine: SLURM's programs are stand-ins (tests/slurm), all else is real."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.learn_tools import max_difference
from tests.offline_world import DATA, ROOT, answer, train, values, write
from tests.scripted_server import free_port
from tests.tiny import save_tiny_model

pytestmark = [pytest.mark.busy, pytest.mark.large]

BIN = Path(sys.executable).parent
CLUSTER = ROOT / "examples" / "cluster"
REWARD = """
def reward_func(queries, prompts, labels, responses):
    return [len(response) / 10 for response in responses]
"""
RL = "--input_key q --apply_chat_template --actor_num_nodes 2 --actor_num_gpus_per_node 1 --vllm_num_engines 2 "
RL += "--colocate_all_models --advantage_estimator group_norm --n_samples_per_prompt 2 --init_kl_coef 0 --max_steps 1 "
RL += (
    "--rollout_engine transformers --rollout_batch_size 2 --train_batch_size 4 --prompt_max_len 64 --generate_max_len 8"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    write(folder / "sft.jsonl", [answer(i) for i in range(8)])
    (folder / "reward.py").write_text(REWARD)
    return folder


def sbatch(script: str, folder: Path, *words: object, **variables: object) -> tuple[str, list[str]]:
    """Submit a script of examples/cluster; returns what it said, and srun's steps as ``nodes|node|command``."""
    names = {"SRUN_LOG": folder / "srun", "GPUS_PER_NODE": 1, "PORT": free_port(), "RUN": folder / "run"}
    names |= {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, "PATH": f"{ROOT / 'tests' / 'slurm'}:{os.environ['PATH']}"}
    environment = os.environ | {name: str(value) for name, value in (names | variables).items()}
    command = ["sbatch", CLUSTER / script, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, (folder / "srun").read_text().splitlines()


def test_fine_tuning_on_two_nodes_equals_one_process(world: Path, tmp_path: Path) -> None:
    flags = f"--pretrain {world / 'model'} --dataset {world / 'sft.jsonl'} {DATA['sft'][1]} --max_len 96 --train_batch_size 4"
    more = "--max_epochs 1 --learning_rate 3e-3 --lr_scheduler constant"
    where = {"TORCHRUN": BIN / "torchrun", "TOGI_CACHE": os.environ["TOGI_CACHE"]}
    said, steps = sbatch("slurm_train.sh", tmp_path, "sft", *flags.split(), *more.split(), **where)
    assert re.search(r"2 nodes x 1 processes meet at 127\.0\.0\.1:\d+\n", said)
    assert [step.split("|")[:2] for step in steps] == [["2", ""]]
    two = values(tmp_path / "run")
    one = train(world, "sft", tmp_path / "one", evaluate=False)
    assert len(one) == len(two) >= 2
    for ours, theirs in zip(two, one, strict=True):
        for name in ("loss", "grad_norm", "tokens/seen"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4), name
    models = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", tmp_path / "one"))
    assert max_difference(*models) < 1e-4


def test_online_rl_on_two_ray_nodes(world: Path, tmp_path: Path) -> None:
    """One worker of each kind on either node, and nothing left running."""
    data = ["--pretrain", world / "model", "--prompt_data", world / "sft.jsonl", "--reward_func", world / "reward.py"]
    port = free_port()
    said, steps = sbatch("slurm_rl.sh", tmp_path, *data, *RL.split(), BIN=BIN, PORT=port)
    assert "Ray: 2 nodes, 2 GPUs\n" in said
    assert "placement: engine, actor 2 = 2 GPUs\n" in said
    (step,) = values(tmp_path / "run")
    assert step["mismatch/max_ratio"] == pytest.approx(1, abs=1e-3) and math.isfinite(step["policy/grad_norm"])
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    starts = [step for step in steps if " start " in step]
    assert [(step.split("|")[1], "--head" in step) for step in starts] == [("127.0.0.1", True), ("localhost", False)]
    assert all("--num-gpus=1" in step and "--include-dashboard=false" in step + starts[0] for step in starts)
    assert not any("0.0.0.0" in step for step in steps)
    left = [
        process for process in psutil.process_iter(["cmdline"]) if str(port) in " ".join(process.info["cmdline"] or [])
    ]
    assert not left, [process.info for process in left]
