"""The pump under random schedules: durations, filters, kills at any moment, every prompt once, no token older than allowed.

A world of its own: an engine whose answers take random numbers of turns of the event loop, and a trainer that publishes versions.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from togi.config.choices import OnRewardError, OnStale
from togi.data.prompts import LoaderState, PromptLoader
from togi.errors import RewardError
from togi.obs.run_dir import RunDirectory
from togi.plan.slots import Rules
from togi.pump.experience import GroupFilter, ScoredGroup, ages
from togi.pump.feed import RolloutFeed
from togi.pump.ledger import Event, Ledger, balance, read
from togi.pump.pump import Pump
from togi.rollout.collect import SingleTurn
from togi.sample import FinishReason, Generation, Outcome, Prompt, Rollout, Sampling, Score

SAMPLES, PATIENCE = 2, 10_000
# A failing schedule is shown as it is: to shorten it takes minutes.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
Trained = list[tuple[int, str]]
"""(episode, prompt) of every group that was trained or filtered."""


@dataclass
class World:
    """What happens in it depends on ``seed`` and, after a kill, on the number of lives so far."""

    rules: Rules
    prompts: int
    episodes: int
    seed: int
    filters: bool = False
    steps: int = PATIENCE
    version: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    budgets: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)

    def loader(self) -> PromptLoader:
        prompts = [Prompt(str(i), (i + 1,), "text") for i in range(self.prompts)]
        return PromptLoader(prompts, seed=1, episodes=self.episodes)

    async def generate(self, tokens: Sequence[int], sampling: Sampling) -> Generation:
        """A token each turn, by the weights that the engine has then."""
        self.asked[str(tokens[0] - 1)] += 1
        self.budgets.add(sampling.max_tokens)
        versions = []
        for _ in range(1 + int(self.dice.expovariate(0.2))):
            await asyncio.sleep(0)
            versions.append(self.version)
        count = len(versions)
        return Generation((7,) * count, (-1.0,) * count, FinishReason.STOP, tuple(versions))

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        for _ in range(self.dice.randrange(8)):
            await asyncio.sleep(0)
        # The same prompt gives the same reward, so that a filtered one is filtered whenever it is generated.
        right = not self.filters or int(group[0].prompt.id) % 3 > 0
        return [Score(Outcome.SCORE, 1.0), *[Score(Outcome.SCORE, 0.0 if right else 1.0)] * (len(group) - 1)]

    async def close(self) -> None:
        """Nothing."""

    def pump(self, loader: PromptLoader, folder: Path) -> Pump:
        filtering = GroupFilter(0.0, 1.0, 1000, OnRewardError.DROP_GROUP) if self.filters else None
        environment = SingleTurn(lambda _: "", Sampling(max_tokens=99))
        source = RolloutFeed(environment, self.generate, self, None, 0.0, filtering=filtering)
        ledger = Ledger(RunDirectory(folder), origin="", stores=True)
        return Pump(source, loader, self.rules, SAMPLES, self.steps, ledger)


@dataclass
class Checkpoint:
    step: int
    state: str
    loader: str
    trained: Trained


def episodes_of(groups: Sequence[ScoredGroup], seen: Trained) -> Trained:
    """The groups by the pass over the prompts that they are of: the n-th group of a prompt is of the n-th pass."""
    counts = Counter(prompt for _, prompt in seen)
    found = []
    for group in groups:
        name = group.rollouts[0].prompt.id
        found.append((counts[name], name))
        counts[name] += 1
    return found


async def live(world: World, folder: Path, last: Checkpoint | None, every: int, offered: list[int]) -> Trained:
    """Train to the end from a checkpoint, which ``world.last`` replaces. Checks what every step got."""
    loader = world.loader()
    world.version = step = 0 if last is None else last.step
    trained: Trained = [] if last is None else list(last.trained)
    pump = world.pump(loader, folder)
    if last is not None:
        loader.load_state(LoaderState(**json.loads(last.loader)))
        pump.resume(step, json.loads(last.state))
    elif world.asked:
        pump.resume(0, None)
    try:
        pump.published(step)
        while step < world.steps and not pump.is_empty:
            slots = (world.rules.staleness + 1) * world.rules.batch
            assert len(pump._slots) <= slots
            groups = await pump.take(step + 1)
            if not groups:
                assert pump.is_empty, "prompts are left"
                break
            kept = [group for group in groups if not group.filtered]
            assert len(kept) <= world.rules.batch
            assert all(len(group.rollouts) == SAMPLES for group in groups)
            places = [(i, j) for i in range(len(kept)) for j in range(SAMPLES)]
            oldest = max((int(age.max()) for age in ages(kept, places, step)), default=0)
            assert all(int(age.min()) >= 0 for age in ages(kept, places, step)), "weights of another life"
            if world.rules.on_stale is not OnStale.MASK:
                assert oldest <= world.rules.max_lag
            if world.rules.staleness == 0:
                assert oldest == 0
            trained += episodes_of(groups, trained)
            offered += [len(rollout.versions) for group in kept for rollout in group.rollouts]
            for _ in range(world.dice.randrange(30)):  # training
                await asyncio.sleep(0)
            step += 1
            world.version = step
            pump.published(step)
            if step % every == 0:
                position = json.dumps(loader.state().to_json())
                world.last = Checkpoint(step, json.dumps(pump.state()), position, list(trained))
                pump.saved()
        return trained
    finally:
        await pump.close()


def once_each(world: World, trained: Trained) -> bool:
    return sorted(trained) == sorted((e, str(p)) for e in range(world.episodes) for p in range(world.prompts))


RULES = st.builds(
    lambda batch, staleness, on_stale, more: Rules(batch, staleness, on_stale, staleness + more),
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from([OnStale.MASK, OnStale.WAIT]),
    st.integers(0, 2),
)
WORLDS = st.builds(World, RULES, st.integers(1, 11), st.integers(1, 3), st.integers(0, 10**6), st.booleans())


@settings(max_examples=60, deadline=None, phases=PHASES)
@given(WORLDS, st.lists(st.integers(1, 400), max_size=6), st.integers(1, 3))
def test_every_prompt_is_trained_or_filtered_once_whatever_is_killed(
    world: World, kills: list[int], every: int
) -> None:
    """``kills``: after how many turns of the event loop each life ends. ``every``: steps between checkpoints."""

    async def lives(folder: Path) -> Trained:
        world.last = None
        for turns in kills:
            life = asyncio.ensure_future(live(world, folder, world.last, every, []))
            for _ in range(turns):
                await asyncio.sleep(0)
            life.cancel()
            with suppress(asyncio.CancelledError):
                return await life  # it had come to its end
        return await live(world, folder, world.last, every, [])

    with TemporaryDirectory() as name:
        trained = asyncio.run(asyncio.wait_for(lives(Path(name)), 60))
        states = balance(read(Path(name) / "ledger.jsonl"))
    assert once_each(world, trained)
    assert set(states.values()) <= {Event.TRAINED, Event.FILTERED}
    assert len(states) == world.prompts * world.episodes
    assert world.budgets == {99}


@settings(max_examples=25, deadline=None, phases=PHASES)
@given(WORLDS)
def test_what_is_offered_is_trained(world: World) -> None:
    """Without drops, the lengths of what was trained are those of all that was generated and kept."""
    made: list[int] = []
    scored = world.score

    async def score(group: Sequence[Rollout]) -> list[Score]:
        scores = await scored(group)
        if scores[0].value != scores[-1].value:
            made.extend(len(rollout.versions) for rollout in group)
        return scores

    world.score = score  # type: ignore[method-assign]
    with TemporaryDirectory() as name:
        trained: list[int] = []
        assert once_each(world, asyncio.run(live(world, Path(name), None, 3, trained)))
    assert sorted(made if world.filters else trained) == sorted(trained)


def test_what_is_finished_is_not_generated_again(tmp_path: Path) -> None:
    """A kill after the checkpoint of step 2: groups of weights up to 2 come from the ledger, those of step 3's are made anew."""
    world = World(Rules(2, 1, OnStale.MASK, 3), prompts=10, episodes=1, seed=8)

    async def scenario() -> None:
        world.last = None
        life = asyncio.ensure_future(live(world, tmp_path, None, 2, []))
        while world.last is None:
            await asyncio.sleep(0)
        for _ in range(12):  # until some of what is in work is finished, though not trained
            await asyncio.sleep(0)
        life.cancel()
        with suppress(asyncio.CancelledError):
            await life

    asyncio.run(scenario())
    assert world.last is not None
    state = json.loads(world.last.state)
    unfinished = [int(number) for number in state["prompts"]]
    prompts = world.loader().prompts
    before = world.asked.copy()
    usable = Ledger(RunDirectory(tmp_path), origin="", stores=True)
    usable.resume(2)
    reused = [n for n in unfinished if usable.kept(n, prompts[state["prompts"][str(n)]]) is not None]
    assert reused, "nothing was finished: the test says nothing"
    assert once_each(world, asyncio.run(live(world, tmp_path, world.last, 2, [])))
    for number in reused:
        name = state["prompts"][str(number)]
        assert world.asked[name] == before[name] == SAMPLES
    other = Ledger(RunDirectory(tmp_path), origin="another temperature", stores=True)
    other.resume(2)
    assert [other.kept(n, prompts[state["prompts"][str(n)]]) for n in reused] == [None] * len(reused)


def test_drop_gives_the_place_to_another_prompt() -> None:
    world = World(Rules(1, 2, OnStale.DROP, 2), prompts=30, episodes=1, seed=1)
    slow = "slow"

    async def generate(tokens: Sequence[int], sampling: Sampling) -> Generation:
        if slow not in world.asked:  # the first request hears nothing for long
            world.asked[slow] += 1
            while world.version < 8:
                await asyncio.sleep(0)
            return Generation((7, 7), (-1.0, -1.0), FinishReason.STOP, (0, world.version))
        await asyncio.sleep(0)
        return Generation((7,), (-1.0,), FinishReason.STOP, (world.version,))

    world.generate = generate  # type: ignore[method-assign]
    with TemporaryDirectory() as name:
        trained = asyncio.run(live(world, Path(name), None, 100, []))
        states = Counter(balance(read(Path(name) / "ledger.jsonl")).values())
    assert states == {Event.ABANDONED: 1, Event.TRAINED: 29}
    assert len(set(trained)) == len(trained) == 29


def test_an_error_of_one_prompt_ends_the_next_take_and_all_work(tmp_path: Path) -> None:
    world = World(Rules(2, 1, OnStale.MASK, 3), prompts=8, episodes=1, seed=3)

    async def fails(group: Sequence[Rollout]) -> list[Score]:
        raise RewardError("the server is gone")

    world.score = fails  # type: ignore[method-assign]

    async def scenario() -> int:
        pump = world.pump(world.loader(), tmp_path)
        try:
            with pytest.raises(RewardError, match="the server is gone"):
                await pump.take(1)
        finally:
            await pump.close()
        return len(asyncio.all_tasks())

    assert asyncio.run(scenario()) == 1
