"""Several sources of reward: models scored elsewhere, how they become one number, names, errors, placement."""

import asyncio
import math

import pytest

from togi.config.choices import OnRewardError, RewardCombination
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.errors import RewardError
from togi.obs.names import reward_component
from togi.plan.machine import Machine
from togi.plan.placement import Role, plan_groups, resolve
from togi.pump.experience import ScoredGroup, trainable
from togi.pump.feed import RolloutFeed
from togi.reward.scores import (
    CombinedReward,
    ErrorLimit,
    LocalModelReward,
    Standardization,
    Term,
    combine,
    distinct_names,
)
from togi.run.rewards import reward_names
from togi.sample import FinishReason, Outcome, Prompt, Rollout, Score


def rollout(tokens):
    prompt = Prompt("p-1", (10, 20), "Q: ")
    ones, reason = len(tokens) * (True,), FinishReason.STOP
    return Rollout(prompt, "g", tokens, ones, len(tokens) * (-1.0,), "answer", reason, len(tokens) * (0,))


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


def test_a_model_that_gives_nan_is_an_error_of_that_sample():
    first, second = asyncio.run(LocalModelReward(not_a_number).score(GROUP))
    assert (first.outcome, first.value) == (Outcome.SCORE, 0.0)
    assert (second.outcome, second.components) == (Outcome.ERROR, {})
    assert "reward_model gave nan for a sample of prompt 'p-1' (response: 'answer')" in second.message


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_numbers_that_cannot_standardise_are_refused(mean, std):
    with pytest.raises(RewardError, match="--normalize_reward"):
        Standardization(mean, std)


class Fixed:
    """A source that says what it was told."""

    def __init__(self, *scores):
        self.scores = list(scores)

    async def score(self, group):
        return self.scores

    async def close(self):
        """Nothing."""


def said(name, value, **logs):
    return Score(Outcome.SCORE, value, {name: value, **logs})


A = Fixed(said("a", 1.0), said("a", 3.0, words=5.0))
B = Fixed(said("b", 10.0, words=2.0), said("b", -2.0))


@pytest.mark.parametrize(
    ("weights", "how", "values", "formula"),
    [
        ((1, 1), RewardCombination.SUM, [11.0, 1.0], "1 x a + 1 x b"),
        ((2, -0.5), RewardCombination.SUM, [-3.0, 7.0], "2 x a + -0.5 x b"),
        ((1, 1), RewardCombination.MEAN, [5.5, 0.5], "0.5 x a + 0.5 x b"),
        ((3, 1), RewardCombination.MEAN, [3.25, 1.75], "0.75 x a + 0.25 x b"),
    ],
)
def test_several_rewards_become_one_and_keep_their_parts(weights, how, values, formula):
    """The parts are what each source said, before its weight; its own logs carry its name."""
    reward = CombinedReward([Term("a", A, weights[0]), Term("b", B, weights[1])], how)
    scores = asyncio.run(reward.score(GROUP))
    assert [score.value for score in scores] == values
    assert scores[0].components == {"a": 1.0, "b": 10.0, "b/words": 2.0}
    assert scores[1].components == {"a": 3.0, "a/words": 5.0, "b": -2.0}
    assert reward.formula == formula


def test_one_reward_keeps_the_names_of_its_logs():
    scores = asyncio.run(CombinedReward([Term("a", A, 2.0)]).score(GROUP))
    assert [score.value for score in scores] == [2.0, 6.0]
    assert scores[1].components == {"a": 3.0, "words": 5.0}


def test_a_sum_that_lacks_a_term_is_no_score():
    score = Score(Outcome.SCORE, 1.0, {"a": 1.0})
    abstain = Score(Outcome.ABSTAIN, components={"log": 2.0}, message="b abstained.")
    error = Score(Outcome.ERROR, message="c failed.")
    both = combine("ab", [1, 1], [score, abstain])
    assert both.outcome is Outcome.ABSTAIN
    assert math.isnan(both.value)
    assert both.components == {"a": 1.0, "b/log": 2.0}
    assert both.message == "b abstained."
    assert combine("bca", [1, 1, 1], [abstain, error, score]).outcome is Outcome.ERROR


def test_names_never_collide():
    assert distinct_names(["a", "b"]) == ["a", "b"]
    assert distinct_names(["a", "a", "a_1"]) == ["a_2", "a_3", "a_1"]
    assert distinct_names(["mean", "a"]) == ["mean_1", "a"]  # reward/mean is the total
    reward_component("mean_1")


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (
            "--reward_pretrain x/rm --remote_rm_url http://h:1/r --reward_func f.py",
            ["reward_model", "remote", "function"],
        ),
        ("--reward_pretrain x/good,y/good,z/other", ["good_1", "good_2", "other"]),
        ("--reward_func a/math.py --remote_rm_url b/form.py,http://h:1/,http://h:2/", ["remote", "math", "form"]),
        ("--remote_rm_url http://h:1/,http://h:2/ --remote_rm_mode ensemble", ["h_1", "h_2"]),
    ],
)
def test_names_of_the_sources_in_the_order_of_their_weights(flags, names):
    config = parse(RLConfig, flags.split(), "rl").config
    assert reward_names(config, function_given=False) == names


FAILED = Score(Outcome.ERROR, message="It broke.")
GOOD = Score(Outcome.SCORE, 1.0)


def test_the_limit_of_errors():
    """A tenth of 20 samples may fail: two do not stop the run, the third does, at once."""
    limit = ErrorLimit(0.1, 20)
    limit.count([FAILED, FAILED, GOOD])
    with pytest.raises(
        RewardError, match=r"reward of 3 of 20 samples failed, above the allowed share of 0.1 .*It broke\."
    ):
        limit.count([GOOD, FAILED, GOOD])
    ErrorLimit(0.0, 4).count([GOOD] * 4)
    with pytest.raises(RewardError, match="0 with --on_reward_error stop"):
        ErrorLimit(0.0, 4).count([GOOD, FAILED])


def test_what_an_error_takes_with_it():
    """An abstention leaves its siblings in place; an error does under drop_sample only."""
    one = rollout((1,))
    groups = [
        ScoredGroup((one,) * 3, (GOOD, FAILED, GOOD)),
        ScoredGroup((one,) * 3, (GOOD, Score(Outcome.ABSTAIN), GOOD)),
    ]

    def places(rule):
        return trainable(groups, rule)

    assert places(OnRewardError.DROP_GROUP) == [(1, 0), (1, 2)]
    assert places(OnRewardError.DROP_SAMPLE) == [(0, 0), (0, 2), (1, 0), (1, 2)]


class OneWord:
    """An environment without an engine."""

    async def run(self, prompt, group_id, generate):
        return Rollout(prompt, group_id, (1,), (True,), (0.0,), "word", FinishReason.STOP, (0,))


class FailsOn:
    """A source that fails on one prompt."""

    def __init__(self, prompt):
        self.prompt = prompt

    async def score(self, group):
        return [FAILED if group[0].prompt.id == self.prompt else GOOD] * len(group)

    async def close(self):
        """Nothing."""


def test_a_rollout_with_few_errors_is_whole_and_one_with_many_is_refused():
    """One group of four fails: a share of 0.25."""
    prompts = [Prompt(name, (1,), name) for name in "abcd"]

    def run(max_errors):
        feed = RolloutFeed(OneWord(), None, FailsOn("b"), None, max_errors)
        return asyncio.run(feed.run(prompts, 2, "step1"))

    groups = run(0.25)
    assert [group.rollouts[0].prompt.id for group in groups] == list("abcd")
    assert [[score.outcome for score in group.scores] for group in groups][1] == [Outcome.ERROR] * 2
    assert {group for group, _ in trainable(groups, OnRewardError.DROP_GROUP)} == {0, 2, 3}
    with pytest.raises(RewardError, match="reward of 2 of 8 samples failed"):
        run(0.2)


def test_a_stopping_rule_allows_no_error():
    config = parse(RLConfig, ["--max_reward_errors", "0.5"], "rl").config
    assert config.allowed_reward_errors == 0.5
    config = parse(RLConfig, ["--max_reward_errors", "0.5", "--on_reward_error", "stop"], "rl").config
    assert config.allowed_reward_errors == 0.0


def test_each_reward_model_has_slots_of_its_own_unless_colocated():
    flags = ["--advantage_estimator", "gae", "--init_kl_coef", "0", "--reward_pretrain", "a,b"]
    laptop = Machine(cpus=2, memory_bytes=0, gpus=0)

    def groups(*more):
        return [(g.roles, g.slots) for g in plan_groups(resolve(parse(RLConfig, [*flags, *more], "rl"), laptop).config)]

    reward, critic = Role.REWARD, Role.CRITIC
    apart = [((Role.ENGINE,), 1), ((Role.ACTOR,), 1)]
    assert groups() == [*apart, ((critic,), 1), ((reward,), 1), ((reward,), 1)]
    assert groups("--colocate_critic_reward") == [*apart, ((critic, reward, reward), 1)]
    assert parse(RLConfig, flags, "rl").config.critic_source == "a"
