"""Reward models scored elsewhere, and sums of sources."""

import asyncio
import math

import pytest

from togi.errors import RewardError
from togi.reward.combine import SumReward, add_scores
from togi.reward.local_model import LocalModelReward, Standardization
from togi.sample import FinishReason, Outcome, Prompt, Rollout, Score


def rollout(tokens):
    prompt = Prompt("p-1", (10, 20), "Q: ")
    ones, reason = len(tokens) * (True,), FinishReason.STOP
    return Rollout(prompt, "g", tokens, ones, len(tokens) * (-1.0,), "answer", reason, 0)


GROUP = [rollout((1,)), rollout((2, 3))]


async def last_token(sequences):
    assert [sequence[:2] for sequence in sequences] == [(10, 20)] * 2
    return [float(sequence[-1]) for sequence in sequences]


async def not_a_number(sequences):
    return [0.0, math.nan]


def test_a_model_scores_prompt_and_response_and_is_standardised():
    scores = asyncio.run(LocalModelReward(last_token).score(GROUP))
    assert [score.value for score in scores] == [1.0, 3.0]
    scores = asyncio.run(LocalModelReward(last_token, Standardization(mean=2.0, std=4.0)).score(GROUP))
    assert [score.value for score in scores] == [-0.25, 0.25]
    assert [score.components for score in scores] == [{"reward_model": -0.25}, {"reward_model": 0.25}]
    assert all(score.outcome is Outcome.SCORE for score in scores)


def test_a_model_that_gives_nan_is_an_error():
    with pytest.raises(RewardError, match=r"reward_model gave nan for a sample of prompt 'p-1' \(response: 'answer'\)"):
        asyncio.run(LocalModelReward(not_a_number).score(GROUP))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_numbers_that_cannot_standardise_are_refused(mean, std):
    with pytest.raises(RewardError, match="--normalize_reward"):
        Standardization(mean, std)


def test_a_sum_keeps_the_components_of_all_sources():
    first = LocalModelReward(last_token)
    second = LocalModelReward(last_token, Standardization(mean=1.0), component="helpfulness")
    scores = asyncio.run(SumReward([first, second]).score(GROUP))
    assert [score.value for score in scores] == [1.0, 5.0]
    assert scores[1].components == {"reward_model": 3.0, "helpfulness": 2.0}
    with pytest.raises(RewardError, match="both name a component 'reward_model'"):
        asyncio.run(SumReward([first, first]).score(GROUP))


def test_a_sum_that_lacks_a_term_is_no_score():
    score = Score(Outcome.SCORE, 1.0, {"a": 1.0})
    abstain = Score(Outcome.ABSTAIN, components={"b": 2.0}, message="b abstained.")
    error = Score(Outcome.ERROR, message="c failed.")
    both = add_scores([score, abstain])
    assert both.outcome is Outcome.ABSTAIN
    assert math.isnan(both.value)
    assert both.components == {"a": 1.0, "b": 2.0}
    assert both.message == "b abstained."
    assert add_scores([abstain, error, score]).outcome is Outcome.ERROR
