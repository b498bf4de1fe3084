"""What the ranks of ``test_ring`` run, and what one process computes."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.equal.objective_jobs import NAMES
from tests.learn_tools import critic, objective, policy, rollouts, scheduled, weights
from tests.objective_cases import CASES
from tests.packs import Group, make_segments, random_groups, shared_pack
from tests.tiny import tiny_model
from tests.tree_cases import episodes
from togi.batch import NO_PREFIX, Batch, Segments
from togi.config.choices import Scheduler
from togi.data.packing import pack
from togi.learn.learner import Learner
from togi.learn.objective import ValueObjective
from togi.model.attention import SEGMENTS, segment_attention
from togi.model.policy import Needs, PolicyModel
from togi.model.ring_attention import ring_attention
from togi.model.ring_layout import RingTable, deal, packed_indices
from togi.parallel import trainable
from togi.parallel.backend import BackendOptions
from togi.parallel.groups import Ring
from togi.parallel.process import World

HEADS, GROUPS, WIDTH = 8, 4, 16
# a prompt with three responses, one of which goes on in two; a long and two short sequences
TREE = make_segments([60, 9, 40, 9, 17, 3, 90, 5, 1], [NO_PREFIX, 0, 0, 0, 2, 2, NO_PREFIX, NO_PREFIX, NO_PREFIX])
TABLES = {
    "one": make_segments([101], [NO_PREFIX]),
    "tree": TREE,
    "whole": make_segments([16] * 8, [NO_PREFIX] * 8),
    "few": make_segments([1, 1, 1], [NO_PREFIX, 0, NO_PREFIX]),
}
WINDOWS = (None, 1, 7, 50)
MODULE = torch.nn.Identity()
SHAPES = [(30, [9, 21, 9]), (70, [1]), (3, [5, 4])]


def inputs(segments: Segments, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, over the whole pack."""
    torch.manual_seed(0)
    total = sum(segments.lengths_S)
    sizes = (HEADS, GROUPS, GROUPS, HEADS)
    return [torch.randn(1, heads, total, WIDTH, dtype=torch.float64).to(dtype) for heads in sizes]


def attended(segments: Segments, window: int | None, dtype: torch.dtype) -> list[Tensor]:
    """Output [T, H, D] and gradients [H, T, D], by one process."""
    q, k, v, up = inputs(segments, dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = segment_attention(MODULE, *leaves, None, segments=segments, sliding_window=window, scaling=0.3)
    out.backward(up.transpose(1, 2))
    return [out.detach()[0], *(x.grad[0] for x in leaves)]


def attended_in_ring(
    ring: Ring, stride: int, segments: Segments, window: int | None, dtype: torch.dtype
) -> list[Tensor]:
    """The same of this rank's tokens, put in their places; the others' are 0."""
    shards = deal(segments, ring.size)
    rows = packed_indices(shards.segments, shards.chunks[ring.rank])
    fillers = sum(shards.segments.lengths_S) - sum(segments.lengths_S)
    whole = [torch.cat([x, torch.ones(1, x.shape[1], fillers, WIDTH, dtype=dtype)], 2) for x in inputs(segments, dtype)]
    q, k, v, up = (x[:, :, rows].clone() for x in whole)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    table = RingTable(shards, ring, stride)
    out, _ = ring_attention(MODULE, *leaves, None, segments=table, sliding_window=window, scaling=0.3)
    out.backward(up.transpose(1, 2))
    results = [out.detach()[0], *(x.grad[0].transpose(0, 1) for x in leaves)]
    total = sum(segments.lengths_S)
    placed = [x.new_zeros(total + fillers, *x.shape[1:]).index_copy(0, rows, x)[:total] for x in results]
    return [placed[0], *(x.transpose(0, 1) for x in placed[1:])]


def attention(world: World, folder: Path) -> None:
    """Every table in rings of all ranks and, with four, of two; float64 but for one in bfloat16 and one in float32."""
    for size in {world.size, 2}:
        ring = Ring(world.in_teams(size))
        for name, segments in TABLES.items():
            for stride in (1, 2, GROUPS):
                for window in WINDOWS:
                    parts = attended_in_ring(ring, stride, segments, window, torch.float64)
                    _keep(ring, parts, folder / f"{size}_{name}_{stride}_{window}_{world.rank // size}.pt")
        for dtype in (torch.float32, torch.bfloat16):
            parts = attended_in_ring(ring, 2, TREE, None, dtype)
            _keep(ring, [x.float() for x in parts], folder / f"{size}_{dtype}_{world.rank // size}.pt")


def _keep(ring: Ring, parts: list[Tensor], file: Path) -> None:
    for part in parts:
        ring.add_up(part)
    if ring.rank == 0:
        torch.save(parts, file)


# ---- models


def groups() -> list[Group]:
    return random_groups(0, SHAPES)


def forward(model: PolicyModel, batch: Batch) -> dict[str, Any]:
    """Log-probs, entropies and the gradient of a loss made of both."""
    outputs = model(batch, Needs(logprobs=True, entropy=True), 0.7)
    loss = (outputs.logprobs_K * outputs.logprobs_K.detach().cos()).sum() + 0.3 * outputs.entropy_K.sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logprobs": outputs.logprobs_K.detach(), "entropy": outputs.entropy_K.detach(), "gradients": gradients}


def gqa_policy(arch: str) -> PolicyModel:
    """Float32, four query heads on two key/value heads."""
    hf = tiny_model(arch, num_attention_heads=4, num_key_value_heads=2)
    hf.set_attn_implementation(SEGMENTS)
    return PolicyModel(hf)


ARCHITECTURES = ("qwen3", "gemma3_text")


def models(world: World, folder: Path) -> None:
    """Forward and backward of two models, one with window layers, with and without gradient checkpointing."""
    ring = Ring(world.in_teams(world.size))
    for arch in ARCHITECTURES:
        for stride in (1, 2):
            model = gqa_policy(arch)
            model.join_ring(ring, stride)
            if stride == 2:
                model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                model.train()
            result = forward(model, shared_pack(groups()))
            for gradient in result["gradients"].values():
                ring.add_up(gradient)
            if ring.rank == 0:
                torch.save(result, folder / f"{arch}_{stride}.pt")


# ---- objectives: two float64 steps of each, in rings, replicated and sharded


def samples_of(name: str) -> tuple[list, int, Any, Any]:
    """Samples, how many stay together, the objective, the model."""
    if name == "policy":
        return rollouts(6), 1, objective(), policy(dtype=torch.float64)
    if name == "value":
        return rollouts(6), 1, ValueObjective(0.2), critic().double()
    if name == "tree":
        return episodes(6, 5, turns=6), 2, objective(), policy(dtype=torch.float64)
    if name == "tree_value":
        return episodes(6, 5, turns=6), 2, ValueObjective(0.2), critic().double()
    case = CASES[name]
    return case.samples(), case.unit, case.make(), case.model()


OBJECTIVES = (*NAMES, "policy", "value", "tree", "tree_value")


def trained(world: World, name: str, stage: int, ring: Ring | None) -> dict[str, Any]:
    """``world`` in rings: two shares have ragged parts of the samples, one has all in two batches; prompts are shared.

    The first batch has one row or pair, which a ring must cut.
    """
    samples, unit, goal, model = samples_of(name)
    cuts = [0, unit, len(samples)]
    if world.shares == 2:
        cuts = [0, unit] if world.share == 0 else [unit, 2 * unit, len(samples)]
    if ring is not None:
        model.join_ring(ring, 1)
        if name.startswith("kd"):
            goal.teacher.join_ring(ring, 1)
    backend = trainable(model, world, BackendOptions(bf16=False, zero_stage=stage))
    learner = Learner(backend, goal, scheduled(Scheduler.CONSTANT, 1e-3, 2), math.inf)
    batches = [pack(samples[a:b], share_prefix=True) for a, b in pairwise(cuts)]
    reports = [learner.update(batches) for _ in range(2)]
    metrics = [{**report.metrics, "grad_norm": report.grad_norm, "count": report.count} for report in reports]
    logprobs = [part for report in reports for part in report.logprobs] if world.shares == 1 else []
    return {"metrics": metrics, "weights": weights(backend), "logprobs": logprobs}


def objectives(world: World, folder: Path) -> None:
    """Two ranks are one ring; four are two rings of two, with a share each."""
    rings = world.in_teams(2)
    ring = Ring(rings)
    for name in OBJECTIVES:
        for stage in (0, 3):
            result = trained(rings, name, stage, ring)
            if world.is_first:
                torch.save(result, folder / f"{name}_{stage}_{world.size}.pt")


def everything(world: World, folder: Path) -> None:
    attention(world, folder)
    models(world, folder)
    objectives(world, folder)
