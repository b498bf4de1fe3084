"""Every schedule against Transformers' own of the same name, over a whole run and at the numbers that flags give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import SchedulerType, get_scheduler

from togi.config.choices import Scheduler
from togi.config.parse import parse
from togi.errors import ConfigError
from togi.learn.schedule import Schedule
from togi.methods import check_method
from togi.methods.sft import SFT

TOTAL, PEAK = 20, 3e-4
FLOOR = {"min_lr_rate": 0.25}
# What each kind is asked for in Transformers' words, and what in ours.
CASES: list[tuple[Scheduler, dict[str, Any], dict[str, Any]]] = [
    (Scheduler.LINEAR, {}, {}),
    (Scheduler.CONSTANT, {}, {}),
    (Scheduler.CONSTANT_WITH_WARMUP, {}, {}),
    (Scheduler.INVERSE_SQRT, {}, {}),
    (Scheduler.COSINE, {}, {}),
    (Scheduler.COSINE, {"num_cycles": 1.5}, {"lr_num_cycles": 1.5}),
    (Scheduler.COSINE_WITH_RESTARTS, {}, {}),
    (Scheduler.COSINE_WITH_RESTARTS, {"num_cycles": 3}, {"lr_num_cycles": 3.0}),
    (Scheduler.POLYNOMIAL, {"lr_end": 0.1 * PEAK}, {}),
    (Scheduler.POLYNOMIAL, {"lr_end": 0.0, "power": 2.5}, {"min_lr_ratio": 0.0, "lr_power": 2.5}),
    (Scheduler.COSINE_WITH_MIN_LR, {"min_lr_rate": 0.1}, {}),
    (Scheduler.COSINE_WITH_MIN_LR, {**FLOOR, "num_cycles": 1.5}, {"min_lr_ratio": 0.25, "lr_num_cycles": 1.5}),
    (Scheduler.COSINE_WARMUP_WITH_MIN_LR, FLOOR, {"min_lr_ratio": 0.25}),
    (Scheduler.WARMUP_STABLE_DECAY, {"num_decay_steps": 6}, {"min_lr_ratio": 0.0, "lr_decay_ratio": 6 / TOTAL}),
    (
        Scheduler.WARMUP_STABLE_DECAY,
        {"num_decay_steps": 9, "min_lr_ratio": 0.25, "num_cycles": 1.0},
        {"min_lr_ratio": 0.25, "lr_decay_ratio": 9 / TOTAL, "lr_num_cycles": 1.0},
    ),
]


def test_every_schedule_of_transformers_is_known_and_tested() -> None:
    assert {kind.value for kind in Scheduler} == {kind.value for kind in SchedulerType}
    assert {kind for kind, _, _ in CASES} | {kind for kind in Scheduler if kind.follows_a_loss} == set(Scheduler)


@pytest.mark.parametrize(("kind", "theirs", "ours"), CASES)
@pytest.mark.parametrize("warmup", [0, 3])
def test_equal_to_transformers(kind: Scheduler, theirs: dict[str, Any], ours: dict[str, Any], warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    reference = get_scheduler(kind.value, optimizer, warmup, TOTAL, scheduler_specific_kwargs=theirs)
    schedule = Schedule(SFT(lr_scheduler=kind, lr_warmup_ratio=warmup / TOTAL, **ours), PEAK, TOTAL)
    last = TOTAL - (
        kind is Scheduler.COSINE_WARMUP_WITH_MIN_LR
    )  # step TOTAL is past its end, where it would rise again
    for step in range(last + 1):
        assert schedule.rate(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-12, abs=1e-20), step
        optimizer.step()
        reference.step()


def test_warm_up_is_a_ceiling_and_the_floor_holds() -> None:
    schedule = Schedule(SFT(), 1.0, 101)
    assert schedule.warmup == 4
    assert [schedule.rate(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for step in (101, 500):
        assert schedule.rate(step) == pytest.approx(0.1)


def test_the_flags_reach_the_schedule() -> None:
    config = SFT(
        lr_scheduler=Scheduler.WARMUP_STABLE_DECAY,
        lr_warmup_ratio=0.1,
        lr_decay_ratio=0.25,
        min_lr_ratio=0.2,
        lr_num_cycles=0.5,
    )
    rates = [Schedule(config, 10.0, 10).rate(step) for step in range(11)]
    # one step of warm-up from the floor, six at the peak, then ceil(0.25 x 10) = 3 along half a cosine
    assert rates == pytest.approx([2.0, 10, 10, 10, 10, 10, 10, 10, 8.0, 4.0, 2.0])
    power = SFT(lr_scheduler=Scheduler.POLYNOMIAL, lr_warmup_ratio=0, lr_power=2, min_lr_ratio=0)
    assert [Schedule(power, 1.0, 4).rate(step) for step in range(5)] == [1.0, 0.5625, 0.25, 0.0625, 0.0]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--lr_scheduler linear --min_lr_ratio 0.2", "--min_lr_ratio 0.2 has no effect with --lr_scheduler linear"),
        ("--lr_scheduler linear --lr_num_cycles 2", "--lr_num_cycles 2 has no effect"),
        ("--lr_power 2", "--lr_power 2 has no effect with --lr_scheduler cosine_with_min_lr"),
        ("--lr_decay_ratio 0.5", "--lr_decay_ratio 0.5 has no effect"),
        (
            "--lr_scheduler warmup_stable_decay --lr_warmup_ratio 0.6 --lr_decay_ratio 0.5",
            "--lr_warmup_ratio 0.6 and --lr_decay_ratio 0.5 are more than the whole run",
        ),
        ("--min_lr_ratio 1.5", "--min_lr_ratio 1.5: must be at most 1."),
    ],
)
def test_what_a_schedule_does_not_use_is_refused(flags: str, sentence: str) -> None:
    words = f"--pretrain m --dataset d.jsonl --output_key a {flags}".split()
    with pytest.raises(ConfigError) as caught:
        check_method(parse(SFT, words, "sft"))
    assert str(caught.value).startswith(sentence)
