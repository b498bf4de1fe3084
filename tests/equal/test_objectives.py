"""Every objective: = its naive definition, = any split into micro-batches, = with shared prompts; garbage is never read."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.learn_tools import max_difference
from tests.objective_cases import CASES, Case, Step, gradients, padded, run, split
from togi.data.packing import pack
from togi.learn.scorer import dummy_batch, nothing

PAIRED = [name for name, case in CASES.items() if case.unit == 2]


def units(case: Case) -> int:
    return len(case.samples()) // case.unit


def assert_close(one: Step, other: Step, tolerance: float) -> None:
    assert one.loss == pytest.approx(other.loss, rel=tolerance, abs=tolerance)
    assert one.gradients.keys() == other.gradients.keys()
    for name, gradient in one.gradients.items():
        scale = float(other.gradients[name].abs().max()) + 1e-12
        assert float((gradient - other.gradients[name]).abs().max()) < 10 * tolerance * max(scale, 1e-3), name


@pytest.mark.parametrize("name", CASES)
def test_equals_the_naive_definition(name):
    """RMS norms and rotary tables compute in float32 inside the model, hence not to 1e-15."""
    case = CASES[name]
    ours, model = run(case, split(case, [units(case)])), case.model()
    loss = case.naive(model, padded(case.samples()))
    loss.backward()
    found = gradients(model)
    assert max(float(gradient.abs().max()) for gradient in found.values()) > 1e-4, "nothing to compare"
    assert_close(ours, Step(loss.item(), found, {}), 2e-6)
    logged = "policy/total_loss" if name.startswith(("policy_", "episodes")) else "loss"
    assert ours.metrics[logged] == pytest.approx(ours.loss, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_any_split_into_micro_batches_is_the_same_step(name):
    case = CASES[name]
    number = units(case)
    whole = run(case, split(case, [number]))
    for sizes in ([1] * number, [number - 1, 1], [1, number - 3, 2]):
        part = run(case, split(case, sizes))
        assert part.loss == pytest.approx(whole.loss, abs=1e-11), sizes
        assert max_difference(whole.gradients, part.gradients) < 1e-10, sizes
        assert part.metrics == pytest.approx(whole.metrics, abs=1e-10), sizes


@pytest.mark.parametrize("name", PAIRED)
def test_a_shared_prompt_is_the_same_step(name):
    case = CASES[name]
    plain = run(case, split(case, [units(case)]))
    for sizes in ([units(case)], [1, units(case) - 1]):
        batches = split(case, sizes, share_prefix=True)
        assert not batches[0].segments.is_plain
        shared = run(case, batches)
        assert_close(shared, plain, 2e-6)
        assert shared.metrics == pytest.approx(plain.metrics, abs=2e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fill", [0.0, np.inf])
def test_garbage_in_masked_slots_changes_no_bit(name, fill):
    """The rows of the cases have NaN there."""
    case = CASES[name]
    cleaned = [
        dataclasses.replace(
            sample,
            streams={n: np.where(sample.loss_mask, s, fill).astype(np.float32) for n, s in sample.streams.items()},
        )
        for sample in case.samples()
    ]
    nan, other = run(case, [pack(case.samples(), share_prefix=False)]), run(case, [pack(cleaned, share_prefix=False)])
    assert np.isfinite(nan.loss)
    assert other.loss == nan.loss
    assert max_difference(nan.gradients, other.gradients) == 0.0


@pytest.mark.parametrize("name", CASES)
def test_a_dummy_of_a_rank_without_work_reaches_every_parameter_with_zero(name):
    objective, model = CASES[name].make(), CASES[name].model()
    loss = nothing(objective.forward(model, dummy_batch()))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and torch.count_nonzero(p.grad) == 0 for p in model.parameters())


def test_the_cases_of_the_policy_reach_every_branch():
    """Else equality would prove nothing about clips and masks."""
    for name in CASES:
        if not name.startswith("policy_"):
            continue
        case = CASES[name]
        metrics = run(case, split(case, [units(case)])).metrics
        on_policy = "first_update" in name
        assert metrics["policy/clip_fraction"] == 0 if on_policy else 0.1 < metrics["policy/clip_fraction"] < 0.9, name
        if name in ("policy_icepop_first_update", "policy_seq_mask"):
            assert 0.1 < metrics["mismatch/masked_share"] < 0.9, name
        if name in ("policy_tis", "policy_seq_mask"):
            assert 0.1 < metrics["mismatch/corrected_share"] < 0.95, name
