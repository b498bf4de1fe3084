"""Frozen weights in host memory: where they are when, and that what is read is the same.

The device is torch's "meta", on which tensors have no data: what is there cannot be mistaken for what is here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from mmap import PAGESIZE

import numpy as np
import pytest
import torch
from torch import nn

from tests.learn_tools import CPU, policy
from tests.objective_cases import VOCAB, responses, teacher
from togi.data.packing import pack
from togi.learn.scorer import Scorer
from togi.methods.kd_objective import DistillationObjective
from togi.parallel import frozen
from togi.parallel.backend import BackendOptions
from togi.parallel.optimizer import HostWeights, Parking
from togi.parallel.process import World

META = torch.device("meta")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)
        self.second.weight = self.first.weight  # tied
        self.register_buffer("table", torch.ones(4))


def test_weights_are_on_the_device_inside_only() -> None:
    module = Small().requires_grad_(False)
    before = module.first.weight.clone()
    weights = HostWeights(module, META)
    assert (module.first.weight.device, module.table.device) == (CPU, META)
    for _ in range(2):
        with weights.on_device():
            assert module.first.weight.device == META
            assert module.second.weight is module.first.weight
            taken = module.first.weight.detach()
        assert taken.device == META, "what was taken inside went away"
        assert torch.equal(module.first.weight, before)
    with pytest.raises(RuntimeError, match="stop"), weights.on_device():
        raise RuntimeError("stop")
    assert module.first.weight.device == CPU


def test_an_empty_pass_brings_the_weights_back_too() -> None:
    """A call of no batches, as on a rank without rows."""
    model = policy()
    scorer = Scorer(model, World.solo(CPU), HostWeights(model.requires_grad_(False), META).on_device)
    assert scorer.logprobs([]) == ()
    assert all(p.device == CPU for p in model.parameters())


class Log:
    """Counts the passes for which the weights came."""

    def __init__(self, weights: HostWeights) -> None:
        self.weights, self.passes = weights, 0

    def __call__(self) -> AbstractContextManager[None]:
        self.passes += 1
        return self.weights.on_device()


def test_a_scorer_brings_them_once_for_all_batches() -> None:
    model, samples = policy().requires_grad_(False), responses()
    batches = [pack(samples[:2], share_prefix=False), pack(samples[2:], share_prefix=False)]
    plain = Scorer(model, World.solo(CPU)).logprobs(batches)
    around = Log(HostWeights(model, CPU))
    moved = Scorer(model, World.solo(CPU), around).logprobs(batches)
    assert around.passes == 1
    assert all(np.array_equal(one, other) for one, other in zip(plain, moved, strict=True))


def test_a_teacher_that_leaves_after_its_pass_teaches_the_same() -> None:
    """The student's backward reads the teacher's head again, when its weights have left the device."""
    batch, steps, moved = pack(responses(), share_prefix=False), [], teacher()
    around = Log(HostWeights(moved, CPU))
    for objective in (
        DistillationObjective(teacher(), VOCAB, 1.0),
        DistillationObjective(moved, VOCAB, 1.0, around=around),
    ):
        student = policy(dtype=torch.float64)
        loss = objective.loss(objective.forward(student, batch), batch)
        for parameter in objective.teacher.parameters():
            parameter.data = torch.full_like(parameter, torch.nan)  # nothing may read the host's copy now
        loss.sum.backward()
        steps.append((float(loss.sum), [p.grad.clone() for p in student.parameters()]))
    assert around.passes == 1
    assert steps[0][0] == steps[1][0]
    assert all(torch.equal(one, other) for one, other in zip(steps[0][1], steps[1][1], strict=True))


def test_one_process_moves_the_whole_model_under_every_stage() -> None:
    model = policy()
    around = frozen(model, World.solo(META), BackendOptions(bf16=True, zero_stage=3), on_host=True)
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with around():
        assert {p.device for p in model.parameters()} == {META}
    assert {p.device for p in model.parameters()} == {CPU}


class Registry:
    """CUDA's registration of host memory: which pieces are pinned, by address."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 0
        self.sizes[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.sizes[address]
        return 0


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    registry = Registry()
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: registry)
    monkeypatch.setattr(torch.cuda, "check_error", lambda status: None)
    return registry


def test_beside_an_accelerator_weights_are_one_piece_of_pinned_memory(registry: Registry) -> None:
    """Separate pinned tensors would each be rounded up to a power of two."""
    module = nn.Sequential(Small(), nn.Linear(100, 3).bfloat16()).requires_grad_(False)
    before = [parameter.clone() for parameter in module.parameters()]
    weights = HostWeights(module, META)
    assert list(registry.sizes.values()) == [PAGESIZE]
    (start,) = registry.sizes
    assert start % PAGESIZE == 0
    places = [parameter.data_ptr() - start for parameter in module.parameters()]
    assert places == [0, 256, 1024]  # 24, 600 and 6 bytes, each from a multiple of 256
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), before, strict=True))
    with weights.on_device():
        assert {parameter.device for parameter in module.parameters()} == {META}
    del weights
    assert registry.sizes == {}


def test_what_sleeps_beside_an_accelerator_is_one_piece_of_pinned_memory(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept for the next sleep. A CPU's tensors stand in for the device's."""
    tensors = [torch.randn(5), torch.randn(3, 3).bfloat16(), torch.arange(7)]
    before = [tensor.clone() for tensor in tensors]
    parking = Parking(lambda: [*tensors, tensors[0]], CPU)
    parking._host, places = torch.empty(0, dtype=torch.uint8), dict[int, int]()
    for _ in range(2):
        assert parking.sleep().nbytes == 20 + 18 + 56
        (place,) = registry.sizes
        assert registry.sizes[place] == PAGESIZE and place == places.setdefault(0, place)
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
        parking.wake()
        assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))
    tensors.append(torch.zeros(PAGESIZE, dtype=torch.uint8))
    assert parking.sleep().nbytes == 20 + 18 + 56 + PAGESIZE
    assert list(registry.sizes.values()) == [2 * PAGESIZE]
    parking.wake()
