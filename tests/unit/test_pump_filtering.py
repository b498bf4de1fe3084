"""Dynamic filtering: which groups are kept, that none is lost or generated in vain, and what the metrics count."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from togi.config.choices import OnRewardError, OnStale
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.data.prompts import LoaderState, PromptLoader
from togi.errors import ConfigError, RewardError
from togi.obs.run_dir import RunDirectory
from togi.plan.slots import Rules
from togi.pump.experience import GroupFilter, ScoredGroup, filter_metrics, rollout_metrics, rows, trainable
from togi.pump.feed import RolloutFeed
from togi.pump.ledger import Ledger
from togi.pump.pump import Pump
from togi.reward.scores import LengthPenalties
from togi.rollout.collect import SingleTurn
from togi.sample import FinishReason, Generation, Outcome, Prompt, Rollout, Sampling, Score

SAMPLES = 2
HALF = GroupFilter(0.0, 1.0, 20, OnRewardError.DROP_GROUP)


def scored(*rewards: float) -> list[Score]:
    return [Score(Outcome.SCORE, reward) for reward in rewards]


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [
        ((0.0, 1.0), True),
        ((1.0, 1.0), False),  # the ends are outside
        ((0.0, 0.0), False),
        ((0.5, 0.5), True),  # equal, but the range says what it says
        ((1.5, 0.5), False),
        ((-1.0, 0.5), False),
    ],
)
def test_the_range_is_open(rewards: tuple[float, ...], kept: bool) -> None:
    assert HALF.keeps(scored(*rewards)) is kept


def test_rounding_does_not_push_a_mean_off_the_end() -> None:
    """0.1 + 0.1 + 0.1 is more than 0.3 in floating point; the mean of three 0.1 is 0.1 here."""
    assert not GroupFilter(0.1, 1.0, 20, OnRewardError.DROP_GROUP).keeps(scored(0.1, 0.1, 0.1))


def test_what_cannot_be_trained_on_is_not_kept() -> None:
    abstained, failed = Score(Outcome.ABSTAIN), Score(Outcome.ERROR)
    assert HALF.keeps([*scored(0.0, 1.0), abstained])
    assert not HALF.keeps([abstained, abstained])
    assert not HALF.keeps([*scored(0.0, 1.0), failed])
    assert GroupFilter(0.0, 1.0, 20, OnRewardError.DROP_SAMPLE).keeps([*scored(0.0, 1.0), failed])


class ByPrompt:
    """Of a good prompt one response is right, of another none. Answers after a while that differs from prompt to prompt."""

    def __init__(self, good: set[int], fail_at: int = -1) -> None:
        self.good, self.fail_at = good, fail_at
        self.asked: list[int] = []

    async def generate(self, tokens: Sequence[int], sampling: Sampling) -> Generation:
        for _ in range((tokens[0] * 7) % 11):
            await asyncio.sleep(0)
        return Generation((5,), (-1.0,), FinishReason.STOP, (0,))

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        number = int(group[0].prompt.id)
        self.asked.append(number)
        for _ in range((number * 5) % 13):
            await asyncio.sleep(0)
        if number == self.fail_at:
            raise RewardError("the server is gone")
        return scored(float(number in self.good), *[0.0] * (len(group) - 1))

    async def close(self) -> None:
        """Nothing."""


def loader(count: int, episodes: int = 1) -> PromptLoader:
    return PromptLoader([Prompt(str(i), (i,), "text") for i in range(count)], seed=3, episodes=episodes)


def feed(world: ByPrompt, filtering: GroupFilter | None = HALF) -> RolloutFeed:
    environment = SingleTurn(lambda tokens: "answer", Sampling(max_tokens=4))
    return RolloutFeed(environment, world.generate, world, None, 0.0, filtering=filtering)


def taken(source: RolloutFeed, prompts: PromptLoader, count: int) -> list[ScoredGroup]:
    """The next synchronous rollout of ``count`` prompts."""

    async def take() -> list[ScoredGroup]:
        with TemporaryDirectory() as folder:
            ledger = Ledger(RunDirectory(Path(folder)), origin="", stores=False)
            pump = Pump(source, prompts, Rules(count, 0, OnStale.MASK, 0), SAMPLES, 1, ledger)
            try:
                return await pump.take(1)
            finally:
                await pump.close()

    return asyncio.run(take())


def numbers(groups: Sequence[ScoredGroup]) -> list[int]:
    return [int(group.rollouts[0].prompt.id) for group in groups]


def kept(groups: Sequence[ScoredGroup]) -> list[int]:
    return numbers([group for group in groups if not group.filtered])


def order(count: int) -> list[int]:
    return [int(prompt.id) for prompt in loader(count).take(count)]


def test_a_rollout_is_filled_with_no_prompt_too_many() -> None:
    """By hand from the loader's order: prompts are taken until the third good one, and those are kept, in order."""
    world = ByPrompt(good={i for i in range(20) if i % 3 == 0})
    prompts = loader(20)
    groups = taken(feed(world), prompts, 3)
    good = [i for i in order(20) if i % 3 == 0][:3]
    last = order(20).index(good[-1])
    assert kept(groups) == good
    assert numbers(groups) == order(20)[: last + 1]
    assert prompts.state().position == last + 1
    assert sorted(world.asked) == sorted(order(20)[: last + 1])
    rollouts = [groups[group].rollouts[index] for group, index in trainable(groups, OnRewardError.DROP_GROUP)]
    assert [int(rollout.prompt.id) for rollout in rollouts] == [number for number in good for _ in range(SAMPLES)]


def test_over_rollouts_every_good_prompt_is_trained_once() -> None:
    """Over episodes and restores in between; at the end of an episode what was kept so far is a smaller rollout."""
    good = {i for i in range(11) if i % 4 != 0}  # 8 of 11
    prompts, seen, sizes = loader(11, episodes=2), [], []
    while prompts.remaining > 0:
        groups = taken(feed(ByPrompt(good)), prompts, 3)
        seen += kept(groups)
        sizes.append(len(kept(groups)))
        saved = json.loads(json.dumps(prompts.state().to_json()))
        prompts = loader(11, episodes=2)
        prompts.load_state(LoaderState(**saved))
    assert sorted(seen) == sorted([*good, *good])
    assert sum(sizes) == 16
    assert sizes[:2] == [3, 3]  # 8 = 3 + 3 + 2, and perhaps an empty end of bad ones only


def test_a_rollout_that_fails_half_way_is_made_again_from_the_saved_position() -> None:
    prompts = loader(20)
    state = prompts.state()
    with pytest.raises(RewardError, match="the server is gone"):
        taken(feed(ByPrompt(set(range(20)), fail_at=order(20)[1])), prompts, 4)
    again = loader(20)
    again.load_state(state)
    groups = taken(feed(ByPrompt(set(range(20)))), again, 4)
    assert kept(groups) == order(20)[:4]


def test_nothing_to_keep_stops_with_one_sentence_or_ends_the_episode() -> None:
    strict = GroupFilter(0.0, 1.0, 2, OnRewardError.DROP_GROUP)
    prompts = loader(20)
    with pytest.raises(ConfigError) as error:
        taken(feed(ByPrompt({order(20)[0]}), strict), prompts, 3)
    assert "kept only 1 of 6 groups and the rollout needs 3" in str(error.value)
    assert "--dynamic_filtering_max_generations 2" in str(error.value)
    short = loader(5)
    groups = taken(feed(ByPrompt(set()), strict), short, 3)
    assert (numbers(groups), kept(groups), short.remaining) == (order(5), [], 0)


def test_without_filtering_every_group_is_kept() -> None:
    groups = taken(feed(ByPrompt(set()), None), loader(9), 4)
    assert kept(groups) == order(9)[:4]


def test_metrics_and_rows_count_groups() -> None:
    world = ByPrompt(good=set(order(20)[2:5]))
    groups = taken(feed(world), loader(20), 3)
    values = filter_metrics(groups, 3)
    assert values["groups/dropped_share"] == pytest.approx(2 / 5)
    assert values["groups/generations"] == pytest.approx(5 / 3)
    assert rollout_metrics(groups)["reward/mean"] == pytest.approx(3 / 10)  # of all that was generated
    stored = rows(groups)
    assert [row["filtered"] for row in stored] == [True] * 4 + [False] * 6


def test_the_range_is_about_the_reward_before_length_penalties() -> None:
    """All right and one too long: nothing to learn about being right, so the group is left out all the same."""
    group = [
        Rollout(Prompt("0", (1,), "q"), "g", (5,) * n, (True,) * n, (-1.0,) * n, "a", FinishReason.STOP, (0,) * n)
        for n in (1, 4)
    ]

    class AllRight(ByPrompt):
        async def generate(self, tokens: Sequence[int], sampling: Sampling) -> Generation:
            self.asked.append(0)
            length = len(group[len(self.asked) % 2].response_tokens)
            return Generation((5,) * length, (-1.0,) * length, FinishReason.STOP, (0,) * length)

        async def score(self, group: Sequence[Rollout]) -> list[Score]:
            return scored(*[1.0] * len(group))

    penalties = LengthPenalties(limit=4, buffer=2, factor=0.5, coef=None)
    environment = SingleTurn(lambda tokens: "answer", Sampling(max_tokens=4))
    world = AllRight(set())
    source = RolloutFeed(environment, world.generate, world, None, 0.0, penalties, HALF)
    [made] = taken(source, loader(1), 1)
    assert made.filtered
    assert sorted(score.value for score in made.scores) == [0.5, 1.0]


def test_flags_become_a_filter() -> None:
    flags = ["--dynamic_filtering", "--dynamic_filtering_reward_range", "0.1", "0.9", "--on_reward_error", "stop"]
    filtering = GroupFilter.of(parse(RLConfig, flags, "rl").config)
    assert filtering == GroupFilter(0.1, 0.9, 20, OnRewardError.STOP)
    assert GroupFilter.of(parse(RLConfig, [], "rl").config) is None
