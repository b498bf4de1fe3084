"""Both engines, really run: an update with an adapter alone is the update with whole merged weights, again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engines import GREEDY, PROMPTS, generate, start
from tests.tiny import save_tiny_model
from togi.config.choices import EngineName
from togi.config.shared import LoRA
from togi.errors import WeightSyncError
from togi.model.adapters import adapter_scale, as_sent
from togi.model.checkpoint import whole_tensors
from togi.model.loading import ModelSource, load_causal_lm
from togi.model.policy import PolicyModel
from togi.rollout.engine import RolloutEngine
from togi.weights.buckets import Manifest, TensorSpec, pack_buckets

pytestmark = pytest.mark.busy

PROBE = [(11 * j) % 250 for j in range(60)]


def stir(model: PolicyModel, seed: int) -> dict[str, Tensor]:
    """Give the adapter other values; what of it is sent."""
    generator = torch.Generator().manual_seed(seed)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 5
    return dict(as_sent(model, trained, ((name, parameter.detach()) for name, parameter in trained.items())))


def whole(model: PolicyModel) -> dict[str, Tensor]:
    def full(dtype: torch.dtype | None = None, *, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, parameter.detach()) for name, parameter in model.named_parameters())

    return dict(whole_tensors(model, full, torch.float32))


async def update(engine: RolloutEngine, tensors: dict[str, Tensor], version: int, scale: float | None) -> int:
    """In small buckets, each overwritten once it was loaded. Bytes sent."""
    manifest = Manifest(version, tuple(TensorSpec.of(name, tensor) for name, tensor in tensors.items()), scale)
    await engine.begin_update(manifest)
    for bucket in pack_buckets(tensors.items(), 4_000):
        await engine.load_bucket(bucket)
        bucket.data[:] = 255
    await engine.finish_update()
    return manifest.nbytes


def answers(engine: RolloutEngine) -> tuple[list[tuple[int, ...]], list[float]]:
    return [got.tokens for got in generate(engine, PROMPTS, GREEDY)], asyncio.run(engine.score(PROBE))


@pytest.mark.parametrize(
    ("name", "arch"),
    [(EngineName.VLLM, "llama"), (EngineName.TRANSFORMERS, "llama"), (EngineName.TRANSFORMERS, "qwen3_moe")],
)
def test_an_adapter_alone_does_what_merged_weights_do(name: EngineName, arch: str, tmp_path: Path) -> None:
    """Only q and down are adapted, of which vLLM keeps q in one tensor with k and v. After five others the first is the same."""
    folder = save_tiny_model(tmp_path, arch=arch)
    targets = ("q_proj", "down_proj") if arch == "llama" else ("all-linear",)
    model = load_causal_lm(ModelSource(str(folder), torch.float32, lora=LoRA(4, 12, 0.0, targets, False)))
    engine = start(name, folder)
    first, scale = stir(model, 1), adapter_scale(model)
    asyncio.run(update(engine, whole(model), 1, None))
    merged = answers(engine)
    assert asyncio.run(update(engine, first, 2, scale)) == 4 * sum(tensor.numel() for tensor in first.values())
    alone = answers(engine)
    assert alone[0] == merged[0]
    assert alone[1] == merged[1]
    first = {name: tensor.clone() for name, tensor in first.items()}
    for version in range(3, 8):
        asyncio.run(update(engine, stir(model, version), version, scale))
    assert not np.allclose(answers(engine)[1], alone[1], atol=1e-2)
    asyncio.run(update(engine, first, 8, scale))
    assert answers(engine) == alone
    assert engine.version == 8
    with pytest.raises(WeightSyncError, match=r"refused and the engine keeps version 8: .*lora_B\.weight is missing"):
        asyncio.run(update(engine, {name: t for name, t in first.items() if "lora_A" in name}, 9, scale))
    assert answers(engine) == alone
    asyncio.run(engine.shutdown())
