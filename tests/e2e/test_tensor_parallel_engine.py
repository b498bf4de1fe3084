"""A vLLM engine whose model is split over two worker processes, in float32: equal to one process and to the trainer's forward."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny import save_tiny_model
from togi.config.choices import EngineName
from togi.parallel.process import open_store
from togi.rollout import create_engine
from togi.rollout.engine import EngineSettings, RolloutEngine
from togi.sample import Generation, Sampling
from togi.weights.buckets import Manifest, TensorSpec, pack_buckets
from togi.weights.carriers import Announced, Channel, OverChannel, Rendezvous

pytestmark = pytest.mark.busy

PROMPTS = [[(7 * i + 3 * j) % 250 for j in range(length)] for i, length in enumerate([5, 1, 17, 160])]
GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)


def ask(engine: RolloutEngine) -> tuple[list[Generation], list[list[float]]]:
    """Greedy continuations of all prompts at once, and the scores of the two longest prompts."""

    async def gather() -> tuple[list[Generation], list[list[float]]]:
        answers = await asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in PROMPTS))
        return answers, [await engine.score(prompt) for prompt in PROMPTS[2:]]

    return asyncio.run(gather())


async def update(engine: RolloutEngine, folder: Path, version: int) -> None:
    await send(engine, load_file(folder / "model.safetensors"), version, None)


async def update_in_parts(engine: RolloutEngine, folder: Path, version: int) -> None:
    """Each worker process of vLLM joins the sender's channel, and takes the buckets from there itself."""
    tensors = list(load_file(folder / "model.safetensors").items())
    store = open_store("127.0.0.1", 60.0)
    first, *others = (Rendezvous(rank, 3, "127.0.0.1", store.port, 60.0) for rank in range(3))
    joining = asyncio.create_task(engine.join_parts(others, on_gpu=False))
    exporter = OverChannel(await asyncio.to_thread(Channel.join, first, torch.device("cpu")))
    await joining
    exporter.begin(tensors, 20_000)
    await engine.begin_update(Manifest(version, tuple(TensorSpec.of(name, tensor) for name, tensor in tensors)))
    left = len(tensors)
    while left > 0:
        count, parcel = exporter.next()
        assert isinstance(parcel, Announced)
        await engine.load_in_parts([parcel])
        left -= count
    assert await engine.checksum_of_parts() == exporter.finish()
    await engine.finish_update()


async def send(engine: RolloutEngine, weights: dict[str, torch.Tensor], version: int, scale: float | None) -> None:
    tensors = list(weights.items())
    await engine.begin_update(Manifest(version, tuple(TensorSpec.of(name, tensor) for name, tensor in tensors), scale))
    for bucket in pack_buckets(tensors, 20_000):
        await engine.load_bucket(bucket)
        bucket.data[:] = 255
    await engine.finish_update()


def trainer_logprobs(folder: Path, tokens: list[int]) -> np.ndarray:
    """float32 log-softmax of tokens[1:], from Transformers without a cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


def check(folder: Path, answers: list[Generation], scores: list[list[float]]) -> None:
    """What an engine says is what the model of this folder says."""
    for prompt, got in zip(PROMPTS, answers, strict=True):
        expected = trainer_logprobs(folder, [*prompt, *got.tokens])[len(prompt) - 1 :]
        assert np.allclose(got.logprobs, expected, atol=1e-4)
    for prompt, score in zip(PROMPTS[2:], scores, strict=True):
        assert np.allclose(score, trainer_logprobs(folder, prompt), atol=1e-4)


def with_adapter(folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """An adapter of two layers that two processes split by rows and by columns, and a model with twice B A added."""
    tensors, adapter = load_file(folder / "model.safetensors"), dict[str, torch.Tensor]()
    torch.manual_seed(0)
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        rows, columns = tensors[f"{layer}.weight"].shape
        a, b = torch.randn(3, columns) / 4, torch.randn(rows, 3) / 4
        adapter |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
        tensors[f"{layer}.weight"] += 2 * b @ a
    merged = shutil.copytree(folder, folder.parent / "merged")
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    return adapter, merged


def test_two_processes_equal_one_and_the_trainer_also_after_an_update(tmp_path: Path) -> None:
    old, new = (
        save_tiny_model(tmp_path / str(seed), seed=seed, tie_word_embeddings=True, num_key_value_heads=2)
        for seed in (1, 2)
    )
    settings = EngineSettings(str(old), dtype="float32", max_model_len=400, kv_cache_gb=0.1, max_num_seqs=8, threads=1)
    adapter, merged = with_adapter(old)
    before = psutil.Process().children(recursive=True)
    said: dict[int, list[tuple[list[Generation], list[list[float]]]]] = {}
    for size in (2, 1):
        engine = create_engine(EngineName.VLLM, replace(settings, tensor_parallel_size=size))
        said[size] = [ask(engine)]
        asyncio.run((update_in_parts if size > 1 else update)(engine, new, 1))
        released = asyncio.run(engine.sleep())
        assert released.nbytes > size * 0.09 * 2**30  # the cache of each process has 0.1 GiB
        assert released.before - released.after > 0.9 * released.nbytes
        asyncio.run(engine.wake())
        said[size].append(ask(engine))
        asyncio.run(send(engine, adapter, 2, 2.0))
        said[size].append(ask(engine))
        asyncio.run(engine.shutdown())
    left = [child for child in psutil.Process().children(recursive=True) if child not in before]
    left = [child for child in left if child.status() != psutil.STATUS_ZOMBIE]  # ended, and not yet waited for
    assert not [child for child in left if "spawn_main" in " ".join(child.cmdline())]
    for folder, two, one in zip((old, new, merged), said[2], said[1], strict=True):
        check(folder, *two)
        assert [got.tokens for got in two[0]] == [got.tokens for got in one[0]]
        assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(two[1], one[1], strict=True))
    assert {version for got in said[2][1][0] for version in got.versions} == {1}
    assert [got.tokens for got in said[2][0][0]] != [got.tokens for got in said[2][1][0]]
