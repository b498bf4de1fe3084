"""The learner on the device beside the same steps on the CPU, sleep and wake, memory that is pinned, determinism."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from gpu.tools import Figures, error, need_package

if TYPE_CHECKING:
    from togi.learn.learner import Learner
    from togi.parallel.backend import Backend, BackendOptions
    from togi.parallel.process import World

Make = Callable[[nn.Module, "World", "BackendOptions"], "Backend"]
STEPS = 3


def learners(device: torch.device, small: bool) -> Figures:
    """Three steps of a tiny model in bfloat16: replicated, with AdamW in host memory, with FSDP2 in a world of one."""
    from togi.parallel import trainable
    from togi.parallel.fsdp2 import Sharded

    yield "replicated: apart / moved", _against_cpu(device, trainable)
    yield "adam_offload: apart / moved", _against_cpu(device, trainable, adam_offload=True)
    for stage in (2, 3):
        yield f"FSDP2 stage {stage}: apart / moved", _against_cpu(device, Sharded, group=True, zero_stage=stage)


def deepspeed(device: torch.device, small: bool) -> Figures:
    """The same with DeepSpeed's stages."""
    need_package("deepspeed")
    from togi.config.choices import BackendName
    from togi.parallel import trainable

    for stage in (2, 3):
        options = {"backend": BackendName.DEEPSPEED, "zero_stage": stage}
        yield f"stage {stage}: apart / moved", _against_cpu(device, trainable, group=True, **options)


def _world(device: torch.device, group: bool) -> World:
    from togi.parallel.process import World

    world = World.solo(device)
    if group:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        world.open_group()
    return world


def _against_cpu(device: torch.device, make: Make, *, group: bool = False, **options: object) -> float:
    """How far the weights end from those of the same steps on the CPU, as a share of how far they went (means)."""
    from tests import learn_tools as tools
    from togi.parallel.backend import BackendOptions

    chosen = BackendOptions(bf16=True, l2=0.1, **options)
    learner = tools.learner(make(tools.policy(), _world(device, group), chosen))
    reference = tools.solo(bf16=True)
    start = tools.weights(reference.backend)
    for each in (learner, reference):
        _train(each)
    found = {name: tensor.float().cpu() for name, tensor in learner.backend.full_parameters()}
    expected = tools.weights(reference.backend)
    tools.assert_nearly_as_far(start, expected, found)
    apart = sum(float((found[name] - expected[name]).abs().sum()) for name in expected)
    return apart / sum(float((expected[name] - start[name]).abs().sum()) for name in expected)


def _train(learner: Learner) -> None:
    from tests.learn_tools import packs, rollouts

    for step in range(STEPS):
        report = learner.update(packs(rollouts(6, step), [4, 2]))
        assert str(report.outcome) == "updated", f"step {step}: {report.outcome}"


def sleep(device: torch.device, small: bool) -> Figures:
    """Sleep and wake of a learner's state, weights in host memory, and how much memory is pinned for them."""
    from tests import learn_tools as tools
    from togi.parallel import trainable
    from togi.parallel.backend import BackendOptions
    from togi.parallel.optimizer import HostWeights, Parking

    # a learner: each bit comes back, and a step after it is the same
    pair = [
        tools.learner(trainable(tools.policy(), _world(device, False), BackendOptions(bf16=True))) for _ in range(2)
    ]
    _train(pair[0])
    _train(pair[1])
    before = [tensor.detach().clone() for tensor in pair[0].backend.at_rest()]
    parking = Parking(pair[0].backend.at_rest, device)
    parking.sleep()
    parking.wake()
    assert all(map(torch.equal, before, pair[0].backend.at_rest())), "waking did not restore each bit"
    _train(pair[0])
    _train(pair[1])
    differing = tools.max_difference(*(tools.weights(learner.backend) for learner in pair))
    assert differing == 0, f"a step after waking differs by {differing}"
    # memory: three tensors whose sizes are no powers of two
    megabytes = 3 if small else 300
    tensors = [torch.full((megabytes * 10**6 // 4,), float(i), device=device) for i in range(3)]
    pinned, asked = _pinned(device), 3 * megabytes * 10**6
    parking = Parking(lambda: tensors, device)
    released = parking.sleep()
    yield "parked MB", released.nbytes / 1e6
    yield "memory fell by MB", (released.before - released.after) / 1e6
    yield "pinned bytes / parked bytes", (_pinned(device) - pinned) / asked
    released.check("the learner")
    parking.wake()
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(tensors))
    # frozen weights in host memory
    module = nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(4 if small else 40)))
    inputs = torch.randn(4, 1000)
    expected = module(inputs).detach()
    pinned = _pinned(device)
    host = HostWeights(module.requires_grad_(False), device)
    with host.on_device():
        found = module(inputs.to(device)).cpu()
    weights = sum(weight.nbytes for weight in module.parameters())
    yield "pinned bytes / bytes of weights in host memory", (_pinned(device) - pinned) / weights
    yield "error with weights in host memory", error(found, expected)
    assert error(found, expected) < 1e-3


def _pinned(device: torch.device) -> int:
    """Bytes that PyTorch has pinned, as it has rounded them up; 0 on a CPU."""
    return 0 if device.type == "cpu" else int(torch.cuda.host_memory_stats()["allocated_bytes.current"])


def determinism(device: torch.device, small: bool) -> Figures:
    """--full_determinism: the same steps twice, with FlashAttention where there is one, give the same bits."""
    from tests import learn_tools as tools
    from togi.model.attention import VARLEN
    from togi.parallel import trainable
    from togi.parallel.backend import BackendOptions
    from togi.parallel.process import be_deterministic

    be_deterministic()
    ends = []
    for _ in range(2):
        model = tools.policy()
        model.hf.set_attn_implementation(VARLEN)
        learner = tools.learner(trainable(model, _world(device, False), BackendOptions(bf16=True)))
        _train(learner)
        ends.append(tools.weights(learner.backend))
    difference = tools.max_difference(*ends)
    yield "largest difference", difference
    assert difference == 0, "two runs of the same steps differ"
