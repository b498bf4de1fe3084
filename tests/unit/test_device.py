"""Where a process computes, as torch's CUDA build would answer, and how it multiplies there."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

from tests.source import trees
from togi.device import default_device
from togi.parallel.process import be_deterministic
from togi.workers.local import deterministic


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.set_float32_matmul_precision(before[1])


@pytest.mark.parametrize(("usable", "device"), [(True, "cuda:3"), (False, "cpu")])
def test_a_cuda_build_without_a_usable_gpu_computes_on_the_cpu(usable: bool, device: str) -> None:
    with (
        patch.object(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda")),
        patch.object(torch.cuda, "is_available", lambda: usable),
    ):
        assert default_device(3) == torch.device(device)


def test_gpus_are_counted_without_starting_cuda() -> None:
    """CUDA that has started makes forked processes useless, and would not see a later CUDA_VISIBLE_DEVICES."""
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
    with (
        patch.object(torch.cuda, "_is_compiled", lambda: True),
        patch.object(torch.cuda, "_device_count_nvml", lambda: 2),
        patch.object(torch._C, "_cuda_getDeviceCount", lambda: pytest.fail("starts CUDA"), create=True),
        patch.object(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda")),
    ):
        assert default_device() == torch.device("cuda:0")


def test_torch_is_asked_in_one_place() -> None:
    asked = [
        path
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "current_accelerator"
    ]
    assert asked == ["device.py"]


@pytest.mark.parametrize(("kind", "precision"), [("cuda", "high"), ("xpu", "highest")])
def test_cuda_multiplies_float32_in_tf32(monkeypatch: pytest.MonkeyPatch, kind: str, precision: str) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device(kind))
    assert default_device(1) == torch.device(kind, 1)
    assert torch.get_float32_matmul_precision() == precision
    with deterministic(False):
        assert torch.get_float32_matmul_precision() == precision
    with deterministic(True):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == precision
    be_deterministic()
    default_device()
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_cpu_multiplies_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
    assert default_device() == torch.device("cpu")
    assert torch.get_float32_matmul_precision() == "highest"
