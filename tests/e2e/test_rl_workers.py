"""Two actors, two critics, two references and two vLLM engines under ZeRO-3 learn as one of each does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.rl_world import metrics, train

pytestmark = pytest.mark.large

STEPS, SAMPLES = 6, 32
# The share of characters with an even code: about 0.3 at first, and quickly learnt.
REWARD = """
def reward_func(queries, prompts, labels):
    answers = [query[len(prompt):] for query, prompt in zip(queries, prompts)]
    return [sum(ord(c) % 2 == 0 for c in answer) / max(1, len(answer)) for answer in answers]
"""
PPO = (
    "--advantage_estimator gae --init_kl_coef 1e-3 --rollout_batch_size 8 --train_batch_size 32 --lr_scheduler constant "
    "--actor_learning_rate 3e-3 --critic_learning_rate 1e-3 --lr_warmup_ratio 0 --vllm_cpu_kv_cache_gb 0.1 --full_determinism"
)
TWO = (
    "--actor_num_gpus_per_node 2 --critic_num_gpus_per_node 2 --ref_num_gpus_per_node 2 --vllm_num_engines 2 --zero_stage 3 "
    "--vllm_sync_backend nccl"
)
COLOCATED = "--colocate_all_models"


def curve(run: Path) -> tuple[list[float], float]:
    """The mean reward of every step, and the standard error of their mean by the samples of each step."""
    values = [record["values"] for record in metrics(run)]
    errors = [step["reward/std"] ** 2 / SAMPLES for step in values]
    return [step["reward/mean"] for step in values], math.sqrt(sum(errors)) / len(errors)


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one worker of each; the prompts and the reward function lie beside it."""
    folder = tmp_path_factory.mktemp("alone")
    rows = [{"prompt": f"write number {i}", "letter": "e"} for i in range(8 * STEPS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    train(world, folder / "run", *task(folder))
    return folder


def task(folder: Path) -> list[str]:
    return [*PPO.split(), "--prompt_data", str(folder / "prompts.jsonl"), "--reward_func", str(folder / "reward.py")]


@pytest.mark.parametrize(
    "where",
    [
        "--backend deepspeed --colocate_all_models",
        "--backend deepspeed",
        "--backend fsdp2 --colocate_all_models",
        "--backend fsdp2",
    ],
)
def test_the_reward_of_two_workers_is_that_of_one_within_sampling_noise(
    world: Path, tmp_path: Path, alone: Path, where: str
) -> None:
    """Means over all steps differ by less than three standard errors of their difference; both rise.

    Every sample has its seed, or the noise of the first steps would grow with what each run learns from its own.
    """
    done = train(world, tmp_path / "two", *task(alone), *TWO.split(), *where.split())
    together = COLOCATED in where
    placed = (
        "engine, actor, critic, ref 2 = 2 worker" if together else "engine 2 + actor 2 + critic 2 + ref 2 = 8 worker"
    )
    assert f"placement: {placed} processes" in done.stdout
    assert "weights travel by gloo: --vllm_sync_backend nccl needs GPUs" in done.stdout
    (one, error_one), (two, error_two) = curve(alone / "run"), curve(tmp_path / "two")
    assert len(one) == len(two) == STEPS
    difference = sum(one) / STEPS - sum(two) / STEPS
    assert abs(difference) < 3 * math.hypot(error_one, error_two)
    for rewards in (one, two):
        assert sum(rewards[-2:]) > sum(rewards[:2]) + 0.1
    assert all(record["values"]["mismatch/probe_mean_abs"] < 1e-4 for record in metrics(tmp_path / "two"))
