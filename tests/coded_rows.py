"""Rows that were tokenised by hand, as the data reader keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from togi.data.encode import Outcome
from togi.data.records import Examples
from togi.data.report import DataReport, Lengths
from togi.data.shards import Shard, Table, write_shard
from togi.data.turns import Coded


def examples_of(rows: Sequence[tuple[Coded, ...]], folder: Path) -> Examples:
    """One set of these rows, each used once; its file is written into ``folder``."""
    path = folder / "rows.safetensors"
    write_shard(path, [Outcome(row, tuple(len(each.tokens) for each in row), None) for row in rows])
    places = np.array([(0, i, 0) for i in range(len(rows))])
    report = DataReport("rows", (), Lengths.of([len(each.tokens) for row in rows for each in row]), (), ())
    return Examples(Table([Shard(path)]), places, report)
