"""What the ranks of ``test_fsdp2`` run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from tests.equal import parallel_jobs as jobs
from tests.learn_tools import critic, learner, max_difference, objective, policy, weights
from togi.learn.learner import Learner
from togi.learn.learner_state import load_learner, save_learner
from togi.learn.scorer import Scorer, measure
from togi.parallel import frozen, trainable
from togi.parallel.backend import Backend
from togi.parallel.process import World

SHARD_SIZE = 2
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


def groups_of_shards(world: World, folder: Path) -> None:
    """The same training with shards within groups, for every stage; with AdamW on the host; from each other's checkpoints."""
    for stage in STAGES:
        for name, more in (("", {}), ("_host", {"adam_offload": True})):
            model = precise(world, stage, fsdp_shard_size=SHARD_SIZE, **more)
            assert_in_groups(world, model.backend)
            record = jobs.record(jobs.train(model, range(jobs.STEPS)), weights(model.backend))
            torch.save(record, folder / f"groups{stage}{name}_{world.rank}.pt")
            jobs.skip_non_finite(world, model)
    for source, target in ((SHARD_SIZE, None), (None, SHARD_SIZE)):
        model = precise(world, 2, fsdp_shard_size=source)
        jobs.train(model, range(2))
        save_learner(model, folder / f"from_{source}", jobs.IDENTITY)
        again = precise(world, 3, fsdp_shard_size=target)
        load_learner(again, folder / f"from_{source}", jobs.IDENTITY)
        assert jobs.same_state(again, folder / f"from_{source}")
        ours, theirs = (jobs.record(jobs.train(each, [2]), weights(each.backend)) for each in (again, model))
        jobs.assert_same(ours, theirs)
    scores = []
    for size in (None, SHARD_SIZE):
        module = critic()
        around = frozen(module, world, jobs.options_of("fsdp23", fsdp_shard_size=size))
        scores.append(Scorer(module, world, around).scores(jobs.own_batches(world, 0)))
    assert np.array_equal(*scores)


def precise(world: World, stage: int, **more: object) -> Learner:
    return learner(trainable(policy(dtype=torch.float64), world, jobs.options_of(f"fsdp2{stage}", **more)))


def assert_in_groups(world: World, backend: Backend) -> None:
    """Each rank holds one half of every weight, the same as the other rank with its place in a group."""
    for name, parameter in backend.module.named_parameters():
        assert isinstance(parameter, DTensor)
        halves = world.gather("test", parameter.to_local().detach())
        assert len(halves[0]) == -(-len(parameter) // SHARD_SIZE), name
        assert torch.equal(halves[0], halves[2]) and torch.equal(halves[1], halves[3]), name
        assert torch.equal(torch.cat(halves[:2]), parameter.full_tensor()), name
