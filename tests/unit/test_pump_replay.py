"""Stored rollouts read back as the groups that were trained, or refused in words."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.config.rl_checks import check_rl
from togi.data.prompts import PromptLoader
from togi.errors import ConfigError, DataError
from togi.obs.rollout_store import RolloutStore, Split
from togi.obs.run_dir import Resolved, RunDirectory
from togi.pump.experience import ScoredGroup, rows
from togi.pump.feed import ReplayFeed
from togi.run.preflight import REPLAYED, check_replayed
from togi.sample import FinishReason, Outcome, Prompt, Rollout, Score

PROMPTS = [Prompt("0:4", (1, 2), "ab", {"answer": [3]}, "sums"), Prompt("1:0", (5,), "c")]


def group(place: int, values: list[float | None]) -> ScoredGroup:
    prompt = PROMPTS[place]
    rollouts = tuple(
        Rollout(
            prompt, f"step1/{place}", (7, 8 + i), (True, i > 0), (-0.5, -0.25 * i), f"t{i}", FinishReason.LENGTH, (2, 3)
        )
        for i in range(len(values))
    )
    scores = [Score(Outcome.ABSTAIN) if v is None else Score(Outcome.SCORE, v, {"part": v / 3}) for v in values]
    return ScoredGroup(rollouts, tuple(scores))


@pytest.fixture
def feed(tmp_path: Path) -> ReplayFeed:
    """Step 1 of two groups of two, beside an evaluation of the same step."""
    store = RolloutStore(tmp_path / "rollouts")
    groups = [group(0, [0.1, None]), group(1, [1 / 3, -2.0])]
    store.write(1, Split.TRAIN, rows(groups))
    store.write(1, Split.EVAL, rows([group(1, [9.0])]))
    return replay(store, 2)


def replay(store: RolloutStore, samples: int, prompts: Sequence[Prompt] = PROMPTS, episodes: int = 1) -> ReplayFeed:
    return ReplayFeed(store, PromptLoader(prompts, seed=0, episodes=episodes), samples)


def test_groups_come_back_as_they_were(feed: ReplayFeed) -> None:
    first, second = asyncio.run(feed.take(1))
    assert second.rollouts == group(1, [1 / 3, -2.0]).rollouts
    assert [rollout.versions for rollout in second.rollouts] == [(2, 3)] * 2
    assert second.scores == group(1, [1 / 3, -2.0]).scores
    assert [rollout.prompt for rollout in first.rollouts] == [PROMPTS[0]] * 2
    assert first.scores[0].value == 0.1
    assert first.scores[1].outcome is Outcome.ABSTAIN
    assert math.isnan(first.scores[1].value)
    assert (feed.is_empty, feed.episode) == (True, 1)


def test_another_run_is_refused(feed: ReplayFeed) -> None:
    with pytest.raises(DataError, match=r"trained on prompt 1:0, which this run does not have: give the prompts"):
        replay(feed.store, 2, PROMPTS[:1]).groups(1)
    other = [Prompt("0:4", (1, 3), "ab"), PROMPTS[1]]
    with pytest.raises(DataError, match=r"other tokens of prompt 0:4 than this run: use the data, tokenizer"):
        replay(feed.store, 2, other).groups(1)
    with pytest.raises(DataError, match=r"has 2 samples of prompt 0:4, not --n_samples_per_prompt 3"):
        replay(feed.store, 3).groups(1)


def test_a_filtered_run_takes_as_many_prompts_as_it_took(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "rollouts")
    for step, groups in ((1, [replace(group(0, [0.0]), filtered=True), group(1, [1.0])]), (2, [group(1, [2.0])])):
        store.write(step, Split.TRAIN, rows(groups))
    feed = replay(store, 1, episodes=2)
    assert [feed.prompts_of(step) for step in (1, 2, 3)] == [2, 1, 0]
    assert [feed.steps_for(prompts) for prompts in (2, 3, 4)] == [1, 2, 3]
    assert [made.filtered for made in asyncio.run(feed.take(1))] == [True, False]
    assert (feed.is_empty, feed.episode) == (False, 1)


def test_tokens_of_older_weights_are_found(tmp_path: Path) -> None:
    """The rollouts of ``group`` are of versions 2 and 3: weights 3 train on them in step 4, where the first token is of age 1."""
    store = RolloutStore(tmp_path / "rollouts")
    store.write(3, Split.TRAIN, rows([group(0, [0.0])]))
    assert replay(store, 1).first_stale_step() == 0
    store.write(4, Split.TRAIN, rows([group(1, [1.0])]))
    store.write(9, Split.EVAL, rows([group(1, [1.0])]))
    assert replay(store, 1).first_stale_step() == 4
    assert replay(store, 1).last_step == 4


def test_a_replay_ends_where_the_run_did(feed: ReplayFeed) -> None:
    """With ``drop`` a run may end before all its prompts are trained on."""
    longer = replay(feed.store, 2, episodes=3)
    assert not longer.is_empty
    asyncio.run(longer.take(1))
    assert longer.is_empty


def test_all_steps_must_be_stored(feed: ReplayFeed, tmp_path: Path) -> None:
    feed.check(1)
    with pytest.raises(DataError, match=r"no rollouts of step 2, but this run takes 3 steps: set --max_steps to 1\.$"):
        feed.check(3)
    with pytest.raises(DataError, match="give the folder of a run of togi rl"):
        replay(RolloutStore(tmp_path / "nothing"), 2).check(1)


def config(*flags: str) -> RLConfig:
    return parse(RLConfig, ["--pretrain", "m", "--prompt_data", "p", *flags], "rl").config


def test_settings_that_the_rollouts_depend_on_must_agree(tmp_path: Path) -> None:
    run = tmp_path / "run"
    here = config("--replay", str(run), "--n_samples_per_prompt", "4", "--init_kl_coef", "0")
    check_rl(here)  # no reward is needed
    with pytest.raises(DataError, match=r"^--replay: .* is not the folder of a run"):
        check_replayed(here, run)
    values = {name: Resolved(getattr(here, name), "default") for name in REPLAYED}
    RunDirectory.create(run, "rl", [], values | {"temperature": Resolved(0.7, "command line")})
    with pytest.raises(ConfigError, match=r"was made with --temperature 0\.7, but here it is 1\.0: make them equal"):
        check_replayed(here, run)
    check_replayed(here.model_copy(update={"temperature": 0.7}), run)


def test_contradictions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--replay starts no engine, so that nothing can be evaluated"):
        check_rl(config("--replay", "x", "--eval_dataset", "e"))
    with pytest.raises(ConfigError, match="--replay and --run_dir are both"):
        check_rl(config("--replay", str(tmp_path), "--run_dir", f"{tmp_path}/../{tmp_path.name}"))
