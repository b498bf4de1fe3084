"""Rates that follow a loss, against torch's and Transformers' own and against numbers by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.optimization import GreedyLR

from togi.config.choices import Scheduler
from togi.config.parse import parse
from togi.errors import ConfigError
from togi.learn.schedule import MeasuredRate
from togi.methods import check_method
from togi.methods.sft import SFT

START = 0.1
# Falls, stands still, rises, falls by less than either threshold, breaks, and falls again.
LOSSES = [3 - 0.1 * i for i in range(12)] + [1.9] * 9 + [2.5, 2.4, 1.8999, 1.8998999, math.nan, 1.2] + [1.2] * 40


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=START)


def measured(kind: Scheduler, **settings: float) -> MeasuredRate:
    return MeasuredRate(SFT(lr_scheduler=kind, lr_warmup_ratio=0.0, **settings), START, 10)


@pytest.mark.parametrize("patience", [0, 2, 10])
def test_plateau_is_torchs(patience: int) -> None:
    theirs = ReduceLROnPlateau(optimizer(), factor=0.5, patience=patience, min_lr=0.01 * START, eps=0)
    ours = measured(Scheduler.REDUCE_LR_ON_PLATEAU, lr_patience=patience, min_lr_ratio=0.01, lr_factor=0.5)
    for loss in LOSSES:
        theirs.step(loss)
        ours.observe(loss)
        assert ours.rate(1) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
    assert ours.rate(1) < START


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_greedy_is_transformers(patience: int) -> None:
    bounds = {"min_lr": 0.02 * START, "max_lr": 4 * START}
    theirs = GreedyLR(optimizer(), factor=0.7, patience=patience, eps=0, **bounds)
    ours = measured(Scheduler.GREEDY, lr_patience=patience, min_lr_ratio=0.02, max_lr_ratio=4.0, lr_factor=0.7)
    rates = []
    for loss in [*LOSSES, *[1.2] * 700 * (patience + 1), *LOSSES]:
        theirs.step(loss)
        ours.observe(loss)
        rates.append(ours.rate(1))
        assert rates[-1] == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
    assert max(rates) > START and min(rates) == pytest.approx(0.02 * START)
    floor = rates.index(min(rates))
    assert START in [pytest.approx(rate) for rate in rates[floor + 1 :]]  # it started over


def test_by_hand_with_a_warm_up_and_through_a_checkpoint() -> None:
    config = SFT(
        lr_scheduler=Scheduler.GREEDY,
        lr_warmup_ratio=0.2,
        lr_patience=0,
        lr_factor=0.5,
        max_lr_ratio=3,
        min_lr_ratio=0.25,
    )
    rate = MeasuredRate(config, 8.0, 10)
    assert [rate.rate(step) for step in range(4)] == [0.0, 4.0, 8.0, 8.0]
    seen = []
    for loss in (2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        rate.observe(loss)
        seen.append(rate.rate(5))
        other = MeasuredRate(config, 8.0, 10)
        other.load_state(json.loads(json.dumps(rate.state())))
        rate = other
    assert seen == [16.0, 24.0, 12.0, 6.0, 3.0, 2.0, 2.0]


def test_the_factor_is_the_kinds_own_unless_given() -> None:
    assert MeasuredRate(SFT(lr_scheduler=Scheduler.GREEDY), 1.0, 10).rule.factor == 0.95
    assert MeasuredRate(SFT(lr_scheduler=Scheduler.REDUCE_LR_ON_PLATEAU), 1.0, 10).rule.factor == 0.1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--lr_scheduler greedy", "--lr_scheduler greedy follows the held-out loss: add --eval_dataset"),
        ("--lr_factor 0.5", "--lr_factor 0.5 has no effect with --lr_scheduler cosine_with_min_lr"),
        ("--lr_patience 3", "--lr_patience 3 has no effect"),
        (
            "--eval_dataset e.jsonl --lr_scheduler reduce_lr_on_plateau --max_lr_ratio 2",
            "--max_lr_ratio 2 has no effect with --lr_scheduler reduce_lr_on_plateau",
        ),
    ],
)
def test_what_does_not_fit_is_refused(flags: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_method(parse(SFT, f"--pretrain m --dataset d.jsonl --output_key a {flags}".split(), "sft"))
    assert str(caught.value).startswith(sentence)
