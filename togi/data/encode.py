"""Tokenise rows, or say why a row is dropped: the slow part of loading.

The result depends only on row, reader and tokenizer, so it can run anywhere and be cached (``shards``). How the fields of a row
are read is in ``rows``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from togi.config.choices import Overlong
from togi.data.chat import Tokenizer
from togi.data.faults import SENTENCES, Drop, Note, RowError, check_whole, named
from togi.data.precheck import RecordSpec
from togi.data.rows import StepLabels, check_places, join_pair, read_pair, read_sft, read_steps, read_unpaired
from togi.data.source import Rows
from togi.data.tables import BadRow, Row
from togi.data.turns import Coded, Draft, check_decoding, check_start, encode_drafts, end_tokens
from togi.errors import DataError

CHUNK = 128
CHECKED = 32
LONGEST_FAULT = 500
SAME_TEXT = (
    "has two answers that become the same text, since the chat template leaves out or trims what differs: use another "
    "template, or remove the row."
)


class RowReader(Protocol):
    """How rows are read. Picklable; its repr names everything that the result depends on."""

    @property
    def spec(self) -> RecordSpec: ...

    def read(self, row: Row, where: str, tokenizer: Tokenizer) -> tuple[Draft, ...] | Drop:
        """The drafts to tokenise, or why there are none. Raises RowError."""

    def finish(self, coded: tuple[Coded, ...], tokenizer: Tokenizer) -> tuple[Coded, ...] | Drop:
        """Check or change the sequences, which fit --max_len now. Raises RowError whose message starts with its verb."""


@dataclass(frozen=True, slots=True)
class AnswerReader:
    """Supervised rows."""

    spec: RecordSpec

    def read(self, row: Row, where: str, tokenizer: Tokenizer) -> tuple[Draft, ...] | Drop:
        return read_sft(row, where, self.spec, tokenizer)

    def finish(self, coded: tuple[Coded, ...], tokenizer: Tokenizer) -> tuple[Coded, ...] | Drop:
        return coded


@dataclass(frozen=True, slots=True)
class PairReader:
    """Rows with a chosen and a rejected answer."""

    spec: RecordSpec

    def read(self, row: Row, where: str, tokenizer: Tokenizer) -> tuple[Draft, ...] | Drop:
        return read_pair(row, where, self.spec, tokenizer)

    def finish(self, coded: tuple[Coded, ...], tokenizer: Tokenizer) -> tuple[Coded, ...] | Drop:
        return join_pair(coded)


@dataclass(frozen=True, slots=True)
class UnpairedReader:
    """Rows with an answer and whether it is desirable."""

    spec: RecordSpec

    def read(self, row: Row, where: str, tokenizer: Tokenizer) -> tuple[Draft, ...] | Drop:
        return read_unpaired(row, where, self.spec, tokenizer)

    def finish(self, coded: tuple[Coded, ...], tokenizer: Tokenizer) -> tuple[Coded, ...] | Drop:
        return coded


@dataclass(frozen=True, slots=True)
class StepReader:
    """Rows with a label after each step."""

    spec: RecordSpec
    labels: StepLabels

    def read(self, row: Row, where: str, tokenizer: Tokenizer) -> tuple[Draft, ...] | Drop:
        return read_steps(row, where, self.spec, self.labels, tokenizer)

    def finish(self, coded: tuple[Coded, ...], tokenizer: Tokenizer) -> tuple[Coded, ...] | Drop:
        check_places(coded[0], self.labels, tokenizer)
        return coded


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a row: its sequences, or why it has none. ``lengths``: in tokens before truncation.

    ``fault``: what is wrong with a faulty row, to be printed after its place; else "". ``notes``: of a row that is used.
    """

    coded: tuple[Coded, ...]
    lengths: tuple[int, ...]
    drop: Drop | None
    was_cut: bool = False
    fault: str = ""
    notes: frozenset[Note] = frozenset()


def encode_rows(rows: Rows, numbers: range, reader: RowReader, tokenizer: Tokenizer) -> Iterator[Outcome]:
    """The outcome of each of these rows. Raises DataError for what is not the fault of a single row."""
    chat = reader.spec.apply_chat_template
    enders = end_tokens(tokenizer, chat=chat)
    unchecked = CHECKED
    # Rows are tokenised in chunks: the tokenizer is fastest on many texts at once.
    for first in range(numbers.start, numbers.stop, CHUNK):
        chunk = range(first, min(first + CHUNK, numbers.stop))
        places = [rows.place(number) for number in chunk]
        fetched = zip(rows.fetch(chunk), places, strict=True)
        read = [_read(row, place, reader, tokenizer) for row, place in fetched]
        drafts = [draft for drafted in read if not isinstance(drafted, Outcome) for draft in drafted]
        coded = iter(encode_drafts(drafts, tokenizer, add_special_tokens=not chat, enders=enders))
        for drafted, place in zip(read, places, strict=True):
            if isinstance(drafted, Outcome):
                yield drafted
                continue
            # A row owns as many sequences as it had drafts (two for a pair).
            sequences = tuple(islice(coded, len(drafted)))
            # Decoding is compared with the text on the first rows only: it is slow, and a broken tokenizer shows at
            # once.
            if unchecked > 0:
                unchecked -= 1
                with named(place):
                    _check_decoding(drafted, sequences, tokenizer)
            outcome = _settle(sequences, place, reader, tokenizer)
            notes = frozenset().union(*(draft.notes for draft in drafted))
            yield replace(outcome, notes=notes) if notes and outcome.drop is None else outcome


def _read(row: Row | BadRow, place: str, reader: RowReader, tokenizer: Tokenizer) -> tuple[Draft, ...] | Outcome:
    if isinstance(row, BadRow):
        return _fault(Drop.UNREADABLE, f" {row.reason}")
    try:
        drafts = reader.read(row, place, tokenizer)
        if isinstance(drafts, Drop):
            return _fault(drafts, f" {SENTENCES[drafts]}")
        for draft in drafts:
            check_whole(draft.text, f"{place} has")
    except RowError as error:
        return _fault(error.kind, str(error).removeprefix(place))
    return drafts


def _check_decoding(drafts: tuple[Draft, ...], sequences: tuple[Coded, ...], tokenizer: Tokenizer) -> None:
    for draft, coded in zip(drafts, sequences, strict=True):
        check_decoding(draft, coded, tokenizer)


def _settle(sequences: tuple[Coded, ...], place: str, reader: RowReader, tokenizer: Tokenizer) -> Outcome:
    """Drop, truncate or refuse rows that are too long, then let the reader ``finish``."""
    spec = reader.spec
    lengths = tuple(len(coded.tokens) for coded in sequences)
    if not all(coded.learnable() for coded in sequences):
        return _fault(Drop.EMPTY_ANSWER, f" {SENTENCES[Drop.EMPTY_ANSWER]}", lengths)
    too_long = max(lengths) > spec.max_len
    if too_long and spec.overlong is Overlong.ERROR:
        raise DataError(
            f"{place} has {max(lengths)} tokens, more than --max_len {spec.max_len}: raise it, or use --overlong drop or "
            "truncate."
        )
    if too_long and spec.overlong is Overlong.DROP:
        return Outcome((), lengths, Drop.TOO_LONG)
    if too_long:
        sequences = tuple(coded.cut(spec.max_len) if len(coded.tokens) > spec.max_len else coded for coded in sequences)
        if not all(coded.learnable() for coded in sequences):
            return Outcome((), lengths, Drop.CUT_AWAY)
    try:
        for coded in sequences:
            check_start(coded, tokenizer)
        finished = reader.finish(sequences, tokenizer)
    except RowError as error:
        return _fault(error.kind, f" {error}", lengths)
    # Answers that became equal without truncation are a fault of the row, not of --max_len.
    if isinstance(finished, Drop):
        same = finished is Drop.CUT_EQUAL and not too_long
        return _fault(Drop.TIE, f" {SAME_TEXT}", lengths) if same else Outcome((), lengths, finished)
    return Outcome(finished, lengths, None, was_cut=too_long)


def _fault(kind: Drop, text: str, lengths: tuple[int, ...] = ()) -> Outcome:
    short = text if len(text) <= LONGEST_FAULT else f"{text[:LONGEST_FAULT]} ..."
    return Outcome((), lengths, kind, fault=short)
