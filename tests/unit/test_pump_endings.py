"""Every wait of the pump ends, whatever is filtered, dropped, late or killed, and wherever the run stops.

A clock of its own: where nothing can happen any more the event loop fails at once, so a hang is a failed test.
"""

from __future__ import annotations

import asyncio
import json
import random
import selectors
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from togi.config.choices import OnRewardError, OnStale
from togi.data.prompts import LoaderState, PromptLoader
from togi.errors import RunError
from togi.obs.run_dir import RunDirectory
from togi.plan.slots import Rules
from togi.pump.experience import GroupFilter, ScoredGroup, ages
from togi.pump.feed import RolloutFeed
from togi.pump.ledger import Event, Ledger, balance, read
from togi.pump.pump import Pump
from togi.rollout.collect import SingleTurn
from togi.sample import FinishReason, Generation, Outcome, Prompt, Rollout, Sampling, Score

SAMPLES = 2
# A failing run is shown as it is: to shorten it takes minutes.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


class Clock(selectors.SelectSelector):
    """Where the event loop would sleep, its time goes on."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("a hang: nothing will happen any more")
        self.now += max(timeout, 0.0)
        return super().select(0)


T = TypeVar("T")


def on_a_clock(work: Coroutine[Any, Any, T]) -> T:
    def loop() -> asyncio.AbstractEventLoop:
        clock = Clock()
        made = asyncio.SelectorEventLoop(clock)
        made.time = lambda: clock.now  # type: ignore[method-assign]
        return made

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(work)


@dataclass
class World:
    """``steps``: of the run. ``filtered``, ``slow``: shares of the groups. ``version``: of the engines' weights."""

    rules: Rules
    prompts: int
    episodes: int
    steps: int
    seed: int = 0
    filtered: float = 0.0
    slow: float = 0.0
    version: int = 0
    last: tuple[int, str] | None = None
    """A checkpoint: its step, and the positions of pump and loader."""
    asked: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)

    def loader(self) -> PromptLoader:
        return PromptLoader(
            [Prompt(str(i), (i + 1,), "text") for i in range(self.prompts)], seed=1, episodes=self.episodes
        )

    async def generate(self, tokens: Sequence[int], sampling: Sampling) -> Generation:
        """Two tokens, each by the weights that the engine has when it comes."""
        self.asked.append(tokens[0] - 1)
        seconds, versions = self.dice.expovariate(1.0) * (30 if self.dice.random() < self.slow else 1), list[int]()
        await asyncio.sleep(self.dice.random() * seconds)
        for _ in range(2):
            versions.append(self.version)
            await asyncio.sleep(seconds)
        return Generation((7, 7), (-1.0, -1.0), FinishReason.STOP, tuple(versions))

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        # the same prompt gives the same reward
        right = random.Random(f"{self.seed}/{group[0].prompt.id}").random() >= self.filtered
        return [Score(Outcome.SCORE, 1.0), *[Score(Outcome.SCORE, 0.0 if right else 1.0)] * (len(group) - 1)]

    async def close(self) -> None:
        """Nothing."""

    def pump(self, loader: PromptLoader, folder: Path) -> Pump:
        filtering = GroupFilter(0.0, 1.0, 1000, OnRewardError.DROP_GROUP)
        environment = SingleTurn(lambda _: "", Sampling(max_tokens=9))
        source = RolloutFeed(environment, self.generate, self, None, 0.0, filtering=filtering)
        ledger = Ledger(RunDirectory(folder), origin="", stores=True)
        return Pump(source, loader, self.rules, SAMPLES, self.steps, ledger)

    async def live(self, folder: Path, every: int = 1) -> list[int]:
        """Train from the last checkpoint to the end, with the checks of each step. Returns the groups trained in each step."""
        loader, sizes = self.loader(), list[int]()
        pump = self.pump(loader, folder)
        step = self.version = 0 if self.last is None else self.last[0]
        if self.last is not None:
            position = json.loads(self.last[1])
            loader.load_state(LoaderState(**position["loader"]))
            pump.resume(step, position["pump"])
        elif self.asked:
            pump.resume(0, None)
        try:
            pump.published(step)
            while step < self.steps and not pump.is_empty:
                episode, groups = pump.episode, await pump.take(step + 1)
                if not groups:
                    assert pump.is_empty, "prompts are left"
                    break
                sizes.append(self.check(groups, step))
                assert sizes[-1] == self.rules.batch or pump.is_empty or pump.episode > episode, "too few groups"
                await asyncio.sleep(self.dice.random() * 5)
                step = self.version = step + 1
                pump.published(step)
                if step % every == 0:
                    self.last = step, json.dumps({"loader": loader.state().to_json(), "pump": pump.state()})
                    pump.saved()
                    begun = {number for number in pump._ledger.stored() if number < pump._slots.next_number}
                    assert begun <= pump._work.keys() | pump._filtered.keys(), "not needed any more"
            assert not pump._work, "started in vain"
            return sizes
        finally:
            await pump.close()

    def check(self, groups: Sequence[ScoredGroup], step: int) -> int:
        kept = [group for group in groups if not group.filtered]
        assert len(kept) <= self.rules.batch
        places = [(i, j) for i in range(len(kept)) for j in range(SAMPLES)]
        for age in ages(kept, places, step):
            assert age.min() >= 0
            assert self.rules.on_stale is OnStale.MASK or age.max() <= self.rules.max_lag
        return len(kept)


RULES = st.builds(
    lambda batch, staleness, on_stale, more: Rules(batch, staleness, on_stale, staleness + more),
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from(OnStale),
    st.integers(0, 2),
)
SHARES = st.sampled_from((0.0, 0.2, 0.6, 1.0))
WORLDS = st.builds(
    World, RULES, st.integers(1, 14), st.integers(1, 4), st.integers(1, 14), st.integers(0, 10**6), SHARES, SHARES
)


@settings(max_examples=60, deadline=None, phases=PHASES)
@given(WORLDS, st.lists(st.floats(0.1, 60.0), max_size=4), st.integers(1, 3), st.booleans())
def test_no_run_waits_for_ever(world: World, kills: list[float], every: int, is_cut: bool) -> None:
    """``kills``: after how many seconds each life ends. ``is_cut``: the last life has an episode less than those before it."""

    async def lives(folder: Path) -> None:
        for seconds in kills:
            life = asyncio.ensure_future(world.live(folder, every))
            await asyncio.wait({life}, timeout=seconds)
            if life.done():
                life.result()
                return
            life.cancel()
            await asyncio.wait({life})
        if is_cut and world.last is not None:
            world.episodes = max(1, world.episodes - 1)
        await world.live(folder, every)

    with TemporaryDirectory() as name:
        on_a_clock(lives(Path(name)))
        states = balance(read(Path(name) / "ledger.jsonl"))
    assert set(states.values()) <= {Event.TRAINED, Event.FILTERED, Event.ABANDONED}


def test_late_filtered_groups_are_replaced_from_the_next_episode(tmp_path: Path) -> None:
    """Seven of ten prompts are kept: an episode is a step of four and one of three. The fifth step needs a third episode."""
    world = World(Rules(4, 2, OnStale.MASK, 6), prompts=10, episodes=4, steps=5, seed=1, filtered=0.3)
    order = world.loader().take(10)
    good = [prompt for prompt in order if random.Random(f"1/{prompt.id}").random() >= 0.3]
    assert len(good) == 7
    assert on_a_clock(world.live(tmp_path)) == [4, 3, 4, 3, 4]


@dataclass
class Late(World):
    """The group of the first prompt ends after 100 seconds. ``is_old``: the weights of its beginning sampled its token."""

    is_old: bool = True

    async def generate(self, tokens: Sequence[int], sampling: Sampling) -> Generation:
        is_late, version = str(tokens[0] - 1) == self.loader().take(1)[0].id, self.version
        await asyncio.sleep(100.0 if is_late else 0.01)
        version = version if is_late and self.is_old else self.version
        return Generation((7,), (-1.0,), FinishReason.STOP, (version,))


@pytest.mark.parametrize("is_old", [True, False])
def test_a_dropped_group_is_replaced_also_before_the_last_step(tmp_path: Path, *, is_old: bool) -> None:
    """The late group is waited for only when no other prompt may start; it is dropped only if its tokens are old."""
    world = Late(Rules(2, 1, OnStale.DROP, 1), prompts=10, episodes=1, steps=4, is_old=is_old)
    assert on_a_clock(world.live(tmp_path)) == [2, 2, 2, 2]
    states = balance(read(tmp_path / "ledger.jsonl"))
    assert (states[0], len(states)) == ((Event.ABANDONED, 9) if is_old else (Event.TRAINED, 8))


def test_a_run_of_fewer_episodes_than_its_checkpoint_takes_what_is_in_work(tmp_path: Path) -> None:
    """One group is at work of an episode that is not over, and no prompt may come any more: it is a step of its own."""
    world = World(Rules(4, 1, OnStale.MASK, 3), prompts=5, episodes=3, steps=99)

    async def scenario() -> list[int]:
        loader = world.loader()
        pump = world.pump(loader, tmp_path)
        pump._slots.version = pump._slots._next_trained = 3
        loader.take(5)
        loader.take(1)
        slot = pump._slots.admit(1)
        slots, rounds = [asdict(slot)], [asdict(each) for each in pump._slots.rounds]
        name = loader.prompts["0"].id
        state = {"next": 6, "slots": slots, "rounds": rounds, "prompts": {"0": name}, "filtered": {}}
        world.last, world.episodes = (3, json.dumps({"loader": loader.state().to_json(), "pump": state})), 1
        return await world.live(tmp_path)

    assert on_a_clock(scenario()) == [1]


def test_work_that_is_cancelled_ends_the_run(tmp_path: Path) -> None:
    world = World(Rules(2, 1, OnStale.MASK, 3), prompts=4, episodes=1, steps=2)

    async def cancelled(tokens: Sequence[int], sampling: Sampling) -> Generation:
        raise asyncio.CancelledError

    world.generate = cancelled  # type: ignore[method-assign]
    with pytest.raises(RunError, match="was cancelled"):
        on_a_clock(world.live(tmp_path))


def test_a_stored_group_is_not_put_into_a_younger_slot(tmp_path: Path) -> None:
    """Prompt 1 was generated by version 0 before a kill, and comes at version 1 after it, where it would be too old."""
    world = World(Rules(1, 0, OnStale.WAIT, 0), prompts=2, episodes=1, steps=2)

    async def scenario() -> list[int]:
        loader, second = world.loader(), world.loader().take(2)[1]
        pump = world.pump(loader, tmp_path)
        rollouts = await pump._source.generated(second, "g", SAMPLES)
        scored = ScoredGroup(tuple(rollouts), (Score(Outcome.SCORE, 1.0), Score(Outcome.SCORE, 0.0)))
        pump._ledger.keep(1, second, scored)
        return await world.live(tmp_path)

    assert on_a_clock(scenario()) == [1, 1]
    assert len(world.asked) == 3 * SAMPLES
