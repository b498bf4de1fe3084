"""Which held-out rows are the worst, by hand numbers."""

from __future__ import annotations

import numpy as np

from tests.tiny import tiny_tokenizer
from togi.methods.dpo import DPO
from togi.methods.kto import KTO
from togi.methods.method import Method
from togi.methods.sft import SFT
from togi.run.journal import Judged, as_seen, ends, judge
from togi.sample import Sample


def sample(row: str, **values: float) -> Sample:
    return Sample(np.array([65, 66, 67]), np.array([False, True, False]), 1, row, values=values)


def badness(method: Method, samples: list[Sample], values: list[float]) -> dict[str, float]:
    return {row.row: row.badness for row in judge(samples, values, method.badness)}


def test_what_is_bad_depends_on_the_kind_of_row() -> None:
    assert badness(SFT(), [sample("a"), sample("b")], [1.5, 0.5]) == {"a": 1.5, "b": 0.5}  # losses
    pairs = [sample("a", chosen=1), sample("a", chosen=0), sample("b", chosen=1), sample("b", chosen=0)]
    assert badness(DPO(), pairs, [1.0, 3.0, 2.0, -1.0]) == {"a": 2.0, "b": -3.0}  # rejected above chosen
    verdicts = [sample("a", desirable=1), sample("b", desirable=0)]
    assert badness(KTO(), verdicts, [0.5, 0.25]) == {
        "a": -0.5,
        "b": 0.25,
    }  # a low reward of a good one, a high one of a bad


def test_the_ends_of_all_are_found_among_the_ends_of_the_parts() -> None:
    rows = [Judged(str(i), (float(i),), float(i)) for i in range(30)]
    assert [row.badness for row in ends(rows)] == [29, 28, 27, 26, 3, 2, 1, 0]
    parts = [*ends(rows[::2]), *ends(rows[1::2])]
    assert ends(parts) == ends(rows)
    assert ends(rows[:3]) == rows[2::-1]


def test_learned_parts_are_marked() -> None:
    tokenizer = tiny_tokenizer()
    text = as_seen(sample("a"), tokenizer)
    assert text == "{}⟦{}⟧{}".format(*(tokenizer.decode([token]) for token in (65, 66, 67)))
