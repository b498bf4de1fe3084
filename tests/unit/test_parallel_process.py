"""The device of a process, and how it multiplies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from togi.device import default_device
from togi.parallel.process import be_deterministic
from togi.workers.local import deterministic


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.set_float32_matmul_precision(before[1])


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
