"""Rollout engines on tiny models, and ways to ask them and to send them weights."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch

from togi.config.choices import EngineName
from togi.rollout import create_engine
from togi.rollout.engine import EngineSettings, RolloutEngine
from togi.sample import Generation, Sampling
from togi.weights.buckets import Manifest, TensorSpec

MAX_LEN = 400
PROMPTS = [[(7 * i + 3 * j) % 250 for j in range(length)] for i, length in enumerate([5, 1, 17, 9, 40, 3])]
GREEDY = Sampling(max_tokens=12, temperature=0.0)


def settings(folder: Path) -> EngineSettings:
    return EngineSettings(
        str(folder), dtype="float32", max_model_len=MAX_LEN, kv_cache_gb=0.1, max_num_seqs=8, threads=1
    )


def start(name: EngineName, folder: Path) -> RolloutEngine:
    return create_engine(name, settings(folder))


def generate(engine: RolloutEngine, prompts: list[list[int]], *sampling: Sampling) -> list[Generation]:
    async def gather() -> list[Generation]:
        each = sampling if len(sampling) == len(prompts) else sampling * len(prompts)
        return await asyncio.gather(*(engine.generate(p, s) for p, s in zip(prompts, each, strict=True)))

    return asyncio.run(gather())


def weights(folder: Path) -> list[tuple[str, torch.Tensor]]:
    from safetensors.torch import load_file

    return list(load_file(folder / "model.safetensors").items())


def manifest_of(tensors: list[tuple[str, torch.Tensor]], version: int) -> Manifest:
    return Manifest(version, tuple(TensorSpec.of(name, tensor) for name, tensor in tensors))
