"""Reinforcement learning of a LoRA adapter, which alone is sent to engines; the base inside is the reference."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import warm
from tests.rl_world import GRPO, HF, ROOT, loads_in_a_plain_script, metrics, train

pytestmark = pytest.mark.busy

LORA = ["--lora_rank", "4", "--lora_alpha", "8", "--lora_dropout", "0"]
KL = ["--advantage_estimator", "group_norm", "--use_kl_loss", "--kl_estimator", "k3", "--init_kl_coef", "1e-3"]


def moved(run: Path) -> float:
    """The largest element of the adapter's B matrices, which start at zero."""
    tensors = load_file(run / "model" / "adapter_model.safetensors")
    return max(float(tensor.abs().max()) for name, tensor in tensors.items() if "lora_B" in name)


def adapter_bytes(run: Path) -> int:
    """Of the adapter that was saved, in float32."""
    return sum(4 * tensor.numel() for tensor in load_file(run / "model" / "adapter_model.safetensors").values())


def test_vllm_gets_the_adapter_alone(world: Path, tmp_path: Path) -> None:
    """Trainer with an adapter and engine without one agree after every update; no second model is the reference."""
    run = tmp_path / "run"
    done = train(
        world, run, *KL, *LORA, "--bf16", "--save_steps", "2", "--save_hf_ckpt", "--actor_learning_rate", "1e-2"
    )
    assert "ref 1" not in done.stdout
    records = [record["values"] for record in metrics(run)]
    assert len(records) == 3
    assert records[0]["kl/reference"] == pytest.approx(0, abs=1e-6)
    assert records[2]["kl/reference"] > 1e-3
    assert all(values["mismatch/probe_mean_abs"] < 0.05 for values in records)
    assert moved(run) > 1e-3
    assert "mismatch/probe_router_disagreement" not in records[0]  # a dense model has no router
    assert all(values["weights/sync_bytes"] == adapter_bytes(run) for values in records)
    assert (run / "checkpoints" / "step_00000002" / "hf" / "adapter_config.json").is_file()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = ["--lora_path", run / "model", "--output_path", tmp_path / "merged"]
    merge = [sys.executable, "-m", "togi.cli.lora_combiner", *map(str, words)]
    assert warm.run(merge, env=environment).returncode == 0
    loads_in_a_plain_script(tmp_path / "merged")


def test_chat_takes_an_adapter(world: Path, tmp_path: Path) -> None:
    """What the end of a run says to type must work: togi chat on the folder of the adapter."""
    run = tmp_path / "run"
    done = train(world, run, *GRPO, *HF, *LORA, "--max_steps", "1", "--actor_learning_rate", "1e-2")
    assert f"togi chat --pretrain {run / 'model'}" in done.stdout
    words = [sys.executable, "-m", "togi", "chat", "--pretrain", run / "model", "--max_len", "4", "--temperature", "0"]
    chat = warm.run(words, input="hello\nexit\n")
    assert chat.returncode == 0, chat.stderr[-2000:]
    assert len(chat.stdout.splitlines()) >= 2, chat.stdout  # the banner and an answer


def test_a_quantised_actor_and_critic(world: Path, tmp_path: Path) -> None:
    """QLoRA: the engine is sent float32 weights, the dequantised base plus the adapter, so both sides agree closely."""
    run = tmp_path / "run"
    flags = [
        "--advantage_estimator",
        "gae",
        "--critic_learning_rate",
        "1e-3",
        "--load_in_4bit",
        "--lr_warmup_ratio",
        "0",
    ]
    train(world, run, *HF, *LORA, *flags, "--save_value_network")
    records = [record["values"] for record in metrics(run)]
    assert all(values["mismatch/max_ratio"] == pytest.approx(1, abs=1e-2) for values in records)
    assert records[0]["kl/reference"] == pytest.approx(0, abs=1e-6)
    assert records[1]["kl/reference"] != 0
    assert records[0]["weights/sync_bytes"] > 4 * adapter_bytes(run)
    assert moved(run) > 0
    critic = load_file(run / "model_critic" / "adapter_model.safetensors")
    assert any(name.endswith("score.weight") for name in critic)


SHARDED = [*KL, *HF, *LORA, "--max_steps", "2", "--full_determinism", "--train_batch_size", "8"]


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One plain process, whose engine gets whole merged weights."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(world, run, *SHARDED, "--lora_sync", "merged")
    return run


@pytest.mark.parametrize("backend", ["fsdp2", pytest.param("deepspeed", marks=pytest.mark.large)])
def test_two_sharded_workers_equal_one(world: Path, tmp_path: Path, alone: Path, backend: str) -> None:
    """Adapters of float32 models under stage 3, in two processes that send two engines the adapter alone."""
    run = tmp_path / "run"
    two = "--actor_num_gpus_per_node 2 --vllm_num_engines 2 --zero_stage 3 --backend"
    train(world, run, *SHARDED, *two.split(), backend)
    for a, b in zip(metrics(alone), metrics(run), strict=True):
        for name in ("reward/mean", "policy/loss", "policy/grad_norm", "entropy", "kl/reference"):
            assert a["values"][name] == pytest.approx(b["values"][name], rel=5e-4, abs=1e-6), name
        assert b["values"]["weights/sync_bytes"] == adapter_bytes(run) < a["values"]["weights/sync_bytes"]
    first, second = (load_file(folder / "model" / "adapter_model.safetensors") for folder in (alone, run))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=2e-5)
    assert AutoModelForCausalLM.from_pretrained(run / "model").num_parameters() > 0
