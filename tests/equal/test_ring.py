"""A ring of two and of four processes = one process: attention, models, steps of every objective."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.equal import ring_jobs as jobs
from tests.learn_tools import CPU, max_difference, run_ranks
from tests.packs import plain_pack, shared_pack
from togi.parallel.process import World

SIZES = (2, 4)


@pytest.fixture(scope="module", params=SIZES)
def ring(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp(f"ring{request.param}")
    run_ranks(jobs.everything, request.param, folder)
    return request.param, folder


@pytest.mark.parametrize("name", jobs.TABLES)
def test_attention_equals_one_process(ring: tuple[int, Path], name: str) -> None:
    """Output and gradients of q, k, v, for every window and head stride, in each of the rings that ran beside one another."""
    ranks, folder = ring
    for window in jobs.WINDOWS:
        alone = jobs.attended(jobs.TABLES[name], window, torch.float64)
        files = sorted(folder.glob(f"*_{name}_*_{window}_*.pt"))
        assert len(files) == 3 * {2: 1, 4: 3}[ranks]
        for file in files:
            torch.testing.assert_close(torch.load(file), alone, rtol=1e-10, atol=1e-12)


def test_short_parts_are_joined_in_float32(ring: tuple[int, Path]) -> None:
    """From bfloat16 inputs a result is as near the exact one as that of one process; from float32 it is equal."""
    size, folder = ring
    exact = jobs.attended(jobs.TREE, None, torch.float32)
    torch.testing.assert_close(torch.load(folder / f"{size}_torch.float32_0.pt"), exact, rtol=1e-5, atol=2e-6)
    rounded = torch.load(folder / f"{size}_torch.bfloat16_0.pt")
    alone = jobs.attended(jobs.TREE, None, torch.bfloat16)
    for ours, theirs, true in zip(rounded, alone, exact, strict=True):
        assert (ours - true).norm() <= 1.1 * (theirs.float() - true).norm()


@pytest.mark.parametrize("arch", jobs.ARCHITECTURES)
def test_models_equal_one_process(ring: tuple[int, Path], arch: str) -> None:
    """Float32, grouped heads, head stride 1, and 2 with gradient checkpointing; shared prompts, and those in the plain layout."""
    _, folder = ring
    for batch in (shared_pack(jobs.groups()), plain_pack(jobs.groups())):
        alone = jobs.forward(jobs.gqa_policy(arch), batch)
        for stride in (1, 2):
            result = torch.load(folder / f"{arch}_{stride}.pt")
            for name in ("logprobs", "entropy"):
                torch.testing.assert_close(result[name], alone[name], rtol=1e-5, atol=1e-5)
            for parameter, gradient in alone["gradients"].items():
                assert (result["gradients"][parameter] - gradient).norm() <= 1e-5 * gradient.norm(), parameter


@pytest.mark.parametrize("name", jobs.OBJECTIVES)
def test_steps_equal_one_process(ring: tuple[int, Path], name: str) -> None:
    """Two steps in float64: metrics, counts, gradient norms, weights; replicated and fully sharded (ZeRO stage 3)."""
    ranks, folder = ring
    alone = jobs.trained(World.solo(CPU), name, 0, None)
    for stage in (0, 3):
        result = torch.load(folder / f"{name}_{stage}_{ranks}.pt", weights_only=False)
        for ours, theirs in zip(result["metrics"], alone["metrics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-8, abs=1e-9)
        assert max_difference(result["weights"], alone["weights"]) < 1e-8
        for ours, theirs in zip(result["logprobs"], alone["logprobs"], strict=ranks == 2):
            assert ours == pytest.approx(theirs, abs=1e-6)
