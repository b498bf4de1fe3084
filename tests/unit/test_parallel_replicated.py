import copy
import math

import pytest
import torch

from tests.kernel_calls import counted_calls
from tests.learn_tools import CPU, max_difference, objective, packs, policy, rollouts, scheduled, solo, weights
from togi.config.choices import Scheduler
from togi.learn.learner import Learner
from togi.parallel import replicated, trainable
from togi.parallel.backend import BackendOptions, decoder_blocks
from togi.parallel.process import World


def test_one_process_equals_a_plain_loop_bit_for_bit() -> None:
    model = policy()
    plain = copy.deepcopy(model)
    loss_of = objective()
    learner = Learner(
        trainable(model, World.solo(CPU), BackendOptions(bf16=False, l2=0.1)),
        loss_of,
        scheduled(Scheduler.CONSTANT, 1e-3, 4),
        1.0,
    )
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    for step in range(4):
        batches = packs(rollouts(4, seed=step), [3, 1])
        report = learner.update(batches)
        total = sum(loss_of.count(batch) for batch in batches)
        for batch in batches:
            (loss_of.loss(loss_of.forward(plain, batch), batch).sum / total).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        assert report.grad_norm == norm.item()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name


def test_clipping_equals_torch_on_the_whole_model() -> None:
    backend = trainable(policy(), World.solo(CPU), BackendOptions(bf16=False))
    plain = policy()
    loss_of = objective()
    batch = packs(rollouts(3), [3])[0]
    backend.backward(loss_of.loss(loss_of.forward(backend.module, batch), batch).sum, last=True)
    loss_of.loss(loss_of.forward(plain, batch), batch).sum.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item()
    assert norm > 0.5
    assert backend.clip(0.5) == norm
    backend.step(0.1)
    torch.optim.AdamW(plain.parameters(), 0.1, (0.9, 0.95), weight_decay=0.0, fused=True).step()
    for ours, theirs in zip(backend.module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.grad is None


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("max_norm", [0.05, math.inf])
def test_gradients_of_bfloat16_are_added_and_clipped_in_float32(
    monkeypatch: pytest.MonkeyPatch, micro_batches: int, max_norm: float, by_kernel: bool
) -> None:
    """A step of one micro-batch or two, by a kernel or some parameters at a time, is AdamW's with the sum in float32."""
    calls = counted_calls(monkeypatch, "adamw", "square_sum")
    if not by_kernel:
        monkeypatch.setattr(replicated, "compiled", lambda: None)
        monkeypatch.setattr(replicated, "BUCKET_ELEMENTS", 500)
    backend, loss_of = trainable(policy(), World.solo(CPU), BackendOptions(bf16=True)), objective()
    masters = {name: x.clone().requires_grad_() for name, x in backend.full_parameters()}
    batches = [packs(rollouts(3, seed=seed), [3])[0] for seed in range(micro_batches)]
    for batch in batches:
        plain = copy.deepcopy(backend.module)
        loss_of.loss(loss_of.forward(plain, batch), batch).sum.backward()
        for name, parameter in plain.named_parameters():
            before = masters[name].grad
            masters[name].grad = parameter.grad.float() + (0.0 if before is None else before)
        backend.backward(loss_of.loss(loss_of.forward(backend.module, batch), batch).sum, last=batch is batches[-1])
    norm = torch.nn.utils.clip_grad_norm_(masters.values(), max_norm).item()
    assert norm > 0.05
    assert backend.clip(max_norm) == pytest.approx(norm, rel=1e-6)
    backend.step(0.1)
    torch.optim.AdamW(masters.values(), 0.1, (0.9, 0.95), weight_decay=0.0, fused=True).step()
    for name, master in backend.full_parameters():
        torch.testing.assert_close(master, masters[name].detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(dict(backend.module.named_parameters())[name], master.bfloat16())
    count = len(masters) if by_kernel else 0
    assert calls == dict.fromkeys(calls, count) and len(calls) == (2 if by_kernel else 0)


def test_dropped_gradients_leave_nothing_for_the_next_step() -> None:
    """Neither gradients nor the factor that clips them: a factor of 1e-12 would leave AdamW less than its epsilon."""
    backend, loss_of = trainable(policy(), World.solo(CPU), BackendOptions(bf16=True)), objective()
    before = weights(backend)
    batch = packs(rollouts(3), [3])[0]

    def backward() -> None:
        backend.backward(loss_of.loss(loss_of.forward(backend.module, batch), batch).sum, last=True)

    backward()
    backend.clip(1e-12)
    backend.drop_gradients()
    backend.step(0.1)
    assert max_difference(before, weights(backend)) == 0
    backward()
    backend.clip(1e-12)
    backend.drop_gradients()
    backward()
    backend.step(0.1)
    assert max_difference(before, weights(backend)) > 0.05


def test_bf16_computes_with_rounded_masters() -> None:
    learner = solo(bf16=True)
    for step in range(3):
        learner.update(packs(rollouts(3, seed=step), [2, 1]))
    working = dict(learner.backend.module.named_parameters())
    for name, master in learner.backend.full_parameters():
        assert master.dtype == torch.float32
        assert working[name].dtype == torch.bfloat16
        assert torch.equal(master.bfloat16(), working[name])
        assert not torch.equal(master, working[name].float())
    sent = dict(learner.backend.full_parameters(torch.bfloat16))
    assert all(torch.equal(sent[name], working[name]) for name in working)


def test_biases_and_norms_are_not_decayed() -> None:
    learner = solo(lr=0.1)
    optimizer = learner.backend._optimizer
    decayed, others = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert {p.ndim for p in others["params"]} == {1}
    assert {p.ndim for p in decayed["params"]} == {2}


def test_frozen_parameters_stay_and_are_not_in_the_state() -> None:
    model = policy()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    learner = solo()
    learner.backend = trainable(model, World.solo(CPU), BackendOptions(bf16=True))
    before = weights(learner.backend)
    learner.update(packs(rollouts(2), [2]))
    after = weights(learner.backend)
    trained = set(learner.backend.shapes())
    assert trained == {name for name in before if "layers.1" in name}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == trained
    assert max_difference(before, after) > 0


def test_blocks_are_the_outermost_lists() -> None:
    model = policy()
    assert decoder_blocks(model) == list(model.hf.model.layers)
    assert decoder_blocks(torch.nn.Linear(1, 1)) == []


def test_a_world_of_one_needs_no_process_group() -> None:
    world = World.solo(CPU)
    assert world.sum("x", [1.5, 2.0]) == [1.5, 2.0]
    assert world.max("x", [3.0]) == [3.0]
    assert world.gather("x", "me") == ["me"]
    assert not torch.distributed.is_initialized()
