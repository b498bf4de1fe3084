"""What the ranks of ``test_objective_ranks`` run."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import torch

from tests.learn_tools import scheduled, weights
from tests.objective_cases import CASES, Case
from togi.batch import Batch
from togi.config.choices import Scheduler
from togi.data.packing import pack
from togi.learn.learner import Learner
from togi.parallel import trainable
from togi.parallel.backend import BackendOptions
from togi.parallel.process import World

NAMES = (
    "episodes",
    "sft",
    "rm_margin",
    "dpo_nll",
    "kto",
    "prm_vocabulary",
    "prm_soft",
    "kd_forward",
    "kd_reverse",
    "kd_on_policy",
    "policy_gspo",
    "policy_seq_mask",
)


def own_batches(world: World, case: Case) -> list[Batch]:
    """Ragged: the first rank has one unit, the last the rest in two micro-batches."""
    samples, unit = case.samples(), case.unit
    if world.size == 1:
        return [pack(samples, share_prefix=False)]
    cuts = [0, unit] if world.rank == 0 else [unit, 2 * unit, len(samples)]
    return [pack(samples[a:b], share_prefix=False) for a, b in pairwise(cuts)]


def train(world: World, name: str, stage: int) -> dict[str, object]:
    """Two float64 steps on the same rows."""
    case = CASES[name]
    backend = trainable(case.model(), world, BackendOptions(bf16=False, zero_stage=stage))
    learner = Learner(backend, case.make(), scheduled(Scheduler.CONSTANT, 1e-3, 2), math.inf)
    reports = [learner.update(own_batches(world, case)) for _ in range(2)]
    metrics = [{**report.metrics, "grad_norm": report.grad_norm, "count": report.count} for report in reports]
    return {"metrics": metrics, "weights": weights(backend)}


def everything(world: World, folder: Path) -> None:
    for name in NAMES:
        for stage in (0, 3):
            result = train(world, name, stage)
            if world.is_first:
                torch.save(result, folder / f"{name}_{stage}.pt")
