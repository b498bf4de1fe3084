import pytest
import torch
from transformers import get_scheduler
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from togi.config.choices import Scheduler
from togi.learn.schedule import Schedule


@pytest.mark.parametrize("kind", list(Scheduler))
@pytest.mark.parametrize("warmup", [0, 3])
def test_equal_to_transformers(kind: Scheduler, warmup: int) -> None:
    total, peak = 20, 3e-4
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    if kind is Scheduler.COSINE_WITH_MIN_LR:
        theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, total, min_lr_rate=0.1)
    else:
        theirs = get_scheduler(kind.value, optimizer, warmup, total)
    ours = Schedule(kind, peak, total, warmup)
    for step in range(total + 1):
        assert ours.rate(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-20), step
        optimizer.step()
        theirs.step()


def test_warm_up_is_a_ceiling_and_the_floor_holds() -> None:
    schedule = Schedule.with_warmup_ratio(Scheduler.COSINE_WITH_MIN_LR, 1.0, 101, 0.03)
    assert schedule.warmup == 4
    assert [schedule.rate(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert schedule.rate(101) == pytest.approx(0.1)
    assert schedule.rate(500) == pytest.approx(0.1)
