"""Which held-out rows the report shows: those with the worst and the best numbers of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from togi.config.offline import DPOConfig, KDConfig, KTOConfig, OfflineConfig, PRMConfig, RMConfig, SFTConfig
from togi.data.chat import Tokenizer, visible
from togi.data.records import Examples
from togi.learn.preference_objective import DESIRABLE
from togi.obs.run_dir import SHOWN_ROWS, HeldOutRow
from togi.sample import Sample

_NUMBERS: dict[type[OfflineConfig], str] = {
    SFTConfig: "nats a token",
    KDConfig: "loss a token",
    RMConfig: "score",
    DPOConfig: "reward",
    KTOConfig: "reward",
    PRMConfig: "nats a step",
}


@dataclass(frozen=True, slots=True)
class Judged:
    """One row's numbers, one a sequence, and how bad they are: the higher, the worse."""

    row: str
    values: tuple[float, ...]
    badness: float


def judge(samples: Sequence[Sample], values: Sequence[float]) -> list[Judged]:
    """The rows that these samples make up; ``values`` are those of ``Objective.judge``, one a sample."""
    rows: dict[str, list[tuple[Sample, float]]] = {}
    for sample, value in zip(samples, values, strict=True):
        rows.setdefault(sample.group_id, []).append((sample, value))
    return [Judged(row, tuple(value for _, value in pairs), _badness(pairs)) for row, pairs in rows.items()]


def _badness(sequences: Sequence[tuple[Sample, float]]) -> float:
    """A pair: rejected above chosen. A row with a verdict: the wrong sign. Else the number is a loss."""
    values = [value for _, value in sequences]
    if len(values) == 2:
        return values[1] - values[0]
    verdicts = sequences[0][0].values
    return -values[0] if DESIRABLE in verdicts and verdicts[DESIRABLE] == 1 else values[0]


def ends(judged: Sequence[Judged]) -> list[Judged]:
    """The ``SHOWN_ROWS`` worst and best of them, worst first; all if they are few. Those of all are among those of each part."""
    ranked = sorted(judged, key=lambda row: (-row.badness, row.row))
    return ranked if len(ranked) <= 2 * SHOWN_ROWS else ranked[:SHOWN_ROWS] + ranked[-SHOWN_ROWS:]


def worst_and_best(
    config: OfflineConfig, judged: Sequence[Judged], examples: Examples, tokenizer: Tokenizer
) -> list[HeldOutRow]:
    """At most ``SHOWN_ROWS`` rows of each end, worst first, no row twice."""
    ranked = ends(judged)
    half = (len(ranked) + 1) // 2
    marked = [("worst", row) for row in ranked[:half]] + [("best", row) for row in ranked[half:]]
    places = {examples[index][0].group_id: index for index in range(len(examples))}
    number = _NUMBERS[type(config)]
    return [
        HeldOutRow(place, number, tuple(as_seen(each, tokenizer) for each in examples[places[row.row]]), row.values)
        for place, row in marked
    ]


def as_seen(sample: Sample, tokenizer: Tokenizer) -> str:
    """The text of a sample: special tokens visible, learned parts between ⟦ and ⟧."""
    edges = np.flatnonzero(np.diff(sample.loss_mask.astype(np.int8))) + 1
    parts = []
    for ids, learned in zip(np.split(sample.tokens, edges), np.split(sample.loss_mask, edges), strict=True):
        text = visible(tokenizer, ids.tolist())
        parts.append(f"⟦{text}⟧" if learned[0] else text)
    return "".join(parts)
