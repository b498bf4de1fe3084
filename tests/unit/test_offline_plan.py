"""Which rows make up which step, and how a launcher's environment is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import STOP, tiny_tokenizer
from togi.config.parse import parse
from togi.data.records import RecordSpec, load_steps, load_unpaired
from togi.errors import ConfigError
from togi.methods.kto import KTO
from togi.methods.prm import PRM
from togi.methods.sft import SFT
from togi.parallel.process import World
from togi.run.loading import UNLIMITED
from togi.run.offline_setup import Data, check_plan, record_spec
from togi.run.plan import EpochPlan


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
    config = parse(SFT, words.split(), "sft").config
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


def kto_data(folder: Path, eval_labels: Sequence[int]) -> Data:
    """Five rows to train on, and held-out ones with these labels."""
    sets = []
    for name, labels in (("train", [0, 1, 0, 1, 0]), ("eval", eval_labels)):
        rows = [{"q": f"number {i}", "a": "ok", "label": label} for i, label in enumerate(labels)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        spec = RecordSpec(str(folder / f"{name}.jsonl"), input_key="q", output_key="a")
        sets.append(load_unpaired(spec, tiny_tokenizer()))
    return Data(tiny_tokenizer(), (STOP,), sets[0], (sets[1],))


@pytest.mark.parametrize(
    ("metric", "labels", "missing"),
    [
        ("eval/reward/margin", [1, 1, 1], "undesirable"),
        ("eval/reward/margin", [0, 0], "desirable"),
        ("reward/rejected", [1, 1], "undesirable"),
        ("eval/reward/chosen", [0, 0], "desirable"),
        ("eval/reward/chosen", [1, 1], ""),
        ("eval/reward/margin", [0, 1], ""),
        ("eval/loss", [1, 1], ""),
        ("none", [1, 1], ""),
    ],
)
def test_the_best_model_is_chosen_by_what_the_rows_can_measure(
    tmp_path: Path, metric: str, labels: list[int], missing: str
) -> None:
    """Else every evaluation would give NaN, and no best model would ever be kept."""
    data, plan = kto_data(tmp_path, labels), EpochPlan(5, 5, 1, 0)
    config = KTO(best_metric_key=metric, best_metric_mode="max" if metric != "none" else "auto")
    if not missing:
        check_plan(config, plan, data)
        return
    with pytest.raises(ConfigError) as caught:
        check_plan(config, plan, data)
    assert str(caught.value) == (
        f"--best_metric_key {metric} needs {missing} rows in --eval_dataset, which has none: choose another metric, such as "
        "eval/loss, or add rows."
    )


def test_labels_of_two_kinds_are_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    def steps(name: str, row: Mapping[str, object]):
        (tmp_path / name).write_text(json.dumps(row))
        spec = RecordSpec(str(tmp_path / name), placeholder_token="#", reward_tokens=("+", "-"))
        return load_steps(spec, tiny_tokenizer())

    hard, soft = steps("a.jsonl", {"input": "a#", "label": ["+"]}), steps("b.jsonl", {"input": "a#", "label": [0.5]})
    check_plan(PRM(), EpochPlan(1, 1, 1, 0), Data(tiny_tokenizer(), (STOP,), hard, (hard,)))
    with pytest.raises(ConfigError) as caught:
        check_plan(PRM(), EpochPlan(1, 1, 1, 0), Data(tiny_tokenizer(), (STOP,), hard, (soft,)))
    assert str(caught.value) == (
        "--dataset and --eval_dataset have labels of two kinds, tokens in one and probabilities in the other: use one kind."
    )
