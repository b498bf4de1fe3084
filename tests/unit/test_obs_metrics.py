"""Metrics reduce exactly, records stay valid JSON, and every standard name is explained."""

import json
import math

import pytest

from togi.errors import DataError, RewardError
from togi.obs import names
from togi.obs.metrics import StepRecord, maximum, mean, merge, read_records, reduced, total
from togi.obs.report import chart_table


def test_a_mean_is_divided_once_by_the_total_weight():
    # Worker 1: three tokens that sum to 6 (mean 2). Worker 2: one token of 10. Together 16/4 = 4, not (2 + 10)/2 = 6.
    merged = merge([{"loss": mean(6.0, 3)}, {"loss": mean(10.0, 1)}])
    assert reduced(merged) == {"loss": 4.0}


def test_a_worker_without_terms_changes_nothing_and_nobody_measured_is_nan():
    merged = merge([{"loss": mean(0.0, 0)}, {"loss": mean(3.0, 2)}, {}])
    assert merged["loss"].value == 1.5
    assert math.isnan(mean(0.0, 0).value)


def test_sum_and_max():
    parts = [
        {"t": total(3), "hi": maximum(-5)},
        {"t": total(4), "hi": maximum(-7)},
    ]
    assert reduced(merge(parts)) == {"t": 7, "hi": -5}


@pytest.mark.parametrize("kind", [mean, maximum, total])
@pytest.mark.parametrize("nan_first", [True, False])
def test_nan_is_never_lost_in_a_merge(kind, nan_first):
    args = (1,) if kind is mean else ()
    bad, good = kind(math.nan, *args), kind(1.0, *args)
    assert math.isnan((bad.merged(good) if nan_first else good.merged(bad)).value)


def test_two_reductions_under_one_name_are_our_mistake():
    with pytest.raises(AssertionError, match="two reductions"):
        merge([{"x": total(1)}, {"x": maximum(1)}])


def test_a_record_is_strict_json_and_comes_back_with_its_nan_and_infinity():
    record = StepRecord(3, {"a": 0.1, "b": math.nan, "c": math.inf, "d": -math.inf}, {"train": 2.5}, 7.0)
    line = record.to_json()

    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    plain = json.loads(line, parse_constant=refuse)
    assert plain["values"] == {"a": 0.1, "b": None, "c": None, "d": None}
    assert plain["not_finite"] == {"b": "nan", "c": "inf", "d": "-inf"}
    back = StepRecord.from_json(line)
    assert math.isnan(back.values["b"])
    assert (back.values["a"], back.values["c"], back.values["d"]) == (0.1, math.inf, -math.inf)
    assert (back.step, back.seconds, back.time) == (3, {"train": 2.5}, 7.0)


def test_reading_ignores_an_unfinished_last_line_and_names_a_broken_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_records(path) == []
    path.write_text(StepRecord(1, {"a": 1.0}).to_json() + "\n" + '{"step": 2, "val')
    assert [record.step for record in read_records(path)] == [1]
    path.write_text("{}\n")
    with pytest.raises(DataError, match="line 1 is not a record"):
        read_records(path)


def test_every_standard_name_and_every_name_of_the_report_is_explained_in_one_sentence():
    standard = {value for key, value in vars(names).items() if key.isupper() and isinstance(value, str)}
    table = chart_table()
    drawn = {name for chart in table["charts"] for name in chart["metrics"] if "*" not in name} | set(
        table["headlines"]
    )
    assert standard == set(names.explanations())
    reserved = {name.removeprefix("reward/") for name in standard if name.startswith("reward/")}
    assert reserved == names.RESERVED_COMPONENTS
    assert drawn <= standard
    made = [
        names.reward_component("format"),
        "time/train",
        names.process_memory("actor 0"),
        *(names.eval_of("gsm8k", key) for key in ("pass1", "pass4", "pass1_stderr", "length")),
    ]
    for name in [*standard, *made]:
        sentence = names.explain(name)
        assert "not one of Togi's standard metrics" not in sentence
        assert sentence.endswith(".") and ". " not in sentence
    assert "among 4 responses" in names.explain(names.eval_of("gsm8k", "pass4"))
    assert "not one of Togi's standard metrics" in names.explain("my/own")


def test_a_reward_component_cannot_hide_a_standard_metric():
    with pytest.raises(RewardError, match="'mean'"):
        names.reward_component("mean")
