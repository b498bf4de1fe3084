"""The held-out rows in the report: those with the worst and the best values of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from togi.data.chat import Tokenizer, visible
from togi.data.records import Examples
from togi.obs.run_dir import SHOWN_ROWS, HeldOutRow
from togi.sample import Sample

Badness = Callable[[Sequence[tuple[Sample, float]]], float]


@dataclass(frozen=True, slots=True)
class Judged:
    """The values of one row, one per sequence, and its badness: the higher, the worse."""

    row: str
    values: tuple[float, ...]
    badness: float


def judge(samples: Sequence[Sample], values: Sequence[float], badness: Badness) -> list[Judged]:
    """Group samples into rows. ``values``: from ``Objective.judge``, one per sample.

    ``badness``: the method's (``Method.badness``), for the sequences of one row.
    """
    rows: dict[str, list[tuple[Sample, float]]] = {}
    for sample, value in zip(samples, values, strict=True):
        rows.setdefault(sample.group_id, []).append((sample, value))
    return [Judged(row, tuple(value for _, value in pairs), badness(pairs)) for row, pairs in rows.items()]


def ends(judged: Sequence[Judged]) -> list[Judged]:
    """The ``SHOWN_ROWS`` worst and best rows, worst first; all if they are few.

    Merging the ends of parts and taking the ends again gives the ends of the whole.
    """
    ranked = sorted(judged, key=lambda row: (-row.badness, row.row))
    return ranked if len(ranked) <= 2 * SHOWN_ROWS else ranked[:SHOWN_ROWS] + ranked[-SHOWN_ROWS:]


def worst_and_best(number: str, judged: Sequence[Judged], examples: Examples, tokenizer: Tokenizer) -> list[HeldOutRow]:
    """At most ``SHOWN_ROWS`` rows from each end, worst first, no row twice. ``number``: the name of their values in the report."""
    ranked = ends(judged)
    half = (len(ranked) + 1) // 2
    marked = [("worst", row) for row in ranked[:half]] + [("best", row) for row in ranked[half:]]
    # Rows are known by group id; the texts are looked up in the data again.
    places = {examples[index][0].group_id: index for index in range(len(examples))}
    return [
        HeldOutRow(place, number, tuple(as_seen(each, tokenizer) for each in examples[places[row.row]]), row.values)
        for place, row in marked
    ]


def as_seen(sample: Sample, tokenizer: Tokenizer) -> str:
    """The text of a sample with special tokens visible and trained parts between ⟦ and ⟧."""
    # Split where the loss mask changes.
    edges = np.flatnonzero(np.diff(sample.loss_mask.astype(np.int8))) + 1
    parts = []
    for ids, learned in zip(np.split(sample.tokens, edges), np.split(sample.loss_mask, edges), strict=True):
        text = visible(tokenizer, ids.tolist())
        parts.append(f"⟦{text}⟧" if learned[0] else text)
    return "".join(parts)
