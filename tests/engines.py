"""Rollout engines on tiny models, and ways to ask them and to send them weights."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
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


def start_with_queue(asked: EngineSettings) -> RolloutEngine:
    """vLLM with asynchronous scheduling, as on GPUs: one step is in flight while the last one is handed out.

    vLLM turns it off on CPUs at the end of its platform's defaults, so it is turned on after them.
    """
    from vllm.platforms.cpu import CpuPlatform

    with pytest.MonkeyPatch.context() as patch:
        defaults = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

        def with_queue(cls: type, vllm_config: object) -> None:
            defaults(cls, vllm_config)
            vllm_config.scheduler_config.async_scheduling = True  # type: ignore[attr-defined]

        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(with_queue))
        return create_engine(EngineName.VLLM, asked)


def engine_of(kind: str, folder: Path, **changes: object) -> RolloutEngine:
    """``kind``: transformers, vllm, or vllm with a queue. ``changes``: of the settings."""
    asked = replace(settings(folder), **changes)  # type: ignore[arg-type]
    if kind == "vllm with a queue":
        return start_with_queue(asked)
    return create_engine(EngineName(kind), asked)


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
