"""Held-out rows of an evaluation with their numbers on disk, for people: ``held_out/step_00000012.json``.

The worst and the best of each evaluation; all numbers over all rows are in ``metrics.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from togi.obs.way_out import writing

FOLDER = "held_out"
SHOWN = 4


@dataclass(frozen=True, slots=True)
class HeldOutRow:
    """One row as the model saw it. ``texts`` and ``values`` of its one sequence, or of the chosen and the rejected one.

    ``place``: "worst" or "best". ``number``: what the values are, such as "nats a token".
    """

    place: str
    number: str
    texts: tuple[str, ...]
    values: tuple[float, ...]


def write_rows(root: Path, step: int, rows: Sequence[HeldOutRow]) -> None:
    """Keep the rows of the evaluation after ``step`` in the run folder ``root``."""
    folder = root / FOLDER
    text = json.dumps([asdict(row) for row in rows], ensure_ascii=False)
    path = folder / f"step_{step:08d}.json"
    with writing(path):
        folder.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def read_rows(root: Path) -> dict[int, list[HeldOutRow]]:
    """The rows by step, ascending; empty where there are none."""
    rows = {}
    for path in sorted((root / FOLDER).glob("step_*.json")):
        step = int(path.stem.removeprefix("step_"))
        rows[step] = [
            HeldOutRow(row["place"], row["number"], tuple(row["texts"]), tuple(row["values"]))
            for row in json.loads(path.read_text(encoding="utf-8"))
        ]
    return rows
