"""Which rows make up which step, and how a launcher's environment is read."""

from __future__ import annotations

import numpy as np
import pytest

from togi.config.offline import SFTConfig
from togi.config.parse import parse
from togi.errors import ConfigError
from togi.parallel.process import World
from togi.recipes.offline_data import UNLIMITED, record_spec
from togi.recipes.offline_plan import EpochPlan


def test_every_row_comes_once_an_epoch_and_none_is_dropped() -> None:
    plan = EpochPlan(rows=11, batch=4, epochs=2, seed=3)
    assert (plan.steps_per_epoch, plan.steps, plan.smallest_batch) == (3, 6, 3)
    epochs = [[plan.rows_of(step) for step in range(first, first + 3)] for first in (0, 3)]
    for epoch in epochs:
        assert [len(rows) for rows in epoch] == [4, 4, 3]
        assert sorted(row for rows in epoch for row in rows) == list(range(11))
    assert epochs[0] != epochs[1]


def test_the_order_is_that_of_the_seed_and_of_nothing_else() -> None:
    plan, again = EpochPlan(11, 4, 2, 3), EpochPlan(11, 4, 5, 3)
    assert [plan.rows_of(step) for step in range(6)] == [again.rows_of(step) for step in range(6)]
    assert plan.rows_of(0) != EpochPlan(11, 4, 2, 4).rows_of(0)


def test_the_order_of_an_epoch_is_a_seeded_permutation() -> None:
    """A resumed run counts on it."""
    plan = EpochPlan(rows=11, batch=4, epochs=2, seed=3)
    for epoch in (1, 0):
        order = np.random.default_rng([3, epoch]).permutation(11).tolist()
        steps = [plan.rows_of(3 * epoch + step) for step in range(3)]
        assert steps == [order[:4], order[4:8], order[8:]]
        assert all(type(row) is int for rows in steps for row in rows)


def test_held_out_sets_are_read_whole_in_their_own_split() -> None:
    words = "--pretrain m --dataset a,b@c --dataset_probs 0.3,0.7 --train_split dev --max_samples 9 --eval_dataset e"
    words += " --eval_split validation --max_bad_rows 0.5 --dataset_num_proc 3 --output_key a --max_len 77"
    config = parse(SFTConfig, words.split(), "sft").config
    train = record_spec(config, config.dataset, config.split, training=True)
    assert (train.dataset, train.dataset_probs, train.split, train.max_samples) == ("a,b@c", "0.3,0.7", "dev", 9)
    assert (train.max_bad_rows, train.dataset_num_proc, train.output_key, train.max_len) == (0.5, 3, "a", 77)
    held_out = record_spec(config, "e", config.eval_split, training=False)
    assert (held_out.dataset, held_out.dataset_probs, held_out.split) == ("e", None, "validation")
    assert held_out.max_samples == UNLIMITED
    assert held_out.of_a_row() == train.of_a_row()


def test_a_set_smaller_than_a_batch_is_one_step() -> None:
    plan = EpochPlan(rows=3, batch=128, epochs=2, seed=0)
    assert (plan.steps, plan.smallest_batch, sorted(plan.rows_of(1))) == (2, 3, [0, 1, 2])
    assert plan.describe() == "3 rows in batches of 3: 1 optimizer steps an epoch, 2 epochs, 2 steps in all"


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = World.from_environment()
    assert (world.rank, world.size) == (0, 1)


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2 but RANK is ''"):
        World.from_environment()
