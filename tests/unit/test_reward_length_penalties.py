"""Length penalties by hand: the formulas, and the parts of the reward that they become."""

from __future__ import annotations

import pytest

from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.errors import RewardError
from togi.pump.experience import ScoredGroup, rollout_metrics
from togi.reward.scores import LengthPenalties, overlong_penalty, stop_properly
from togi.sample import FinishReason, Outcome, Prompt, Rollout, Score


def test_overlong_by_hand() -> None:
    # DAPO's own numbers: 16384 tokens expected, 4096 of buffer behind them
    assert [overlong_penalty(n, 20480, 4096, 1.0) for n in (1, 16384, 17408, 18432, 20480)] == [0, 0, -0.25, -0.5, -1]
    assert overlong_penalty(9, 10, 4, 0.5) == pytest.approx(-0.375)


def test_stop_properly_by_hand() -> None:
    assert stop_properly(0.8, 0.25) == pytest.approx(0.2)
    assert stop_properly(0.8, 0.0) == 0
    assert stop_properly(0.8, -0.5) == -0.5


def rollout(length: int, reason: FinishReason) -> Rollout:
    ones = (True,) * length
    return Rollout(
        Prompt("p", (1, 2), "text"), "g", (5,) * length, ones, (-1.0,) * length, "answer", reason, (0,) * length
    )


GROUP = [
    rollout(8, FinishReason.LENGTH),  # at the limit
    rollout(7, FinishReason.STOP),  # three quarters into the buffer
    rollout(4, FinishReason.STOP),
    rollout(8, FinishReason.STOP),  # as long as may be, but it ended by itself
    rollout(8, FinishReason.LENGTH),
]
SCORES = [Score(Outcome.SCORE, 1.0, {"function": 1.0})] * 4 + [Score(Outcome.ABSTAIN)]


def test_penalties_are_parts_of_the_reward() -> None:
    both = LengthPenalties(limit=8, buffer=4, factor=2.0, coef=0.25)
    scores = both.applied(GROUP, SCORES)
    # 1 x 0.25 - 2, 1 - 2 x 3/4, 1, 1 - 2
    assert [score.value for score in scores[:4]] == [-1.75, -0.5, 1.0, -1.0]
    assert scores[0].components == {"function": 1.0, "stop_properly_penalty": -0.75, "overlong_penalty": -2.0}
    assert scores[1].components == {"function": 1.0, "stop_properly_penalty": 0.0, "overlong_penalty": -1.5}
    assert scores[4] is SCORES[4]
    values = rollout_metrics([ScoredGroup(tuple(GROUP), tuple(scores))])
    assert values["reward/overlong_penalty"] == pytest.approx((-2 - 1.5 - 2) / 4)
    assert values["reward/stop_properly_penalty"] == pytest.approx(-0.75 / 4)
    assert values["reward/mean"] == pytest.approx((-1.75 - 0.5 + 1 - 1) / 4)


def test_a_negative_coefficient_replaces_the_reward() -> None:
    scores = LengthPenalties(limit=8, buffer=None, factor=1.0, coef=-0.5).applied(GROUP, SCORES)
    assert [score.value for score in scores[:4]] == [-0.5, 1.0, 1.0, 1.0]
    assert scores[0].components == {"function": 1.0, "stop_properly_penalty": -1.5}


def test_a_part_of_the_same_name_is_refused() -> None:
    taken = [Score(Outcome.SCORE, 1.0, {"overlong_penalty": 0.0})]
    with pytest.raises(RewardError, match="'overlong_penalty'"):
        LengthPenalties(limit=8, buffer=4, factor=1.0, coef=None).applied(GROUP[:1], taken)


def test_flags_become_penalties() -> None:
    flags = (
        "--generate_max_len 100 --overlong_buffer_len 20 --overlong_penalty_factor 0.5 --stop_properly_penalty_coef -1"
    )
    config = parse(RLConfig, flags.split(), "rl").config
    assert LengthPenalties.of(config) == LengthPenalties(100, 20, 0.5, -1.0)
    assert config.uses_length_penalties
    assert not parse(RLConfig, [], "rl").config.uses_length_penalties
