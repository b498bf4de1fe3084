"""Weights of the mismatch correction: each kind by hand, bounds, and masked tokens that are never multiplied."""

from __future__ import annotations

import math

import pytest
import torch

from togi.algo.policy import correction
from togi.config.choices import CorrectionType

# Ratios of trainer and engine: a sequence of three tokens with geometric mean 2, one of two with 4, one of one token.
RATIOS = [1.0, 8.0, 1.0, 2.0, 8.0, 0.25]
SEQUENCES = torch.tensor([0, 0, 0, 2, 2, 3])


def weights(kind: CorrectionType, ratios: list[float], low: float = 0.5, high: float = 3.0):
    engine = torch.tensor([-3.0] * len(ratios), dtype=torch.float64)
    trainer = engine + torch.tensor(ratios, dtype=torch.float64).log()
    return correction(kind, trainer, engine, SEQUENCES[: len(ratios)], 4, low=low, high=high)


@pytest.mark.parametrize(
    ("kind", "expected", "kept", "truncated"),
    [
        ("tis", [1.0, 3.0, 1.0, 2.0, 3.0, 0.5], [1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 1, 1]),
        ("icepop", [1.0, 0.0, 1.0, 2.0, 0.0, 0.0], [1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]),
        # the token of ratio 8 stays with its sequence, but its weight is bounded
        ("seq-mask-tis", [1.0, 3.0, 1.0, 0.0, 0.0, 0.0], [1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]),
    ],
)
def test_each_kind_by_hand(kind, expected, kept, truncated):
    found = weights(CorrectionType(kind), RATIOS)
    torch.testing.assert_close(found.weights_K, torch.tensor(expected, dtype=torch.float64))
    assert found.kept_K.tolist() == [bool(k) for k in kept]
    assert found.truncated_K.tolist() == [bool(t) for t in truncated]


@pytest.mark.parametrize("kind", [kind for kind in CorrectionType if kind is not CorrectionType.RATIO])
def test_the_bounds_belong_to_the_range(kind):
    found = weights(kind, [1.0], low=1.0, high=3.0)
    assert found.weights_K.tolist() == [1.0]
    assert not bool(found.truncated_K.any())


@pytest.mark.parametrize("kind", [kind for kind in CorrectionType if kind is not CorrectionType.RATIO])
def test_an_endless_ratio_is_bounded_or_masked_and_its_term_is_never_read(kind):
    """Infinite weight x 0 and 0 x infinite loss would both be NaN."""
    trainer, engine = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -math.inf])
    found = correction(kind, trainer, engine, torch.tensor([0, 1]), 2, low=0.5, high=5.0)
    assert found.weights_K.tolist() == ([1.0, 5.0] if kind is CorrectionType.TIS else [1.0, 0.0])
    if kind is CorrectionType.TIS:
        return
    logits = torch.tensor([2.0, 1.0], requires_grad=True)
    terms = found.select(logits * torch.tensor([1.0, math.inf]))
    terms.sum().backward()
    assert terms.tolist() == [2.0, 0.0]
    assert float(logits.grad[0]) == 1.0


def test_log_probs_are_constants():
    trainer, engine = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    found = correction(CorrectionType.TIS, trainer, engine, torch.tensor([0, 0]), 1, low=0.5, high=5.0)
    assert not found.weights_K.requires_grad


def test_masking_everything_trains_nothing():
    found = weights(CorrectionType.SEQ_MASK_TIS, [8.0, 8.0])
    terms = found.select(torch.ones(2, dtype=torch.float64, requires_grad=True))
    assert terms.tolist() == [0.0, 0.0]
