"""``--replay``: the updates of a run again from its stored rollouts, without an engine, with any number of workers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.rl_world import HF, ROOT, command, metrics, model_bytes, train

# Two updates of actor and critic on each of two rollouts, with the reference in the reward.
SETTINGS = "--max_steps 2 --train_batch_size 8 --critic_learning_rate 1e-3 --lr_scheduler constant --lr_warmup_ratio 0"
PPO = [*SETTINGS.split(), "--advantage_estimator", "gae", "--save_value_network"]
TWO = "--actor_num_gpus_per_node 2 --critic_num_gpus_per_node 2 --zero_stage 3"
WORKERS = {
    "fsdp2 separate": "--ref_num_gpus_per_node 1",
    "fsdp2 compiled": "--ref_num_gpus_per_node 1 --torch_compile",
    "deepspeed colocated": "--backend deepspeed --ref_num_gpus_per_node 2 --colocate_all_models",
}
COMPARED = (
    "policy/loss",
    "policy/grad_norm",
    "value/loss",
    "value/grad_norm",
    "kl/reference",
    "entropy",
    "reward/mean",
)


@pytest.fixture(scope="module")
def original(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one worker a model."""
    run = tmp_path_factory.mktemp("original") / "run"
    train(world, run, *PPO, *HF)
    return run


def replay(
    world: Path, run: Path, original: Path, *flags: str, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The same command without a reward; vLLM, the default engine, is not there when ``path`` hides it."""
    words = command(world, run, *PPO, "--replay", str(original), *flags)
    at = words.index("--reward_func")
    del words[at : at + 2]
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}" if path is not None else str(ROOT)}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def test_a_replay_repeats_the_run_bit_for_bit(world: Path, original: Path, tmp_path: Path) -> None:
    """Losses, weights and what is stored of each rollout, without vLLM and without a reward."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['vllm'] = None\n")
    run = tmp_path / "run"
    done = replay(world, run, original, path=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"replay of {original}: no engine runs and no reward is called" in done.stdout
    assert "placement: actor 1 + critic 1 + ref 1 = 3 workers in this process" in done.stdout
    for before, after in zip(metrics(original), metrics(run), strict=True):
        missing = {name for name in before["values"] if name not in after["values"]}
        assert not any(name.startswith(("policy", "value", "reward", "kl", "mismatch/k3")) for name in missing)
        for name in COMPARED:
            assert before["values"][name] == after["values"][name], name
    for model in ("model", "model_critic"):
        assert model_bytes(original / model) == model_bytes(run / model)
    for step in (1, 2):
        stored = [pq.read_table(folder / f"rollouts/step_{step:06d}.parquet") for folder in (original, run)]
        assert stored[0].equals(stored[1])


@pytest.mark.parametrize("workers", [pytest.param(name, marks=pytest.mark.large) for name in WORKERS])
def test_two_workers_of_each_model_have_equal_losses(world: Path, original: Path, tmp_path: Path, workers: str) -> None:
    """Two actors and two critics under ZeRO-3, on either backend, apart or together."""
    run = tmp_path / "run"
    done = replay(world, run, original, *TWO.split(), *WORKERS[workers].split())
    assert done.returncode == 0, done.stderr[-3000:]
    for before, after in zip(metrics(original), metrics(run), strict=True):
        for name in COMPARED:
            assert before["values"][name] == pytest.approx(after["values"][name], rel=5e-4, abs=1e-6), name
    compiled = [record["values"].get("compile/seconds") for record in metrics(run)]
    assert [seconds is not None and seconds > 0 for seconds in compiled] == ["compile" in WORKERS[workers], False]
    for model in ("model", "model_critic"):
        before, after, start = (
            load_file(folder / "model.safetensors") for folder in (original / model, run / model, world / "model")
        )
        moved, apart = (
            torch.cat([(before[name] - other[name]).flatten().abs() for name in before if name in start])
            for other in (start, after)
        )
        # Adam makes a whole step of a gradient that is nothing but rounding: such a weight may end anywhere on its way
        assert apart.mean() < 1e-4 * moved.mean()
        assert apart.max() < moved.max()
