"""What a step's rollouts say in numbers: means by hand, and abstentions that are neither zeros nor crashes."""

from __future__ import annotations

import math

import pytest

from togi.config.choices import OnRewardError
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.data.packing import PackStats
from togi.learn.learner import StepOutcome, UpdateReport
from togi.obs import names
from togi.plan.placement import Role
from togi.pump.experience import ScoredGroup, eval_metrics, rollout_metrics, trainable
from togi.run.loading import prompt_spec
from togi.sample import FinishReason, Outcome, Prompt, Rollout, Score
from togi.workers.session import update_metrics


def group(name: str, rewards: list[float | None], source: str = "a") -> ScoredGroup:
    prompt = Prompt(name, (1, 2, 3), "text", datasource=source)
    reason = FinishReason.LENGTH if name == "long" else FinishReason.STOP
    rollout = Rollout(prompt, name, (4, 5), (True, True), (-1.0, -2.0), "answer", reason, (0, 0))
    scores = [Score(Outcome.ABSTAIN) if r is None else Score(Outcome.SCORE, r, {"part": r / 2}) for r in rewards]
    return ScoredGroup((rollout,) * len(rewards), tuple(scores))


def test_rollout_metrics_by_hand() -> None:
    values = rollout_metrics([group("one", [1.0, 0.0]), group("long", [1.0, None])])
    assert values["reward/mean"] == pytest.approx(2 / 3)
    assert values["reward/part"] == pytest.approx(1 / 3)
    assert values["reward/abstained_share"] == 0.25
    assert values["length/truncated_share"] == 0.5
    assert values["groups/zero_variance_share"] == 0.0  # the second group has one score, so no spread
    assert values["reward/group_std"] == 0.5


def test_abstentions_are_left_out_of_training() -> None:
    places = trainable([group("one", [None, 0.5]), group("two", [None])], OnRewardError.DROP_GROUP)
    assert places == [(0, 1)]


def test_evaluation_by_hand() -> None:
    values = eval_metrics([group("one", [1.0, 0.0]), group("two", [0.0, 0.0])], samples=2)
    assert values["eval/reward"] == 0.25
    assert values["eval/reward_stderr"] == pytest.approx(0.25)  # means 0.5 and 0: deviation 0.354 / sqrt(2)
    assert values["eval/a/pass1"] == 0.25
    assert values["eval/a/pass2"] == 0.5


def test_pass_at_k_of_each_source_is_unbiased() -> None:
    """By hand: 1 - C(n - c, k) / C(n, k) of each prompt; one abstention leaves three responses."""
    sums = [group("one", [1.0, 0.0, 0.0, 0.0], "sums"), group("two", [1.0, 1.0, 0.0, None], "sums")]
    values = eval_metrics([*sums, group("three", [0.0] * 4, "words")], samples=4)
    assert values["eval/sums/pass1"] == pytest.approx((1 / 4 + 2 / 3) / 2)
    assert values["eval/sums/pass2"] == pytest.approx((1 / 2 + 1) / 2)  # 1 - C(3, 2) / C(4, 2) and 1 - 0
    assert values["eval/sums/pass4"] == 1.0
    assert [values[f"eval/words/pass{k}"] for k in (1, 2, 4)] == [0, 0, 0]


def test_a_source_without_any_score_is_not_measured() -> None:
    values = eval_metrics([group("one", [1.0]), group("two", [None], source="b")], samples=1)
    assert values["eval/reward"] == 1.0
    assert math.isnan(values["eval/b/pass1"])


def test_the_cap_and_the_probabilities_belong_to_the_training_set() -> None:
    flags = ["--prompt_data", "x", "--eval_dataset", "x", "--max_samples", "5", "--prompt_data_probs", "1"]
    config = parse(RLConfig, flags, "rl").config
    training, held_out = (prompt_spec(config, "x", "train", training=which) for which in (True, False))
    assert (training.max_samples, training.prompt_data_probs) == (5, "1")
    assert held_out.max_samples > 10**9
    assert held_out.prompt_data_probs is None


def test_metrics_of_several_steps_are_means_and_compile_time_a_sum() -> None:
    def report(loss: float, compiling: float) -> UpdateReport:
        values = {"policy/loss": loss, names.COMPILE_SECONDS: compiling}
        return UpdateReport(StepOutcome.UPDATED, 1, 1e-5, loss, 8.0, 0.0, 1.0, PackStats(4, 4), values, ())

    found = update_metrics(Role.ACTOR, [report(1.0, 20.0), report(3.0, 1.5)])
    assert (found["policy/loss"], found[names.POLICY_GRAD_NORM], found[names.COMPILE_SECONDS]) == (2.0, 2.0, 21.5)
