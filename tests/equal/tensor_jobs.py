"""What the ranks of ``test_tensor_parallel`` run, and what one process computes."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification

from tests.equal.parallel_jobs import IDENTITY, PLANS, finish, record, same_state
from tests.learn_tools import learner, packs, rollouts, scheduled, weights
from tests.tiny import tiny_config, tiny_model
from togi.batch import Batch
from togi.config.architectures import SPLITTABLE
from togi.config.choices import Scheduler
from togi.learn.learner import Learner, UpdateReport
from togi.learn.learner_state import load_learner, save_learner
from togi.learn.objective import ValueObjective
from togi.learn.scorer import Scorer
from togi.model.attention import SEGMENTS
from togi.model.policy import PolicyModel, ScalarModel
from togi.parallel import trainable
from togi.parallel.backend import BackendOptions
from togi.parallel.process import World

STEPS = 5
STAGES = (1, 2, 3)
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
# Odd sizes, so that FSDP2 cuts what tensor parallelism left in unequal parts.
SIZES = {"intermediate_size": 90, "head_dim": 18, "vocab_size": 301}


def model_of(arch: str) -> PolicyModel | ScalarModel:
    """Float64, two layers; a critic for "critic"."""
    if arch == "critic":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = tiny_config(num_labels=1, initializer_range=0.1, **HEADS)
            hf = AutoModelForSequenceClassification.from_config(config, dtype=torch.float64)
        hf.set_attn_implementation(SEGMENTS)
        return ScalarModel(hf)
    tied = {"tie_word_embeddings": arch == "qwen3"}
    hf = tiny_model(arch, dtype=torch.float64, **HEADS, **SIZES, **tied)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in hf.named_parameters():
            if name.endswith("bias"):  # Qwen2's are drawn as 0
                torch.nn.init.normal_(parameter)
    hf.set_attn_implementation(SEGMENTS)
    return PolicyModel(hf)


def own_batches(world: World, step: int) -> list[Batch]:
    """This group's part of the six rollouts of a step: ragged, once nothing at all for one of two groups."""
    samples, plan = rollouts(6, seed=step), PLANS[world.shares][step % 5]
    start = sum(sum(sizes) for sizes in plan[: world.share])
    sizes = plan[world.share] if world.shares > 1 else [2, 1, 3]
    return packs(samples[start : start + sum(sizes)], sizes)


def learner_of(world: World, arch: str, stage: int, **more: object) -> Learner:
    options = BackendOptions(**{"bf16": False, "l2": 0.1, "zero_stage": stage, **more})
    module = model_of(arch)
    if options.bf16:
        module = module.float()
    backend = trainable(module, world, options)
    if arch == "critic":
        return Learner(backend, ValueObjective(0.2), scheduled(Scheduler.LINEAR, 1e-3, 10), 1.0)
    return learner(backend)


def train(model: Learner, steps: range) -> list[UpdateReport]:
    return [model.update(own_batches(model.backend.world, step)) for step in steps]


def trained(world: World, arch: str, stage: int, *, checkpointing: bool = False) -> dict[str, object]:
    model = learner_of(world, arch, stage)
    if checkpointing:
        model.backend.module.hf.gradient_checkpointing_enable({"use_reentrant": False})
    return record(train(model, range(STEPS)), weights(model.backend))


ARCHS = (*SPLITTABLE, "critic")


def two_ranks(world: World, folder: Path) -> None:
    """One group: every architecture, and every stage with the first."""
    world = world.in_teams(1, 2)
    for arch in ARCHS:
        for stage in STAGES if arch == ARCHS[0] else (3,):
            result = trained(world, arch, stage, checkpointing=stage == 3)
            torch.save(result, folder / f"{arch}_{stage}_{world.rank}.pt")
    holds_parts(world)
    skips_what_is_not_finite(world)
    checkpoints(world, folder)


def holds_parts(world: World) -> None:
    """Each rank has half of the heads and hidden units, and is asked for no more."""
    model = learner_of(world, "qwen3", 2)
    for name, parameter in model.backend.module.named_parameters():
        assert isinstance(parameter, DTensor)
        share = parameter.to_local().numel() / parameter.numel()
        assert share == 1 if "norm" in name and ".layers." in name else share < 0.51, name


def skips_what_is_not_finite(world: World) -> None:
    """A norm that is not finite on all ranks alike, and clipping to nothing."""
    model = learner_of(world, "llama", 2)
    batches = own_batches(world, 0)
    batches[0].streams["advantages"].fill_(math.nan)
    before = weights(model.backend)
    assert not math.isfinite(model.update(batches).grad_norm)
    after = weights(model.backend)
    assert all(torch.equal(before[name], after[name]) for name in before)


def checkpoints(world: World, folder: Path) -> None:
    """bfloat16 over float32 masters: two steps, save, two more; then load and take those again."""
    model = learner_of(world, "qwen3", 2, bf16=True)
    train(model, range(2))
    save_learner(model, folder / "saved", IDENTITY)
    finish(world, model, train(model, range(2, 4)), folder / "uninterrupted")
    again = learner_of(world, "qwen3", 3, bf16=True)
    load_learner(again, folder / "saved", IDENTITY)
    assert same_state(again, folder / "saved")
    finish(world, again, train(again, range(2, 4)), folder / "resumed")
    scores = Scorer(again.backend.module, world).logprobs(own_batches(world, 1))
    assert world.gather("test", [part.tolist() for part in scores])[0] == [part.tolist() for part in scores]


def four_ranks(world: World, folder: Path) -> None:
    """Two groups of two with a ragged share each; and a checkpoint of one group goes on in two."""
    world = world.in_teams(1, 2)
    for arch, stage in (("qwen3", 3), ("llama", 1)):
        result = trained(world, arch, stage)
        torch.save(result, folder / f"{arch}_{stage}_{world.rank}.pt")
    if (folder / "saved").is_dir():
        model = learner_of(world, "qwen3", 2, bf16=True)
        load_learner(model, folder / "saved", IDENTITY)
        assert same_state(model, folder / "saved")
