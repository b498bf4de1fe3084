"""Rows with numbers from a file: each number at its token, NaN elsewhere, whichever row is asked for first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.coded_rows import examples_of
from togi.data.records import Examples
from togi.data.turns import Coded


def coded(length: int, runs: tuple[tuple[int, int], ...]) -> Coded:
    return Coded(np.arange(length, dtype=np.int32), runs, runs[0][0], merged=False, values={"chosen": 1.0})


def examples(folder: Path) -> Examples:
    """Two pairs; one sequence has two learned parts, one starts at the first token, which has no prediction."""
    rows = [
        (coded(4, ((2, 4),)), coded(6, ((1, 2), (4, 6)))),
        (coded(3, ((0, 3),)), coded(2, ((1, 2),))),
    ]
    return examples_of(rows, folder)


def test_each_number_is_at_its_token(tmp_path: Path) -> None:
    plain = examples(tmp_path)
    assert plain.learned().tolist() == [2, 3, 2, 1]
    assert plain.prompt_lengths().tolist() == [2, 1, 0, 1]
    scored = plain.scored("ref_logprobs", np.arange(8, dtype=np.float32))
    nan = np.nan
    expected = [[nan, nan, 0, 1], [nan, 2, nan, nan, 3, 4], [nan, 5, 6], [nan, 7]]
    for row in (1, 0):
        for place, sample in enumerate(scored[row]):
            np.testing.assert_array_equal(sample.streams["ref_logprobs"], expected[2 * row + place])
            assert sample.values == {"chosen": 1.0}
    assert scored.fingerprint() == plain.fingerprint()
    assert len(scored[0:2]) == len(scored) == 2


def test_a_file_of_other_rows_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="one number for each token"):
        examples(tmp_path).scored("ref_logprobs", np.zeros(7, dtype=np.float32))
