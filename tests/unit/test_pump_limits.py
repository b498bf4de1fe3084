"""The pump at the ends of a run: what is left when groups are dropped, filtered or late."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from togi.config.choices import OnRewardError, OnStale
from togi.data.prompts import PromptLoader
from togi.obs.run_dir import RunDirectory
from togi.plan.slots import Rules
from togi.pump.experience import GroupFilter, ScoredGroup
from togi.pump.feed import RolloutFeed
from togi.pump.ledger import Event, Ledger, balance, read
from togi.pump.pump import Pump
from togi.rollout.collect import SingleTurn
from togi.sample import FinishReason, Generation, Outcome, Prompt, Rollout, Sampling, Score

SAMPLES = 2


class World:
    """Engine and reward. The answer to a prompt in ``slow`` waits until version ``until`` is published; ``bad`` is filtered."""

    def __init__(self, slow: set[int], until: int, bad: set[int]) -> None:
        self.slow, self.until, self.bad = slow, until, bad
        self.version = 0
        self.begun: list[int] = []

    async def generate(self, tokens: Sequence[int], _: Sampling) -> Generation:
        started = self.version
        self.begun.append(tokens[0])
        while tokens[0] in self.slow and self.version < self.until:
            await asyncio.sleep(0.001)
        return Generation((5, 6), (-1.0, -1.0), FinishReason.STOP, (started, self.version))

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        good = float(group[0].prompt.tokens[0] not in self.bad)
        return [Score(Outcome.SCORE, good), *[Score(Outcome.SCORE, 0.0)] * (len(group) - 1)]

    async def close(self) -> None:
        """Nothing."""


def loader(count: int, episodes: int = 1) -> PromptLoader:
    return PromptLoader([Prompt(str(i), (i,), "text") for i in range(count)], seed=3, episodes=episodes)


async def trained(
    folder: Path, world: World, prompts: PromptLoader, rules: Rules, rounds: int
) -> list[list[ScoredGroup]]:
    """What the loop of a run takes, until it is done."""
    filtering = GroupFilter(0.0, 1.0, 20, OnRewardError.DROP_GROUP)
    environment = SingleTurn(lambda tokens: "answer", Sampling(max_tokens=4))
    source = RolloutFeed(environment, world.generate, world, None, 0.0, filtering=filtering)
    pump = Pump(source, prompts, rules, SAMPLES, rounds, Ledger(RunDirectory(folder), origin="", stores=False))
    steps = list[list[ScoredGroup]]()
    try:
        while len(steps) < rounds and not pump.is_empty:
            steps.append(await asyncio.wait_for(pump.take(len(steps) + 1), 5))
            if not steps[-1]:
                assert pump.is_empty, "a step without any group"
                break
            world.version += 1
            await asyncio.sleep(0.005)  # training
            pump.published(world.version)
    finally:
        await pump.close()
    return steps


def order(count: int) -> list[int]:
    """The prompts in the order in which they are admitted."""
    return [int(prompt.id) for prompt in loader(count).take(count)]


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("on_stale", list(OnStale))
def test_a_straggler_at_the_end_of_a_run_does_not_stop_it(tmp_path: Path, place: int, on_stale: OnStale) -> None:
    """It is too old when all other prompts are used up."""
    rules = Rules(batch=1, staleness=1, on_stale=on_stale, max_lag=1)
    until = 1 if on_stale is OnStale.WAIT else 5
    world = World({order(6)[place]}, until, set())
    steps = asyncio.run(trained(tmp_path, world, loader(6), rules, 6))
    taken = [int(group.rollouts[0].prompt.id) for groups in steps for group in groups]
    assert len(taken) == len(set(taken))
    states = balance(read(RunDirectory(tmp_path).ledger_path))
    assert sorted(states) == list(range(6))
    assert set(states.values()) <= {Event.TRAINED, Event.ABANDONED}
    assert on_stale is OnStale.DROP or set(states.values()) == {Event.TRAINED}


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("bad", [{0, 1, 2, 3, 4, 5, 6}, {6, 5}, {0, 3}, set(range(0, 7, 2))])
def test_every_prompt_is_trained_or_filtered_once_per_episode(tmp_path: Path, staleness: int, bad: set[int]) -> None:
    rules = Rules(batch=2, staleness=staleness, on_stale=OnStale.MASK, max_lag=3 * staleness)
    world = World({order(7)[1]}, 0, bad)
    steps = asyncio.run(trained(tmp_path, world, loader(7, 2), rules, 100))
    seen = [(int(group.rollouts[0].prompt.id), group.filtered) for groups in steps for group in groups]
    assert sorted(seen) == sorted([(number, number in bad) for number in range(7)] * 2)


@pytest.mark.parametrize("staleness", [0, 1])
def test_groups_that_are_filtered_after_the_last_step_are_reported(tmp_path: Path, staleness: int) -> None:
    """The prompts of a stored run are counted by its groups: a replay must find all of them."""
    rules = Rules(batch=2, staleness=staleness, on_stale=OnStale.MASK, max_lag=3 * staleness)
    world = World(set(), 0, {order(7)[-1]})
    steps = asyncio.run(trained(tmp_path, world, loader(7), rules, 100))
    assert sorted(int(group.rollouts[0].prompt.id) for groups in steps for group in groups) == list(range(7))
