"""Both engines, really run on tiny mixtures: where tokens go in the engine, beside where they go in the trainer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engines import manifest_of, start, weights
from tests.tiny import save_tiny_model
from togi.algo.policy import router_disagreement
from togi.config.choices import EngineName
from togi.data.packing import in_order, pack_all
from togi.learn.scorer import Scorer
from togi.model.loading import ModelSource, load_causal_lm
from togi.parallel.process import World
from togi.rollout.engine import RolloutEngine
from togi.weights.buckets import pack_buckets
from togi.weights.updates import probe

pytestmark = pytest.mark.busy

TOKENS = [(11 * j) % 250 for j in range(60)]


async def update(engine: RolloutEngine, tensors: list[tuple[str, Tensor]]) -> None:
    await engine.begin_update(manifest_of(tensors, 1))
    for bucket in pack_buckets(tensors, 1 << 20):
        await engine.load_bucket(bucket)
    await engine.finish_update()


def trainer_routes(folder: Path) -> Tensor:
    """Those of tokens 1 to 59, of the trainer's own forward, which packs the probe with another sequence."""
    model = load_causal_lm(ModelSource(str(folder), torch.float32))
    samples = [probe(TOKENS[::-1], 400), probe(TOKENS, 400)]
    packs = pack_all(samples, max_tokens=400, max_sequences=None, share_prefix=False)
    assert len(packs) == 1
    routes = in_order(packs, Scorer(model, World.solo(torch.device("cpu"))).routes(packs))
    return torch.from_numpy(routes[1]).long()


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        (EngineName.TRANSFORMERS, "mixtral"),
        (EngineName.TRANSFORMERS, "qwen3_moe"),
        pytest.param(EngineName.VLLM, "qwen3_moe", marks=pytest.mark.large),
    ],
)
def test_the_same_weights_route_alike_and_others_do_not(name: EngineName, arch: str, tmp_path: Path) -> None:
    """With the first router's weights negated the engine's first layer takes the other two of four experts for every token."""
    folder = save_tiny_model(tmp_path, arch=arch)
    trainer_TMC, engine = trainer_routes(folder), start(name, folder)
    engine_TMC = torch.from_numpy(asyncio.run(engine.routes(TOKENS)))[1:]
    assert engine_TMC.shape == trainer_TMC.shape == (59, 2, 2)
    assert router_disagreement(engine_TMC, trainer_TMC) == 0
    gate = ".layers.0.block_sparse_moe.gate." if arch == "mixtral" else ".layers.0.mlp.gate."
    tensors = [(n, -tensor if gate in n else tensor) for n, tensor in weights(folder)]
    assert sum(gate in n for n, _ in tensors) == 1
    before = asyncio.run(engine.score(TOKENS))
    asyncio.run(update(engine, tensors))
    other_TMC = torch.from_numpy(asyncio.run(engine.routes(TOKENS)))[1:]
    assert router_disagreement(other_TMC[:, :1], trainer_TMC[:, :1]) == 1
    assert router_disagreement(other_TMC, trainer_TMC) >= 0.5
    assert not np.allclose(asyncio.run(engine.score(TOKENS)), before, atol=1e-2)
    asyncio.run(engine.shutdown())
