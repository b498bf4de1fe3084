"""What the ranks of ``test_fsdp2`` run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from tests.equal import parallel_jobs as jobs
from tests.learn_tools import learner, max_difference, objective, policy, weights
from togi.learn.scorer import Scorer, measure
from togi.parallel import trainable
from togi.parallel.backend import Backend
from togi.parallel.process import World

STAGES = (1, 2, 3)


def scoring_leaves_shards(world: World, folder: Path) -> None:
    """After every call that runs forwards alone, no rank holds whole weights, and the masters are read as they are."""
    for stage in STAGES:
        module = policy()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("layers.0" not in name)  # as the base of an adapter is
        scored, plain = (
            learner(trainable(policy(), world, jobs.options_of(f"fsdp2{stage}", bf16=True))) for _ in range(2)
        )
        half = learner(trainable(module, world, jobs.options_of(f"fsdp2{stage}", bf16=True)))
        jobs.train(plain, [0])
        for model in (scored, half):
            jobs.train(model, [0])
            batches = jobs.own_batches(world, 1)
            scorer = Scorer(model.backend.module, world)
            for call in (scorer.logprobs, partial(measure, scorer.module, objective(), world)):
                call(batches)
                assert_sharded(model.backend)
                masters = {
                    name: x for kind, x in model.backend.state() if (name := kind.removeprefix("master/")) != kind
                }
                whole = dict(model.backend.full_parameters(None, trained_only=True))
                assert whole.keys() == masters.keys()
                assert all(x.dtype == torch.float32 and torch.equal(x, masters[name]) for name, x in whole.items())
                sent = dict(model.backend.full_parameters(torch.bfloat16))
                assert all(torch.equal(sent[name], x.bfloat16()) for name, x in masters.items())
        # and a step after it is the step without it
        assert jobs.train(scored, [1])[0].metrics == jobs.train(plain, [1])[0].metrics
        assert max_difference(weights(scored.backend), weights(plain.backend)) == 0.0


def assert_sharded(backend: Backend) -> None:
    whole = [name for name, parameter in backend.module.named_parameters() if not isinstance(parameter, DTensor)]
    assert not whole, whole
