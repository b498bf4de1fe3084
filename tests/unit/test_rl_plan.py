"""How many rollouts and updates a run has, by hand, and which samples each update gets."""

from __future__ import annotations

import numpy as np

from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.pump.experience import mini_batches
from togi.run.plan import StepPlan
from togi.sample import Sample

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


def samples(groups: int) -> list[Sample]:
    tokens, mask = np.zeros(2, dtype=np.int64), np.array([False, True])
    return [Sample(tokens, mask, 1, str(number)) for number in range(groups) for _ in range(4)]


def test_every_epoch_over_a_rollout_has_each_sample_once_in_a_new_order() -> None:
    """20 samples in groups of 4, 6 an update, twice: 6, 6, 6, 2 and again; groups stay together."""
    config = parse(RLConfig, f"{SIZES} --max_epochs 2".split(), "rl").config
    rollout = samples(5)
    batches = mini_batches(rollout, config, step=0)
    assert [len(batch) for batch in batches] == [6, 6, 6, 2, 6, 6, 6, 2]
    flat = [[sample for batch in batches[start : start + 4] for sample in batch] for start in (0, 4)]
    for epoch in flat:
        assert {id(sample) for sample in epoch} == {id(sample) for sample in rollout}
        assert all(len({sample.group_id for sample in epoch[at : at + 4]}) == 1 for at in range(0, 20, 4))
    orders = [[sample.group_id for sample in epoch[::4]] for epoch in flat]
    assert orders[0] != orders[1]
    again = mini_batches(rollout, config, step=0)
    assert [[id(sample) for sample in batch] for batch in again] == [[id(s) for s in batch] for batch in batches]


def test_one_update_keeps_the_order_of_the_samples() -> None:
    config = parse(RLConfig, ["--train_batch_size", "16"], "rl").config
    rollout = samples(4)
    assert mini_batches(rollout, config, step=3) == [rollout]
