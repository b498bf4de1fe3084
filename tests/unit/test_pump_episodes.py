"""Episodes of several turns on their way from rollout to sample, advantages, metrics and store."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.learn.objective import ADVANTAGES, OLD_VALUES
from togi.obs.names import explain
from togi.obs.report import write_report
from togi.obs.rollout_store import RolloutStore, Split
from togi.obs.run_dir import RunDirectory
from togi.pump.experience import ScoredGroup, ages, group_of, rollout_metrics, rows, staleness_metrics, to_sample
from togi.pump.experience import with_advantages as advantages_of
from togi.sample import FinishReason, Fork, Outcome, Prompt, Rollout, Score

PROMPT = Prompt("0:0", (1, 2), "Q", label={"a": 1}, datasource="games")
# Sampled 3 4, given 5, sampled 6; then a fork after the 3: given 7, sampled 8.
EPISODE = Rollout(
    prompt=PROMPT,
    group_id="g",
    response_tokens=(3, 4, 5, 6, 7, 8),
    response_mask=(True, True, False, True, False, True),
    response_logprobs=(-1.0, -1.0, 0.0, -2.0, 0.0, -3.0),
    response_text="text",
    finish_reason=FinishReason.STOP,
    versions=(0, 0, 1, 1, 2, 2),
    forks=(Fork(6, 2),),
    score=Score(Outcome.SCORE, 5.0),
    messages=({"role": "user", "content": "Q"},),
    counts={"turns": 3.0, "tool_calls": 2.0},
)
SCORE = Score(Outcome.SCORE, 5.0, {"environment": 5.0}, turns=((1, 3.0), (3, 1.0)))
GROUP = ScoredGroup((EPISODE, replace(EPISODE, counts={"turns": 1.0})), (SCORE, replace(SCORE, value=4.0, turns=())))


def config(*flags: str) -> RLConfig:
    return parse(RLConfig, ["--pretrain", "m", "--prompt_data", "p", "--init_kl_coef", "0", *flags], "rl").config


def test_an_episode_is_one_sample_with_its_forks() -> None:
    sample = to_sample(EPISODE)
    assert sample.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert sample.loss_mask.tolist() == [False, False, True, True, False, True, False, True]
    assert (sample.prompt_length, sample.forks) == (2, ((6, 2),))
    assert EPISODE.row == (1, 2, 3, 7, 8)


def test_rewards_of_turns_reach_the_tokens_after_which_they_came() -> None:
    """3 after the 4, 1 after the 6, 1 at the end: returns 5, 5, 2, 1 without a discount, 3 + 0.5 + 0.25, 1 + 0.5, 1 with 0.5."""
    flags = ["--advantage_estimator", "reinforce", "--no_advantage_std_norm", "--n_samples_per_prompt", "2"]
    for discount, expected in (("1", [5, 5, 2, 1]), ("0.5", [3.75, 3.75, 1.5, 1])):
        settings = config(*flags, "--turn_discount", discount)
        [sample] = advantages_of([GROUP], [(0, 0)], [to_sample(EPISODE)], settings, 0.0)
        found = sample.streams["returns"][sample.loss_mask]
        assert found.tolist() == expected
        mean = sum(expected) / 4
        assert sample.streams[ADVANTAGES][sample.loss_mask].tolist() == [value - mean for value in expected]


def test_groups_compare_episodes_whatever_their_turns() -> None:
    """5 and 4 without a discount; with 0.5 the first is 3 + 0.5 + 0.25 and the second 4 at the end of its third turn, so 1."""
    samples, places = [to_sample(EPISODE)] * 2, [(0, 0), (0, 1)]
    for discount, half in (("1", 0.5), ("0.5", 1.375)):
        settings = config(
            "--advantage_estimator", "dr_grpo", "--n_samples_per_prompt", "2", "--turn_discount", discount
        )
        first, second = advantages_of([GROUP], places, samples, settings, 0.0)
        assert set(first.streams[ADVANTAGES][first.loss_mask]) == {half}
        assert set(second.streams[ADVANTAGES][second.loss_mask]) == {-half}


def test_a_critic_skips_observations() -> None:
    """Lambda 0: r + d V' - V from each sampled token to the next sampled one."""
    values = np.array([np.nan, np.nan, 1, 2, np.nan, 4, np.nan, 8], dtype=np.float32)
    sample = replace(to_sample(EPISODE), streams={**to_sample(EPISODE).streams, OLD_VALUES: values})
    settings = config("--lambd", "0", "--turn_discount", "0.5", "--no_advantage_std_norm")
    [found] = advantages_of([GROUP], [(0, 0)], [sample], settings, 0.0)
    raw = np.array([2 - 1, 3 + 0.5 * 4 - 2, 1 + 0.5 * 8 - 4, 1 - 8])
    assert found.streams[ADVANTAGES][found.loss_mask] == pytest.approx(raw - raw.mean())


def test_ages_are_those_of_sampled_tokens() -> None:
    [age] = ages([GROUP], [(0, 0)], 3)
    assert age.tolist() == [3, 3, 2, 2, 1, 1]
    values = staleness_metrics([GROUP], [(0, 0)], [age], 2)
    assert values["staleness/token"] == (3 + 3 + 2 + 1) / 4
    assert values["staleness/masked_share"] == 0.5


def test_what_was_counted_becomes_metrics() -> None:
    values = rollout_metrics([GROUP])
    assert (values["episode/turns"], values["episode/tool_calls"], values["length/response"]) == (2.0, 1.0, 4.0)
    assert not any(name.startswith("episode/games") for name in values)
    other = replace(EPISODE, prompt=replace(PROMPT, datasource="sums"), counts={"turns": 7.0})
    values = rollout_metrics([GROUP, ScoredGroup((other,), (SCORE,))])
    assert (values["episode/games/turns"], values["episode/sums/turns"]) == (2.0, 7.0)
    assert explain("episode/sums/turns") == "Mean number per episode of 'sums': turns of the policy."


def test_the_page_shows_a_conversation_turn_by_turn(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    said = (
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "2 <b>"},
    )
    run = RunDirectory.create(tmp_path / "run", "rl", [], {})
    group = ScoredGroup((replace(EPISODE, messages=(*EPISODE.messages, *said)),), (SCORE,))
    run.rollouts.write(1, Split.TRAIN, rows([group]))
    page = write_report(run.root).read_text()
    found = re.search(r'id="togi-data">(.*?)</script>', page, re.DOTALL)
    [row] = json.loads(found[1])["rollouts"][0]["rows"]
    assert row["turns"] == [
        ["user", "Q"],
        ["assistant", '{"name": "add", "arguments": {"a": 1}}'],
        ["tool add", "2 <b>"],
    ]
    assert row["counts"] == {"turns": 3, "tool_calls": 2} and row["tokens"] == 4
    assert "2 <b>" not in page  # what a tool says is text, not markup


def test_an_episode_is_stored_whole(tmp_path: Path) -> None:
    """All but the environment's own score, which is part of the stored reward; each rollout with the beginning it had."""
    other = replace(EPISODE, prompt=replace(PROMPT, tokens=(9,)), forks=(), counts={})
    group = ScoredGroup((EPISODE, other), GROUP.scores)
    store = RolloutStore(tmp_path)
    store.write(1, Split.TRAIN, rows([group]))
    assert group_of(store.read_step(1)) == replace(
        group, rollouts=tuple(replace(r, score=None) for r in group.rollouts)
    )
