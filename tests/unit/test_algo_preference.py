"""The preference losses by hand: values, gradients, ends of the range."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from togi.algo.preference import (
    dpo_loss,
    ipo_loss,
    kto_kl_estimate,
    kto_loss,
    pairwise_reward_loss,
    sequence_sums,
)
from togi.config.choices import RewardLoss

LOG3 = math.log(3)  # sigmoid(log 3) = 3/4


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def with_gradient(function, at: float) -> tuple[float, float]:
    point = double(at).requires_grad_()
    loss = function(point)
    loss.sum().backward()
    return loss.item(), point.grad.item()


def test_sequence_sums_with_an_empty_sequence_and_any_order():
    sums = sequence_sums(double(1, 2, 4, 8), torch.tensor([3, 0, 3, 0]), 4)
    assert sums.tolist() == [10, 0, 0, 5]


def test_bradley_terry_by_hand():
    # c - j = log 3: the chosen one wins with 3/4; d loss / d c = -(1 - 3/4)
    loss, gradient = with_gradient(lambda c: pairwise_reward_loss(c, double(1.0), None), 1 + LOG3)
    assert loss == pytest.approx(math.log(4 / 3), abs=1e-14)
    assert gradient == pytest.approx(-0.25, abs=1e-14)


def test_a_margin_asks_for_more():
    # a lead of 2 log 3 with a margin of log 3 is a lead of log 3
    loss = pairwise_reward_loss(double(2 * LOG3), double(0.0), double(LOG3))
    assert loss.item() == pytest.approx(math.log(4 / 3), abs=1e-14)


def test_logexp_by_hand_and_without_overflow():
    loss = pairwise_reward_loss(double(0.0, 0.0), double(LOG3, 5000.0), None, RewardLoss.LOGEXP)
    assert loss.tolist() == pytest.approx([math.log(4), 5000.0], abs=1e-12)
    far, gradient = with_gradient(lambda c: pairwise_reward_loss(c, double(0.0), None, RewardLoss.LOGEXP), -5000.0)
    assert (far, gradient) == (5000.0, -1.0)
    with pytest.raises(AssertionError, match="no margin"):
        pairwise_reward_loss(double(0.0), double(0.0), double(1.0), RewardLoss.LOGEXP)


def test_dpo_by_hand():
    # beta h = log 3: loss log(4/3), gradient -beta (1 - 3/4)
    loss, gradient = with_gradient(lambda h: dpo_loss(h, beta=0.1), 10 * LOG3)
    assert loss == pytest.approx(math.log(4 / 3), abs=1e-14)
    assert gradient == pytest.approx(-0.025, abs=1e-14)
    assert dpo_loss(double(0.0), beta=0.5).item() == pytest.approx(math.log(2), abs=1e-14)


def test_conservative_dpo_by_hand():
    # 0.9 log(4/3) + 0.1 log 4; gradient -0.9 beta / 4 + 0.1 beta 3/4
    loss, gradient = with_gradient(lambda h: dpo_loss(h, beta=0.1, label_smoothing=0.1), 10 * LOG3)
    assert loss == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4), abs=1e-14)
    assert gradient == pytest.approx(0.1 * (-0.9 / 4 + 0.1 * 3 / 4), abs=1e-14)


def test_conservative_dpo_is_least_where_the_model_is_as_sure_as_the_labels():
    # sigmoid(beta h) = 3/4 = 1 - e
    _, gradient = with_gradient(lambda h: dpo_loss(h, beta=0.1, label_smoothing=0.25), 10 * LOG3)
    assert gradient == pytest.approx(0.0, abs=1e-15)


def test_ipo_by_hand():
    # the target of h is 1 / (2 * 0.1) = 5
    assert with_gradient(lambda h: ipo_loss(h, beta=0.1), 2.0) == pytest.approx((9.0, -6.0), abs=1e-12)
    assert with_gradient(lambda h: ipo_loss(h, beta=0.1), 5.0) == pytest.approx((0.0, 0.0), abs=1e-12)


def test_the_kl_estimate_is_one_mean_over_the_step_held_at_zero():
    assert kto_kl_estimate([-1.0, -5.0, -2.0], [-4.0, -3.0, -2.0]) == pytest.approx(1 / 3)  # (3 - 2 + 0) / 3
    assert kto_kl_estimate([-5.0], [-3.0]) == 0.0
    # halves on two ranks held at zero by themselves would give (3 + 0) / 2
    assert kto_kl_estimate([-1.0, -5.0], [-4.0, -3.0]) == 0.5
    with pytest.raises(AssertionError, match="mismatched rows"):
        kto_kl_estimate([], [])


def test_kto_by_hand():
    # beta (d - KL) = 0.5 * (2 log 3 + 1 - 1) = log 3 in both rows: desirable 1 - 3/4, undesirable 1 - 1/4
    ratios = torch.full((2,), 2 * LOG3 + 1, dtype=torch.float64, requires_grad=True)
    kl = double(1.0, 1.0).requires_grad_()
    loss = kto_loss(ratios, torch.tensor([True, False]), kl, beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    assert loss.tolist() == pytest.approx([2 * 0.25, 3 * 0.75], abs=1e-14)
    loss.sum().backward()
    # w beta sigmoid (1 - sigmoid): down for the desirable row, up for the other
    assert ratios.grad.tolist() == pytest.approx([-2 * 0.5 * 3 / 16, 3 * 0.5 * 3 / 16], abs=1e-14)
    assert kl.grad is None


def test_kto_with_one_kind_of_row_and_far_out():
    all_good = kto_loss(double(1.0, 1e6), torch.tensor([True, True]), double(1.0, 1.0), beta=1.0)
    assert all_good.tolist() == [0.5, 0.0]
    all_bad = kto_loss(double(1.0, 1e6), torch.tensor([False, False]), double(1.0, 1.0), beta=1.0)
    assert all_bad.tolist() == [0.5, 1.0]
