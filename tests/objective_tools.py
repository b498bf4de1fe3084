"""Small rows, outputs chosen by hand, and a few updates: what the tests of objectives share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tests.learn_tools import CPU, scheduled
from togi.batch import Batch
from togi.config.choices import Scheduler
from togi.data.packing import pack
from togi.learn.learner import Learner
from togi.learn.objective import Objective
from togi.model.policy import Outputs
from togi.obs.metrics import merge, reduced
from togi.parallel import trainable
from togi.parallel.backend import BackendOptions
from togi.parallel.process import World
from togi.sample import Sample

LOG2, LOG3 = math.log(2), math.log(3)


def row(length: int, group: str, values: dict[str, float], ref: Sequence[float] = (), prompt: int = 1) -> Sample:
    """``prompt`` tokens, then a response, all of it in the loss."""
    mask = np.arange(length) >= prompt
    stream = np.full(length, np.nan, dtype=np.float32)
    if ref:
        stream[mask] = ref
    return Sample(np.arange(length), mask, prompt, group, {"ref_logprobs": stream} if ref else {}, values)


def pair(group: str, chosen: int, rejected: int, margin: float = 0.0) -> list[Sample]:
    """Responses of so many tokens, one token of prompt, reference log-probs of -1 everywhere."""
    sides = ((1.0, chosen), (0.0, rejected))
    return [row(1 + n, group, {"chosen": mark, "margin": margin}, [-1.0] * n) for mark, n in sides]


def summary(objective: Objective, outputs: Outputs, batch: Batch) -> dict[str, float]:
    return objective.summary(reduced(merge([objective.loss(outputs, batch).metrics])))


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def learner(model: nn.Module, objective: Objective) -> Learner:
    backend = trainable(model, World.solo(CPU), BackendOptions(bf16=False))
    return Learner(backend, objective, scheduled(Scheduler.CONSTANT, 1e-3, 8), 1.0)


def history(learner: Learner, samples: Sequence[Sample], number: int = 8) -> list[dict[str, float]]:
    """Metrics before each of some updates on the same rows, in two micro-batches."""
    batches = [pack(samples[:2], share_prefix=True), pack(samples[2:], share_prefix=True)]
    return [dict(learner.update(batches).metrics) for _ in range(number)]
