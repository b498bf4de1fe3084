"""Metrics with their reduction, and the record of one step in ``metrics.jsonl``.

A mean is passed on as (sum, weight) and divided once, at the end, so it does not depend on the number of workers, micro-batches or
ranks. ``names`` has the names, ``sinks`` writes. Percentiles are not here: they cannot be merged, so compute them where all values
are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from togi.errors import DataError


class Reduction(StrEnum):
    MEAN = "mean"
    SUM = "sum"
    MAX = "max"


@dataclass(frozen=True, slots=True)
class Metric:
    """One partial result. ``weight``: the denominator of a mean (tokens, sequences, groups); other reductions ignore it."""

    reduction: Reduction
    total: float
    weight: float = 1.0

    @property
    def value(self) -> float:
        """The number to log. A mean over nothing is NaN: "not measured", never 0."""
        if self.reduction is not Reduction.MEAN:
            return self.total
        return self.total / self.weight if self.weight > 0 else math.nan

    def merged(self, other: Metric) -> Metric:
        """Merge with another worker's part of the same metric. NaN wins over every number, in either order."""
        assert self.reduction is other.reduction, f"one metric, two reductions: {self.reduction} and {other.reduction}"
        if self.reduction in (Reduction.MEAN, Reduction.SUM):
            return Metric(self.reduction, self.total + other.total, self.weight + other.weight)
        if math.isnan(self.total) or math.isnan(other.total):
            return Metric(self.reduction, math.nan)
        return Metric(self.reduction, max(self.total, other.total))


def mean(total: float, weight: float) -> Metric:
    """A mean, given the sum of its terms and their number (or summed weight). ``weight`` 0: a part without terms."""
    assert weight >= 0, f"a weight of {weight}"
    return Metric(Reduction.MEAN, total, weight)


def total(value: float) -> Metric:
    return Metric(Reduction.SUM, value)


def maximum(value: float) -> Metric:
    return Metric(Reduction.MAX, value)


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Merge the parts of all workers. A worker may lack a name; it then adds nothing to it."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].merged(metric) if name in merged else metric
    return merged


def reduced(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Plain numbers for a ``StepRecord``."""
    return {name: metric.value for name, metric in metrics.items()}


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One line of ``metrics.jsonl``. Step 0 is the state before training.

    ``values``: by the names in ``names``; ``seconds``: wall time by phase; ``time``: when it was written, in seconds since 1970.
    """

    step: int
    values: Mapping[str, float]
    seconds: Mapping[str, float] = field(default_factory=dict)
    time: float = 0.0

    def to_json(self) -> str:
        """One line of strict JSON. A value that is not finite becomes null, and is listed under ``not_finite``."""
        assert all(isinstance(value, int | float) for value in self.values.values()), "metric values are plain numbers"
        record = {
            "step": self.step,
            "time": self.time,
            "values": {name: value if math.isfinite(value) else None for name, value in self.values.items()},
            "seconds": dict(self.seconds),
            "not_finite": {name: str(value) for name, value in self.values.items() if not math.isfinite(value)},
        }
        return json.dumps(record, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> StepRecord:
        """The inverse of ``to_json``. Raises ``ValueError`` or ``KeyError`` for an invalid line."""
        record = json.loads(line)
        values = {**record["values"], **{name: float(text) for name, text in record["not_finite"].items()}}
        return cls(record["step"], values, record["seconds"], record["time"])


def all_values(record: StepRecord) -> dict[str, float]:
    """Values and the seconds of phases (``time/<phase>``) by name."""
    return {**record.values, **{f"time/{phase}": seconds for phase, seconds in record.seconds.items()}}


def read_records(path: Path) -> list[StepRecord]:
    """All records of a ``metrics.jsonl``; empty if there is no file.

    A last line without a newline is of a process that died while writing it, and is skipped. Raises ``DataError`` naming any other
    line that cannot be read.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(StepRecord.from_json(line))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number} is not a record of metrics ({error}); remove that line") from error
    return records
