"""How many rollouts and updates a run has, by hand."""

from __future__ import annotations

from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.recipes.plan import StepPlan

# 10 prompts: rollouts of 4, 4 and 2 prompts, which are 16, 16 and 8 samples
SIZES = "--rollout_batch_size 4 --n_samples_per_prompt 4 --train_batch_size 6"


def plan(flags: str = "") -> tuple[int, int, int]:
    made = StepPlan.of(parse(RLConfig, f"{SIZES} {flags}".split(), "rl").config, 10)
    return made.rollouts, made.updates, made.actor_updates


def test_rollouts_and_updates_by_hand() -> None:
    assert plan() == (3, 3 + 3 + 2, 8)
    assert plan("--max_epochs 2") == (3, 16, 16)
    assert plan("--num_episodes 2") == (6, 16, 16)
    assert plan("--num_episodes 2 --max_steps 4") == (4, 3 + 3 + 2 + 3, 11)


def test_a_frozen_actor_plans_its_own_updates() -> None:
    assert plan("--freezing_actor_steps 1 --num_episodes 2") == (6, 16, 13)
    assert plan("--freezing_actor_steps 4 --num_episodes 2 --max_epochs 2") == (6, 32, 10)
    assert plan("--freezing_actor_steps 0") == (3, 8, 8)
    assert plan("--freezing_actor_steps 9") == (3, 8, 0)


def test_the_line_says_what_is_frozen_and_what_is_a_bound() -> None:
    config = parse(RLConfig, f"{SIZES} --freezing_actor_steps 1 --dynamic_filtering".split(), "rl").config
    text = StepPlan.of(config, 10).describe(config)
    assert text.endswith("at most 3 rollouts, at most 8 updates in all, at most 5 of the actor")
