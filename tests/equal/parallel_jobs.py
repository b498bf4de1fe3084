"""What the ranks of ``test_parallel_ranks`` run; every function is started by ``run_ranks`` in fresh processes.

A layout is a backend and a ZeRO stage, such as ``deepspeed2``. DeepSpeed has no float64, so it is compared in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.learn_tools import (
    critic,
    learner,
    max_difference,
    packs,
    partition_small_weights,
    policy,
    rollouts,
    solo,
    weights,
)
from togi.batch import Batch
from togi.config.choices import BackendName, GradAccumDtype
from togi.config.shared import Recompute
from togi.learn.learner import Learner, StepOutcome, UpdateReport
from togi.learn.learner_state import load_learner, save_learner
from togi.learn.scorer import Scorer
from togi.model.layers import use_recompute
from togi.parallel import frozen, trainable
from togi.parallel.backend import BackendOptions, decoder_blocks
from togi.parallel.optimizer import Parking
from togi.parallel.process import World

STEPS = 5  # one of each plan below
RECOMPUTE_ABOVE = 7  # tokens: packs of the ranks lie on both sides of it, and of twice as many
LAYOUTS = tuple(f"{backend}{stage}" for backend in BackendName for stage in range(4))
# Layouts that differ in how they keep their state.
KEEPERS = ("fsdp22", "deepspeed1", "deepspeed2", "deepspeed3")
# An option for each layout that has it; offload last, whose checkpoint is looked at.
OPTIONS: tuple[tuple[str, dict[str, object]], ...] = (
    *((f"deepspeed{stage}", {"overlap_comm": True}) for stage in (1, 2, 3)),
    ("deepspeed3", {"zpg": 2}),
    *((layout, {"adam_offload": True}) for layout in ("fsdp22", "fsdp23", "deepspeed1", "deepspeed2", "deepspeed3")),
)
IDENTITY = {"model": "tiny"}
# For each step, which sizes of micro-batches every rank gets: ragged on purpose, once nothing at all.
PLANS = {
    1: [[[6]]] * 5,
    2: [[[2, 1, 1], [2]], [[6], []], [[], [1, 5]], [[1, 1], [1, 1, 1, 1]], [[3], [3]]],
    4: [
        [[2], [1, 1], [], [2]],
        [[6], [], [], []],
        [[1], [1], [2], [2]],
        [[1], [1, 1], [1, 1], [1]],
        [[3], [1], [1], [1]],
    ],
}


def own_batches(world: World, step: int) -> list[Batch]:
    """This rank's part of the six rollouts of a step."""
    samples, plan = rollouts(6, seed=step), PLANS[world.size][step % 5]
    start = sum(sum(sizes) for sizes in plan[: world.rank])
    sizes = plan[world.rank]
    return packs(samples[start : start + sum(sizes)], sizes)


def options_of(layout: str, **more: object) -> BackendOptions:
    backend, stage = BackendName(layout[:-1]), int(layout[-1])
    return BackendOptions(**{"bf16": False, "l2": 0.1, "backend": backend, "zero_stage": stage, **more})


def precise_learner(world: World, layout: str) -> Learner:
    dtype = torch.float32 if layout.startswith(BackendName.DEEPSPEED) else torch.float64
    return learner(trainable(policy(dtype=dtype), world, options_of(layout)))


def train(model: Learner, steps: Iterable[int]) -> list[UpdateReport]:
    return [model.update(own_batches(model.backend.world, step)) for step in steps]


def record(reports: list[UpdateReport], final: dict[str, Tensor]) -> dict[str, object]:
    metrics = [{**report.metrics, "grad_norm": report.grad_norm, "count": report.count} for report in reports]
    loads = [(report.padding_share, report.imbalance) for report in reports]
    return {"metrics": metrics, "weights": final, "loads": loads}


def two_ranks(world: World, folder: Path) -> None:
    partition_small_weights()
    layouts(world, folder)
    begin(world, folder)
    leave_checkpoints(world, folder)
    options_change_nothing(world, folder)
    sleep_changes_nothing(world, folder)
    accumulation_in_bfloat16(world)
    deepspeed_models(world)


def one_rank(world: World, folder: Path) -> None:
    partition_small_weights()
    layouts(world, folder)
    leave_checkpoints(world, folder)
    cross(world, folder)


def two_ranks_again(world: World, folder: Path) -> None:
    partition_small_weights()
    resume(world, folder)
    cross(world, folder)


def layouts(world: World, folder: Path) -> None:
    """A step of each plan in every layout, what a non-finite rank does, and what is kept of a model of which a half is trained."""
    for layout in LAYOUTS:
        model = precise_learner(world, layout)
        reports = train(model, range(STEPS))
        everyone = world.gather("test", [dict(report.metrics) for report in reports])
        assert all(one == everyone[0] for one in everyone), "ranks report different metrics"
        torch.save(record(reports, weights(model.backend)), folder / f"{layout}_{world.size}_{world.rank}.pt")
        skip_non_finite(world, model)
        drop_and_go_on(world, model)
        frozen_half(world, layout)
        Scorer(model.backend.module, world).logprobs(own_batches(world, 1))
    if world.size > 1:
        frozen_shards(world, folder)
        different_start(world)


def frozen_shards(world: World, folder: Path) -> None:
    """One whose shards lie in host memory gives the same bits."""
    options = BackendOptions(bf16=False, zero_stage=3)
    model = critic()
    scores = Scorer(model, world, frozen(model, world, options)).scores(own_batches(world, 0))
    torch.save(world.gather("test", scores.tolist()), folder / f"scores{world.rank}.pt")
    on_host = critic()
    around = frozen(on_host, world, options, on_host=True)
    assert all(isinstance(p, DTensor) and p.to_local().device.type == "cpu" for p in on_host.parameters())
    assert np.array_equal(Scorer(on_host, world, around).scores(own_batches(world, 0)), scores)


def sleep_changes_nothing(world: World, folder: Path) -> None:
    """In bfloat16 with float32 masters: between steps everything at rest is parked, and its weights can be read and sent."""
    sizes = {}
    for layout in LAYOUTS:
        plain, sleepy = (learner(trainable(policy(), world, options_of(layout, bf16=True))) for _ in range(2))
        backend = sleepy.backend
        parking = Parking(backend.at_rest, world.device)
        for step in range(3):
            sizes[layout] = parking.sleep().nbytes
            assert all(_part(tensor).untyped_storage().nbytes() == 0 for tensor in backend.at_rest())
            sent = (dict(model.backend.full_parameters(torch.bfloat16)) for model in (plain, sleepy))
            assert max_difference(*sent) == 0.0
            scores = [Scorer(each.backend.module, world).logprobs(own_batches(world, 0)) for each in (plain, sleepy)]
            assert all(np.array_equal(a, b) for a, b in zip(*scores, strict=True))
            parking.wake()
            reports = [train(each, [step])[0] for each in (plain, sleepy)]
            assert reports[0].metrics == reports[1].metrics and reports[0].grad_norm == reports[1].grad_norm, layout
        states = (dict(each.backend.state()) for each in (plain, sleepy))
        assert max_difference(*states) == 0.0, layout
    torch.save(sizes, folder / f"sleep{world.rank}.pt")


def _part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def skip_non_finite(world: World, model: Learner) -> None:
    """One rank's NaN must stop the step on every rank."""
    before = weights(model.backend)
    batches = own_batches(world, 0)
    if world.rank == 0:
        bad = batches[0].streams["advantages"].clone().fill_(math.nan)
        batches[0] = dataclasses.replace(batches[0], streams={**batches[0].streams, "advantages": bad})
    report = model.update(batches)
    assert report.outcome is StepOutcome.SKIPPED_NOT_FINITE
    assert model.update([]).outcome is StepOutcome.SKIPPED_EMPTY
    after = weights(model.backend)
    assert all(torch.equal(before[name], after[name]) for name in before)


def drop_and_go_on(world: World, model: Learner) -> None:
    """Nothing of a step that was skipped, or whose gradients were dropped, is left in the next one."""
    norm, backend = model.update(own_batches(world, 2)).grad_norm, model.backend
    assert math.isfinite(norm)
    seen = []
    for times in (1, 2):
        for batch in packs(rollouts(times), [1] * times):
            outputs = model.objective.forward(backend.module, batch)
            backend.backward(model.objective.loss(outputs, batch).sum, last=True)
            seen.append(backend.clip(math.inf))
            backend.drop_gradients()
    assert seen[0] == seen[1] != seen[2]


def frozen_half(world: World, layout: str) -> None:
    """Only what is trained changes, is in the state, and is given when asked for alone."""
    module = policy()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    model = learner(trainable(module, world, options_of(layout, bf16=True)))
    before = weights(model.backend)
    train(model, range(2))
    after = weights(model.backend)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(model.backend.shapes()) == {name for name in before if "layers.1" in name}
    assert dict(model.backend.full_parameters(trained_only=True)).keys() == changed
    assert {name.split("/")[1] for name, _ in model.backend.state()} == changed
    sent = dict(model.backend.full_parameters(torch.bfloat16))
    assert all(torch.equal(sent[name], after[name].bfloat16()) for name in after)


def different_start(world: World) -> None:
    """Ranks that bring different weights are refused, whatever the layout."""
    for layout in ("fsdp20", "fsdp22", "deepspeed2"):
        try:
            trainable(policy(seed=world.rank), world, options_of(layout))
        except AssertionError as error:
            assert "seed every rank alike" in str(error)
        else:
            raise AssertionError("different weights were accepted")


def four(world: World, folder: Path) -> None:
    """Stage 3 with recomputed activations, on each rank of as many layers as its own pack asks for."""
    model = precise_learner(world, "fsdp23")
    hf = model.backend.module.hf
    use_recompute(hf, Recompute(above=RECOMPUTE_ABOVE))
    reports, seen = [], set()
    for step in range(STEPS):
        reports += train(model, [step])
        seen.add(tuple(world.gather("test", sum(layer.gradient_checkpointing for layer in decoder_blocks(hf)))))
    assert any({0, 1, 2} <= set(counts) for counts in seen), seen
    torch.save(record(reports, weights(model.backend)), folder / f"four{world.rank}.pt")


def mixed(world: World, layout: str) -> Learner:
    """bfloat16 over float32 masters, as in a real run."""
    return learner(trainable(policy(), world, options_of(layout, bf16=True)))


def begin(world: World, folder: Path) -> None:
    """Two steps, save, two more."""
    for layout in KEEPERS:
        model = mixed(world, layout)
        train(model, range(2))
        torch.manual_seed(5 + world.rank)
        np.random.seed(7 + world.rank)
        save_learner(model, folder / layout, IDENTITY)
        finish(world, model, train(model, range(2, 4)), folder / f"{layout}_uninterrupted")
    if world.rank == 0:
        alone = solo(bf16=True)
        train(alone, range(2))
        save_learner(alone, folder / "solo", IDENTITY)
        finish(alone.backend.world, alone, train(alone, range(2, 4)), folder / "solo_uninterrupted")


def resume(world: World, folder: Path) -> None:
    """Load in fresh processes and take the last two steps."""
    for layout in KEEPERS:
        model = mixed(world, layout)
        load_learner(model, folder / layout, IDENTITY)
        finish(world, model, train(model, range(2, 4)), folder / f"{layout}_resumed")
    if world.rank == 0:
        alone = solo(bf16=True)
        load_learner(alone, folder / "solo", IDENTITY)
        finish(alone.backend.world, alone, train(alone, range(2, 4)), folder / "solo_resumed")


def leave_checkpoints(world: World, folder: Path) -> None:
    """Three float32 steps in each layout, and a checkpoint. One process also keeps the next two steps."""
    for layout in KEEPERS:
        model = learner(trainable(policy(), world, options_of(layout)))
        train(model, range(3))
        save_learner(model, folder / f"{layout}_{world.size}", IDENTITY)
        if world.size == 1:
            finish(world, model, train(model, range(3, 5)), folder / f"{layout}_straight")


def cross(world: World, folder: Path) -> None:
    """Every layout goes on from checkpoints of one process and of two, each of another layout."""
    for i, layout in enumerate(KEEPERS):
        for size, source in ((1, KEEPERS[i - 1]), (2, KEEPERS[i - 2]), (3 - world.size, layout)):
            model = learner(trainable(policy(), world, options_of(layout)))
            load_learner(model, folder / f"{source}_{size}", IDENTITY)
            assert same_state(model, folder / f"{source}_{size}"), (layout, source, size)
            reports = train(model, range(3, 5))
            finish(world, model, reports, folder / f"crossed_{world.size}_{layout}_{size}_{source}")


def options_change_nothing(world: World, folder: Path) -> None:
    """Where optimizer states live and how gradients and weights travel makes no difference to what is learnt."""
    plain: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for layout, more in OPTIONS:
        for bf16 in (False, True):
            if (layout, bf16) not in plain:
                plain[layout, bf16], _ = trained_with(world, layout, bf16=bf16)
            final, model = trained_with(world, layout, bf16=bf16, **more)
            assert max_difference(final, plain[layout, bf16]) < 1e-6, (layout, bf16, more)
            skip_non_finite(world, model)
            drop_and_go_on(world, model)
    save_learner(model, folder / "offloaded", IDENTITY)
    again = learner(trainable(policy(), world, options_of(layout, bf16=True, **more)))
    load_learner(again, folder / "offloaded", IDENTITY)
    assert same_state(again, folder / "offloaded")
    model.update(own_batches(world, 3))
    again.update(own_batches(world, 3))
    assert max_difference(weights(again.backend), weights(model.backend)) == 0.0


def trained_with(world: World, layout: str, arch: str = "llama", **more: object) -> tuple[dict[str, Tensor], Learner]:
    """The weights after three steps."""
    model = learner(trainable(policy(arch=arch), world, options_of(layout, **more)))
    train(model, range(3))
    return weights(model.backend), model


def accumulation_in_bfloat16(world: World) -> None:
    """Loses small terms, so it can be told from float32, and not many."""
    for layout in KEEPERS[1:]:
        wide, narrow = (
            trained_with(world, layout, bf16=True, grad_accum_dtype=dtype)[0]
            for dtype in (GradAccumDtype.FP32, GradAccumDtype.BF16)
        )
        assert 1e-5 < max_difference(wide, narrow) < 1e-2, layout


def deepspeed_models(world: World) -> None:
    """Experts of which each rank runs others, and recomputed activations, under every stage against plain replicas."""
    for arch in ("llama", "mixtral"):
        reference, _ = trained_with(world, "fsdp20", arch)
        for layout in ("deepspeed2", "deepspeed3"):
            assert max_difference(trained_with(world, layout, arch)[0], reference) < 1e-5, (arch, layout)
            for reentrant in (False, True):
                module = policy(arch=arch)
                module.hf.gradient_checkpointing_enable({"use_reentrant": reentrant})
                if reentrant:
                    module.hf.enable_input_require_grads()
                model = learner(trainable(module, world, options_of(layout)))
                train(model, range(3))
                assert max_difference(weights(model.backend), reference) < 1e-5, (arch, layout, reentrant)


def same_state(model: Learner, checkpoint: Path) -> bool:
    """Whether the learner's masters and moments are those of the checkpoint, bit for bit."""
    saved = load_file(checkpoint / "tensors_00001.safetensors")
    now = dict(model.backend.state())
    assert now.keys() == saved.keys()
    return all(torch.equal(saved[name], now[name]) for name in saved)


def finish(world: World, model: Learner, reports: list[UpdateReport], path: Path) -> None:
    draws = world.gather("test", (torch.rand(3).tolist(), np.random.rand(3).tolist()))
    final = weights(model.backend)
    if world.rank == 0:
        torch.save({**record(reports, final), "draws": draws, "steps": model.steps}, path)


def assert_same(result: dict[str, object], reference: dict[str, object], tolerance: float = 1e-9) -> None:
    for step, (ours, theirs) in enumerate(zip(result["metrics"], reference["metrics"], strict=True)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance / 100), (step, name)
    assert max_difference(result["weights"], reference["weights"]) < tolerance
