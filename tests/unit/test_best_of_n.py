"""Selection from scored rows and the reward's text, with numbers made by hand; and the file that survives a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from togi.algo.best_of_n import best, best_and_worst, standardized
from togi.config.choices import PostProcessor
from togi.config.infer import CSFT_PROMPT, REWARD_TEMPLATE
from togi.data.precheck import asked_reward, with_reward
from togi.data.row_log import RowLog
from togi.errors import CheckpointError, DataError
from togi.run.iterate_steps import select

SCORED = [
    {"input": "p", "output": "p0", "reward": 1.0, "id": "a"},
    {"input": "q", "output": "q0", "reward": -2.0, "id": "b"},
    {"input": "p", "output": "p1", "reward": 3.0, "id": "a"},
    {"input": "q", "output": "q1", "reward": -2.0, "id": "b"},
    {"input": "p", "output": "p2", "reward": 3.0, "id": "a"},
    {"input": "p", "output": "p3", "reward": 1.0, "id": "a"},
    {"input": "r", "output": "r0", "reward": None, "id": "c"},
]


def test_best_and_worst_are_the_first_of_their_equals() -> None:
    assert best([1.0, 3.0, 3.0]) == 1
    assert best_and_worst([1.0, 3.0, 3.0, 1.0]) == (1, 0)
    assert best_and_worst([2.0, 2.0]) is None
    assert best_and_worst([2.0]) is None


def test_standardized() -> None:
    assert standardized([1.0, 2.0, 3.0]) == [-1.0, 0.0, 1.0]  # mean 2, unbiased std 1
    for constant in ([0.1, 0.1, 0.1], [5.0], []):
        assert standardized(constant) == [0.0] * len(constant)


def test_rejection_sampling_keeps_the_first_best_of_each_input() -> None:
    chosen = select(SCORED, PostProcessor.RS, reward_template=REWARD_TEMPLATE)
    assert [row["output"] for row in chosen.rows] == ["p1", "q0"]
    assert (chosen.inputs, chosen.unscored) == (2, 1)
    assert chosen.describe() == "2 rows from 2 inputs; 1 outputs without a reward are left out"


def test_ties_are_no_pairs_and_are_counted() -> None:
    found = select(SCORED, PostProcessor.ITER_DPO, reward_template=REWARD_TEMPLATE)
    pair = {"prompt": "p", "chosen": "p1", "chosen_reward": 3.0, "rejected": "p0", "rejected_reward": 1.0, "id": "a"}
    assert found.rows == (pair,)
    assert (found.inputs, found.ties, found.unscored) == (2, 1, 1)


def test_conditional_sft_tells_each_reward() -> None:
    told = select(SCORED, PostProcessor.CSFT, reward_template="{reward}|{input}|")
    assert [row["input"] for row in told.rows] == [
        "1.00|p|",
        "-2.00|q|",
        "3.00|p|",
        "-2.00|q|",
        "3.00|p|",
        "1.00|p|",
    ]
    rows = [{"input": "p", "output": str(i), "reward": float(i)} for i in (1, 2, 3)]
    scaled = select(rows, PostProcessor.CSFT, reward_template=REWARD_TEMPLATE, standardize=True)
    assert [row["reward"] for row in scaled.rows] == [-1.0, 0.0, 1.0]
    assert scaled.rows[0]["input"] == "p <rm_score>: -1.00 "
    equal = select(
        [{**row, "reward": 0.5} for row in rows],
        PostProcessor.CSFT,
        reward_template="{input}{reward}",
        standardize=True,
    )
    assert {row["input"] for row in equal.rows} == {"p0.00"}
    assert not any(math.isnan(row["reward"]) for row in equal.rows)


def test_inputs_may_be_messages() -> None:
    rows = [{"input": [{"role": "user", "content": "p"}], "output": str(i), "reward": float(i)} for i in range(2)]
    assert [row["output"] for row in select(rows, PostProcessor.RS, reward_template="").rows] == ["1"]


@pytest.mark.parametrize("words", [CSFT_PROMPT, "<rm_score>: 5", "  <rm_score>: 5.0  ", "5", "5.00"])
def test_what_is_asked_for_is_what_was_trained_on(words: str) -> None:
    """Training knows a reward and generation a text; both end in one function, so not a space can differ."""
    trained = with_reward(REWARD_TEMPLATE, "prompt", 5.001)
    assert with_reward(REWARD_TEMPLATE, "prompt", asked_reward(words, REWARD_TEMPLATE)) == trained
    assert trained == "prompt <rm_score>: 5.00 "


def test_reward_text_keeps_what_looks_like_a_hole() -> None:
    assert with_reward("{reward} {input}", "say {reward} and {input}", -0.001) == "0.00 say {reward} and {input}"
    assert asked_reward("good: -1.5!", "{input} good: {reward}!\n") == -1.5


@pytest.mark.parametrize("words", ["score: 5.00", "<rm_score>: high", "<rm_score>: nan", ""])
def test_words_that_were_never_trained_on_are_refused(words: str) -> None:
    with pytest.raises(DataError, match="does not fit --reward_template"):
        asked_reward(words, REWARD_TEMPLATE)


def test_a_row_log_goes_on_and_ends_in_order(tmp_path: Path) -> None:
    path, identity = tmp_path / "rows.jsonl", {"--seed": "1"}
    with RowLog(path, identity) as log:
        log.add(2, [{"n": 2}])
        log.add(0, [{"n": 0}, {"n": 0.5}])
    partial = tmp_path / "rows.jsonl.partial"
    whole = partial.read_bytes()
    partial.write_bytes(whole + b'{"unit": 1, "rows": [{"n"')
    with RowLog(path, identity) as log:
        assert log.done == {2: [{"n": 2}], 0: [{"n": 0}, {"n": 0.5}]}
        assert partial.read_bytes() == whole
        assert not path.exists()
        log.add(1, [{"n": "\ud800 é"}])
        log.finish(log.in_order())
    assert [json.loads(line)["n"] for line in path.read_text(errors="surrogatepass").splitlines()] == [
        0,
        0.5,
        "\ud800 é",
        2,
    ]
    assert not partial.exists()


def test_a_row_log_of_other_work_is_refused(tmp_path: Path) -> None:
    with RowLog(tmp_path / "rows.jsonl", {"--seed": "1"}) as log:
        log.add(0, [])
    with pytest.raises(CheckpointError, match=r"another command \(--seed was 1, is 2\): finish that one, or remove"):
        RowLog(tmp_path / "rows.jsonl", {"--seed": "2"}).__enter__()


def test_a_row_log_has_one_writer(tmp_path: Path) -> None:
    path, identity = tmp_path / "rows.jsonl", {"--seed": "1"}
    with RowLog(path, identity) as log:
        log.add(0, [{"n": 0}])
        with pytest.raises(CheckpointError) as error:
            RowLog(path, identity).__enter__()
        assert str(error.value) == (
            f"Another process is writing {path}.partial: wait until it has ended, or choose another --output_path."
        )
        log.add(1, [{"n": 1}])
    with RowLog(path, identity) as log:
        assert sorted(log.done) == [0, 1]


def test_a_log_killed_in_its_first_line_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.partial").write_text('{"--se')
    with RowLog(tmp_path / "rows.jsonl", {"--seed": "1"}) as log:
        assert log.done == {}
        log.add(0, [{"n": 0}])
    with RowLog(tmp_path / "rows.jsonl", {"--seed": "1"}) as log:
        assert log.done == {0: [{"n": 0}]}
