"""The workers of ``togi rl`` in rings = one worker: log-probs, values, scores, updates; every sample once and in its place."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForSequenceClassification

from tests.equal.rl_ring_jobs import Player
from tests.learn_tools import rollouts
from tests.tiny import save_tiny_model, tiny_config
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.learn.learner import UpdateReport
from togi.plan.placement import Role
from togi.workers.protocol import Health
from togi.workers.ray import load
from togi.workers.ray.cluster import RayWorkers
from togi.workers.worker_group import LearnerGroup

pytestmark = pytest.mark.busy

RANKS, RING = 4, 2
SAMPLES = 7


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "policy", num_attention_heads=4, num_key_value_heads=2)
    save_tiny_model(folder / "experts", "qwen3_moe")
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(tiny_config(num_labels=1)).save_pretrained(folder / "scalar")
    return folder


@pytest.fixture(scope="module")
def players(models: Path) -> Iterator[list[ray.actor.ActorHandle]]:
    """One that plays alone, then those of the rings."""
    ray.init(
        address="local", num_cpus=RANKS + 1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1"
    )
    remote = ray.remote(Player)
    environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    yield [remote.options(num_cpus=1, runtime_env=environment).remote() for _ in range(1 + RANKS)]
    ray.shutdown()


def groups(players: list[ray.actor.ActorHandle], role: Role) -> list[LearnerGroup]:
    alone, rings = (
        RayWorkers[Player](role, len(some), some.__getitem__, Health()) for some in (players[:1], players[1:])
    )
    return [
        LearnerGroup(role, alone, share_prompts=True),
        LearnerGroup(role, rings, share_prompts=True, ranks_per_share=RING),
    ]


def configs(*flags: str) -> list[RLConfig]:
    """Of one worker and of the rings, with several packs in each pass."""
    common = ["--max_tokens_per_gpu", "24", "--no_bf16", "--actor_learning_rate", "1e-3", *flags]
    common += ["--critic_learning_rate", "1e-3", "--lr_scheduler", "constant", "--lr_warmup_ratio", "0"]
    ring = ["--ring_attn_size", str(RING), "--zero_stage", "3"]
    return [parse(RLConfig, words, "rl").config for words in (common, [*common, *ring])]


def play(
    players: list[ray.actor.ActorHandle], role: Role, method: str, last: int | str, *flags: str
) -> list[tuple[list[np.ndarray], list[UpdateReport], list[np.ndarray]]]:
    """Results of ``method``, of two optimizer steps (a learner's), and of ``method`` again; alone and in rings."""

    async def once(group: LearnerGroup, config: RLConfig) -> tuple:
        await load(group.workers, Player.start, config, role, last)
        before = await group.per_sample(getattr(Player, method), rollouts(SAMPLES, seed=0))
        steps = (
            await group.update([rollouts(SAMPLES, seed=1), rollouts(SAMPLES, seed=2)]) if isinstance(last, int) else []
        )
        after = await group.per_sample(getattr(Player, method), rollouts(SAMPLES, seed=0))
        await group.call_all(Player.leave)
        return before, steps, after

    return [
        asyncio.run(once(group, config)) for group, config in zip(groups(players, role), configs(*flags), strict=True)
    ]


def assert_equal(alone: tuple, rings: tuple) -> None:
    for ours, theirs in ((rings[0], alone[0]), (rings[2], alone[2])):
        assert len(ours) == len(theirs) == SAMPLES
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)
    for ours, theirs in zip(rings[1], alone[1], strict=True):
        assert (ours.steps, ours.count, ours.packed) == (theirs.steps, theirs.count, theirs.packed)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
        assert dict(ours.metrics) == pytest.approx(dict(theirs.metrics), rel=1e-4, abs=1e-6)
        for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("arch", ["policy", "experts"])
def test_an_actor_in_rings_equals_one_worker(players: list, models: Path, arch: str) -> None:
    """Without critic and reference, whose absence must not cost samples; experts with a load-balancing loss."""
    flags = ["--pretrain", str(models / arch), "--advantage_estimator", "reinforce", "--init_kl_coef", "0"]
    flags += ["--aux_loss_coef", "0.5"] if arch == "experts" else ["--ring_head_stride", "2"]
    alone, rings = play(players, Role.ACTOR, "logprobs", 2, *flags)
    assert_equal(alone, rings)
    assert max(float(np.abs(a - b).max()) for a, b in zip(alone[0], alone[2], strict=True)) > 1e-3


def test_an_actor_in_rings_sends_tokens_to_the_same_experts(players: list, models: Path) -> None:
    """Each token to two of four experts in each of two layers; a dense model has nothing to say."""
    flags = ["--advantage_estimator", "reinforce", "--init_kl_coef", "0", "--pretrain", str(models / "experts")]
    alone, rings = play(players, Role.ACTOR, "routes", 2, *flags)
    assert_equal(alone, rings)
    samples = rollouts(SAMPLES, seed=0)
    assert [part.shape for part in alone[0]] == [(int(sample.loss_mask.sum()), 2, 2) for sample in samples]
    assert {int(expert) for part in alone[0] for expert in part.flat} == {0, 1, 2, 3}


def test_a_critic_in_rings_equals_one_worker(players: list, models: Path) -> None:
    assert_equal(*play(players, Role.CRITIC, "values", 2, "--pretrain", str(models / "policy")))


@pytest.mark.parametrize(("role", "method"), [(Role.REF, "logprobs"), (Role.REWARD, "scores")])
def test_frozen_models_in_rings_equal_one_worker(players: list, models: Path, role: Role, method: str) -> None:
    path = str(models / ("policy" if role is Role.REF else "scalar"))
    assert_equal(*play(players, role, method, path, "--pretrain", path))
