"""The data of a case on disk: one file for Togi, one for the peers, with the same rows in each optimizer step.

Togi deals rows in a seeded order of its own; its file is arranged so that this order gives step after step. A peer's file is
in the order of the steps, the rows of each step sorted by length, and the peer reads it from top to bottom.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from comparison.cases import Case, Kind
from comparison.rows import Row, answer, make_rows, sorted_steps, text, words_of
from comparison.summary import Work
from togi.run.plan import EpochPlan

SEED = 42


@dataclass(frozen=True, slots=True)
class Material:
    """``togi`` and ``peer``: JSON lines. ``records``: those of the peer's file. ``work``: of each optimizer step."""

    togi: Path
    peer: Path
    records: tuple[dict[str, Any], ...]
    work: tuple[Work, ...]


def make_material(case: Case, model: Path, folder: Path) -> Material:
    """Write both files. Raises AssertionError if the tokenizer counts other lengths than were asked for."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    words, rng = words_of(tokenizer.get_vocab()), random.Random(SEED)
    # each step has the whole spread of lengths, so that those which count are like the others
    drawn = (make_rows(case.prompt, case.answer, case.answers, case.rows, SEED + step) for step in range(case.steps))
    rows = sorted_steps([row for step in drawn for row in step], case.rows)
    records = [record(case.kind, row, words, rng) for row in rows]
    for row, made in zip(rows, records, strict=True):
        check(row, made, tokenizer)
    order = EpochPlan(len(rows), case.rows, 1, SEED).rows_of
    places = [place for step in range(case.steps) for place in order(step)]
    arranged = [made for _, made in sorted(zip(places, records, strict=True), key=lambda pair: pair[0])]
    steps = [rows[start : start + case.rows] for start in range(0, len(rows), case.rows)]
    work = tuple(Work(sum(row.tokens for row in step), sum(row.squares for row in step)) for step in steps)
    folder.mkdir(parents=True, exist_ok=True)
    togi, peer = folder / "togi.jsonl", folder / "peer.jsonl"
    for path, lines in ((togi, arranged), (peer, records)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Material(togi, peer, tuple(records), work)


def record(kind: Kind, row: Row, words: Sequence[str], rng: random.Random) -> dict[str, Any]:
    """One line of a data file."""
    prompt = text(words, row.prompt, rng)
    answers = [answer(words, length, rng) for length in row.answers]
    if kind is Kind.SFT:
        return {"prompt": prompt, "completion": answers[0]}
    if kind in (Kind.DPO, Kind.RM):
        return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    return {"prompt": prompt, "answers": answers, "rewards": [rng.uniform(-1, 1) for _ in answers]}


def check(row: Row, made: dict[str, Any], tokenizer: Any) -> None:
    answers = made.get("answers") or [made[key] for key in ("completion", "chosen", "rejected") if key in made]
    lengths = tuple(len(tokenizer(made["prompt"] + each)["input_ids"]) + 1 - row.prompt for each in answers)
    assert len(tokenizer(made["prompt"])["input_ids"]) == row.prompt, "a prompt has another length"
    assert lengths == row.answers, "an answer has another length"
