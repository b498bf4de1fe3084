"""Compiled kernels for CPUs: PyTorch's numbers at sizes that fill no vector, what is no number, and no compiler."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from togi.cpu import attention as host_blocks
from togi.cpu import kernels as host
from togi.cpu.kernels import HostKernels, Rates, compiled


@pytest.fixture
def kernels() -> HostKernels:
    found = compiled()
    assert found is not None
    return found


@pytest.fixture(params=[(1, 1), (3, 31), (130, 64), (700, 100)])
def tensors(request: pytest.FixtureRequest) -> list[Tensor]:
    """Four [T, H] of bfloat16; the last size is shared among threads."""
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(request.param, generator=generator).bfloat16() for _ in range(4)]


def near(got: Tensor, expected: Tensor) -> None:
    """One rounding of bfloat16 apart at most, and in few places; sums in float32 nearly equal."""
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    else:
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-6)
        assert (got != expected).float().mean() <= 0.01


def test_kernels_are_pytorch_s_operations(kernels: HostKernels, tensors: list[Tensor]) -> None:
    x, grad, gate, up = tensors
    weight = up[0] + 0.5
    (out, scale), (expected, expected_scale) = (way.norm(x, weight, 1e-5) for way in (kernels, host_blocks))
    near(scale, expected_scale)
    near(out, expected)
    assert torch.equal(kernels.norm_again(x, weight, scale), out)
    for got, wanted in zip(
        kernels.norm_backward(grad, x, weight, scale), host_blocks.norm_backward(grad, x, weight, scale), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-7 * float(wanted.abs().max()))
    near(kernels.gate(gate, up), host_blocks.gate(gate, up))
    for got, wanted in zip(
        kernels.gate_backward(grad, gate, up), host_blocks.gate_backward(grad, gate, up), strict=True
    ):
        near(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 33, 100_000])
def test_adamw_is_pytorch_s(kernels: HostKernels, size: int, dtype: torch.dtype) -> None:
    """Three steps at growing rates, with decay and a factor on the gradients. A master's last bits may differ, no more."""
    generator = torch.Generator().manual_seed(size)
    master = torch.randn(size, generator=generator)
    theirs, working = master.clone().requires_grad_(), torch.full((size,), torch.nan, dtype=torch.bfloat16)
    moments = torch.zeros(size), torch.zeros(size)
    optimizer = torch.optim.AdamW([theirs], betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3, fused=True)
    for step in (1, 2, 3):
        gradient = torch.randn(size, generator=generator).to(dtype)
        kernels.adamw(master, moments, gradient, working, Rates(0.01 * step, 0.3, (0.8, 0.95), 1e-6, step, 0.25))
        theirs.grad = gradient.float() * 0.25
        optimizer.param_groups[0]["lr"] = 0.01 * step
        optimizer.step()
    torch.testing.assert_close(master, theirs.detach(), rtol=1e-6, atol=1e-7)
    for moment, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
        torch.testing.assert_close(moment, optimizer.state[theirs][name], rtol=1e-6, atol=1e-8)
    assert torch.equal(working, master.bfloat16())


def test_squares_are_added_in_float64(kernels: HostKernels) -> None:
    """By hand, over more than two parts: 40,000 squares of 1.5 and one of 2,048, which float32 sums would lose some of."""
    for dtype in (torch.bfloat16, torch.float32):
        values = torch.full((40_001,), 1.5, dtype=dtype)
        values[33_000] = -2048.0
        assert kernels.square_sum(values) == 40_000 * 2.25 + 2048**2
        assert kernels.square_sum(values.expand(2, -1).T) == 2 * kernels.square_sum(values)
    assert kernels.square_sum(torch.tensor([1.0, torch.nan])) != kernels.square_sum(torch.tensor([1.0, torch.nan]))
    assert kernels.square_sum(torch.tensor([3e38, -3e38]).bfloat16()) > 1e77


def test_tensors_may_lie_in_memory_in_any_way(kernels: HostKernels) -> None:
    x, weight = torch.randn(8, 20).bfloat16(), torch.randn(40).bfloat16()[::2]
    turned = x.T.contiguous().T
    assert not turned.is_contiguous()
    assert torch.equal(kernels.norm(turned, weight, 1e-5)[0], kernels.norm(x, weight.contiguous(), 1e-5)[0])
    one = torch.ones(1, 1, dtype=torch.bfloat16).expand(8, 20)
    assert all(map(torch.equal, kernels.gate_backward(one, turned, x), kernels.gate_backward(one.clone(), x, x)))


def test_threads_change_no_bit(kernels: HostKernels) -> None:
    x, grad = torch.randn(500, 96).bfloat16(), torch.randn(500, 96).bfloat16()
    scale, before = torch.rand(500, 1), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            sums = torch.tensor(kernels.square_sum(grad), dtype=torch.float64)
            state, working = [torch.zeros(100_001) for _ in range(3)], torch.empty(100_001, dtype=torch.bfloat16)
            slopes = torch.linspace(-1, 1, 100_001)
            kernels.adamw(state[0], (state[1], state[2]), slopes, working, Rates(0.01, 0.1, (0.9, 0.95), 1e-8, 1, 0.3))
            found.append((*kernels.norm_backward(grad, x, grad[0], scale), sums, *state))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_extreme_values_and_what_is_no_number(kernels: HostKernels) -> None:
    """Where bfloat16 ends nothing overflows that does not in PyTorch."""
    values = torch.tensor([[0.0, -0.0, 88.0, -88.0, 1e4, -1e4, 3e38, -3e38, float("nan"), float("inf")]]).bfloat16()
    one = torch.ones_like(values)
    torch.testing.assert_close(
        kernels.gate(values, one), host_blocks.gate(values, one), equal_nan=True, atol=1e-36, rtol=0
    )
    for got, wanted in zip(
        kernels.gate_backward(one, values, one), host_blocks.gate_backward(one, values, one), strict=True
    ):
        torch.testing.assert_close(got[:, :-2], wanted[:, :-2], atol=1e-30, rtol=2**-7)
        assert got[0, -2].isnan()
    out, _ = kernels.norm(values, one[0], 1e-5)
    assert out.isnan().all()
    none, _ = kernels.norm(torch.zeros(2, 4).bfloat16(), one[0, :4], 1e-5)
    assert torch.equal(none, torch.zeros(2, 4).bfloat16())


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and nothing loaded."""
    monkeypatch.setenv("TOGI_CACHE", str(tmp_path))
    monkeypatch.setattr(host, "compiled", host.compiled.__wrapped__)
    return tmp_path / f"kernels-{os.getuid()}"


def test_the_library_is_built_once(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "cc -g0")
    caplog.set_level(logging.INFO)
    assert host.compiled() is not None
    assert host.compiled() is not None
    assert len(list(fresh.iterdir())) == 1
    assert sum("Compiled the kernels" in line for line in caplog.messages) == 1


def test_a_damaged_library_is_built_again(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = host.library()
    whole = path.read_bytes()
    for damaged in (bytes(len(whole)), whole[: len(whole) // 2], whole[:-1], bytes(64) + whole[64:], whole[:-32], b""):
        path.write_bytes(damaged)
        assert not host._is_whole(path)
    assert host.compiled() is not None  # of an empty file
    assert host._is_whole(path) and host.library() == path
    assert sum("Compiled the kernels" in line for line in caplog.messages) == 2


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false", "cc '-O2"])
def test_without_a_compiler_there_is_a_warning(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert host.compiled() is None
    (line,) = caplog.messages
    assert "install a C compiler (gcc), or set TOGI_CPU_KERNELS=0" in line


def test_a_folder_that_others_can_write_to_is_not_trusted(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    fresh.mkdir()
    fresh.chmod(0o777)
    assert host.compiled() is None
    assert f"Others than its user may write to {fresh}: remove it." in caplog.text
    assert list(fresh.iterdir()) == []


def test_they_can_be_switched_off(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOGI_CPU_KERNELS", "0")
    assert host.compiled() is None
    assert not fresh.exists()
