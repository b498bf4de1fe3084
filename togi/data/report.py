"""The data report of a run directory: what happened to every row. Rows are counted where they are dropped."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from togi.data.chat import Tokenizer, adds_bos
from togi.data.faults import Note
from togi.data.source import Mixture
from togi.errors import DataError
from togi.obs.way_out import write_atomically, writing

LARGE_LOSS = 0.5
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One data set: its ``rows``, those ``picked`` for the mixture (``repeats`` of them again), ``kept``, ``dropped``.

    ``dropped``: counts by reason; picked = kept + sum of dropped.
    """

    name: str
    rows: int
    picked: int
    repeats: int
    kept: int
    dropped: Mapping[str, int]

    def __post_init__(self) -> None:
        assert self.picked == self.kept + sum(self.dropped.values()), f"{self.name}: rows are unaccounted for"


@dataclass(frozen=True, slots=True)
class Lengths:
    """Quantiles of the lengths in tokens, before any row is dropped for its length."""

    min: int
    median: int
    p90: int
    p99: int
    max: int

    @classmethod
    def of(cls, lengths: Sequence[int] | NDArray[np.int32]) -> Lengths:
        """Quantiles that are occurring lengths (the nearest higher one); all 0 without lengths."""
        if len(lengths) == 0:
            return cls(0, 0, 0, 0, 0)
        return cls(*(int(q) for q in np.quantile(lengths, (0, 0.5, 0.9, 0.99, 1), method="higher")))


@dataclass(frozen=True, slots=True)
class Fault:
    """A faulty row: its place ("Line 3 of a.jsonl"), the kind of its fault, and the whole sentence."""

    place: str
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Faults:
    """The faulty rows, which are skipped: ``rows`` of ``of`` distinct ones, by kind, and the ``first`` in words."""

    rows: int = 0
    of: int = 0
    by_kind: Mapping[str, int] = field(default_factory=dict)
    first: tuple[Fault, ...] = ()

    def kinds(self) -> str:
        """Kinds and counts in words."""
        return _in_words(self.by_kind)

    def warnings(self) -> Iterator[str]:
        """The warning that they are skipped, if there are any."""
        if self.rows > 0:
            yield f"{self.rows} of {self.of} rows are faulty and were left out ({self.kinds()}); the first: {self.first[0].reason}"


@dataclass(frozen=True, slots=True)
class DataReport:
    """What was read, kept and dropped, with examples as the model sees them (special tokens visible)."""

    title: str
    sources: tuple[SourceReport, ...]
    lengths: Lengths
    examples: tuple[str, ...]
    warnings: tuple[str, ...]
    faults: Faults = field(default_factory=Faults)

    @property
    def picked(self) -> int:
        return sum(source.picked for source in self.sources)

    @property
    def kept(self) -> int:
        return sum(source.kept for source in self.sources)

    def check(self, kind: str, name: str, limit: float, way_out: str) -> None:
        """Log the warnings. Raises DataError if a share of the rows above ``limit`` (--max_bad_rows) is faulty, or if none can be
        used. ``kind``: what the rows are; ``name``: their sets; ``way_out``: what to do if there are none.
        """
        faults, first = self.faults, self.faults.first[0].reason.removesuffix(".") if self.faults.rows > 0 else ""
        if faults.rows > limit * faults.of:
            raise DataError(
                f"{first} (the first of {faults.rows} faulty rows among {faults.of}, more than --max_bad_rows {limit:g} allows: "
                "correct them, or raise the limit to leave them out)."
            )
        if self.kept == 0:
            longest = f"{self.lengths.max} tokens" + (f"; first fault: {first}" if first else "")
            raise DataError(
                f"No {kind} of {name} can be used (dropped: {self.drop_reasons()}; longest: {longest}): {way_out}."
            )
        for warning in self.warnings:
            logger.warning("%s: %s", name, warning)

    def drop_reasons(self) -> str:
        """Reasons and counts over all sources, in words: "12 too long, 1 empty"; "none" if nothing was dropped."""
        counts = sum((Counter(source.dropped) for source in self.sources), Counter[str]())
        return _in_words(counts) or "none"

    def write(self, path: Path) -> None:
        """Write the report to ``path`` with the endings .json and .md. Raises WriteError."""
        with writing(path.with_suffix(".md")):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path.with_suffix(".json"), json.dumps(asdict(self), indent=2, ensure_ascii=False))
        write_atomically(path.with_suffix(".md"), self.markdown())

    def markdown(self) -> str:
        """The report as Markdown."""
        lines = [f"# {self.title}", ""]
        lines += [f"{self.kept} of {self.picked} rows are used; dropped: {self.drop_reasons()}.", ""]
        # Warnings, then a table of the sets, lengths, faults and examples.
        lines += [f"**Warning:** {warning}\n" for warning in self.warnings]
        lines += ["| set | rows | picked | repeats | kept | dropped |", "|---|---:|---:|---:|---:|---|"]
        for s in self.sources:
            reasons = _in_words(s.dropped) or "none"
            lines.append(f"| {s.name} | {s.rows} | {s.picked} | {s.repeats} | {s.kept} | {reasons} |")
        q = self.lengths
        lines += ["", f"Tokens: min {q.min}, median {q.median}, p90 {q.p90}, p99 {q.p99}, max {q.max}.", ""]
        if self.faults.rows > 0:
            lines += ["## Faulty rows", "", f"{self.faults.rows} of {self.faults.of}: {self.faults.kinds()}.", ""]
            lines += [f"- {fault.reason}" for fault in self.faults.first]
            more = self.faults.rows - len(self.faults.first)
            lines += [f"- and {more} more", ""] if more > 0 else [""]
        for number, example in enumerate(self.examples, start=1):
            # A fence longer than any in the example.
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", example)), default=0))
            lines += [f"## Example {number}", "", fence, example, fence, ""]
        return "\n".join(lines)


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def source_reports(mixture: Mixture, counts: Iterable[Mapping[str | None, int]]) -> tuple[SourceReport, ...]:
    """The report of each set. ``counts``: per set, the number of picks by drop reason; None: used."""
    reports = []
    for index, (source, found) in enumerate(zip(mixture.sources, counts, strict=True)):
        own = mixture.places[mixture.places[:, 0] == index]
        repeats = int((own[:, 2] > 0).sum())
        dropped = {reason: count for reason, count in found.items() if reason is not None}
        reports.append(SourceReport(source.text, len(source.rows), len(own), repeats, found.get(None, 0), dropped))
    return tuple(reports)


def loss_warning(picked: int, kept: int) -> Iterator[str]:
    """A warning if more than half of the rows were dropped."""
    if picked - kept > LARGE_LOSS * picked:
        yield f"{picked - kept} of {picked} rows were dropped: check the keys, the template and the length limit."


def bos_warning(first: int | None, tokenizer: Tokenizer) -> Iterator[str]:
    """A warning if text in the chat template starts otherwise than plain text. ``first``: its first token; None without one."""
    if first is not None and adds_bos(tokenizer) and first != tokenizer.bos_token_id:
        yield f"the tokenizer starts plain text with {tokenizer.bos_token!r} but the chat template does not."


def note_warnings(notes: Mapping[Note, int], rows: int) -> tuple[str, ...]:
    """A sentence for each kind of conversion in the rows. ``rows``: the number of all rows."""
    return tuple(f"{notes[note]} of {rows} rows {note}." for note in Note if notes.get(note, 0) > 0)
