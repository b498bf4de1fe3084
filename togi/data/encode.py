"""Tokenise rows, or say why a row is dropped: the slow part of loading.

The result depends only on row, reader and tokenizer, so it can run anywhere and be cached (``shards``). How the fields of a row
are read is in ``rows``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from togi.config.choices import Overlong
from togi.data.chat import Tokenizer
from togi.data.faults import SENTENCES, Drop, Note, RowError, at, check_whole, named
from togi.data.fields import Fields
from togi.data.rows import RowReader
from togi.data.source import Rows
from togi.data.tables import BadRow, Row, readable
from togi.data.turns import Coded, Draft, check_decoding, check_start, encode_drafts, end_tokens
from togi.errors import DataError

CHUNK = 128
CHECKED = 32
LONGEST_FAULT = 500
SAME_TEXT = (
    "has two answers that become the same text, since the chat template leaves out or trims what differs: use another "
    "template, or remove the row."
)


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
    # Decoding is compared with the text on the first rows only: it is slow, and a broken tokenizer shows at once.
    unchecked = CHECKED
    # Rows are tokenised in chunks: the tokenizer is fastest on many texts at once.
    for first in range(numbers.start, numbers.stop, CHUNK):
        chunk = range(first, min(first + CHUNK, numbers.stop))
        read = [_read(row, reader, tokenizer) for row in rows.fetch(chunk)]
        drafts = [draft for drafted in read if not isinstance(drafted, Outcome) for draft in drafted]
        coded = iter(encode_drafts(drafts, tokenizer, add_special_tokens=not chat, enders=enders))
        for number, drafted in zip(chunk, read, strict=True):
            if isinstance(drafted, Outcome):
                yield drafted
                continue
            # A row owns as many sequences as it had drafts (two for a pair).
            sequences = tuple(islice(coded, len(drafted)))
            with named(rows.place(number)):
                for draft, sequence in zip(drafted, sequences, strict=True) if unchecked > 0 else ():
                    check_decoding(draft, sequence, tokenizer)
                outcome = _settle(sequences, reader, tokenizer)
            unchecked -= 1
            notes = frozenset().union(*(draft.notes for draft in drafted))
            yield replace(outcome, notes=notes) if notes and outcome.drop is None else outcome


def _read(row: Row | BadRow, reader: RowReader, tokenizer: Tokenizer) -> tuple[Draft, ...] | Outcome:
    try:
        drafts = reader.read(Fields(readable(row), tokenizer))
        if isinstance(drafts, Drop):
            return _fault(drafts, SENTENCES[drafts])
        for draft in drafts:
            check_whole(draft.text, "has")
    except RowError as error:
        return _fault(error.kind, error)
    return drafts


def _settle(sequences: tuple[Coded, ...], reader: RowReader, tokenizer: Tokenizer) -> Outcome:
    """Drop, truncate or refuse rows that are too long, then let the reader ``finish``."""
    spec = reader.spec
    lengths = tuple(len(coded.tokens) for coded in sequences)
    if not all(coded.learnable() for coded in sequences):
        return _fault(Drop.EMPTY_ANSWER, SENTENCES[Drop.EMPTY_ANSWER], lengths)
    too_long = max(lengths) > spec.max_len
    if too_long and spec.overlong is Overlong.ERROR:
        raise DataError(
            f"has {max(lengths)} tokens, more than --max_len {spec.max_len}: raise it, or use --overlong drop or truncate."
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
        return _fault(error.kind, error, lengths)
    # Answers that became equal without truncation are a fault of the row, not of --max_len.
    if isinstance(finished, Drop):
        same = finished is Drop.CUT_EQUAL and not too_long
        return _fault(Drop.TIE, SAME_TEXT, lengths) if same else Outcome((), lengths, finished)
    return Outcome(finished, lengths, None, was_cut=too_long)


def _fault(kind: Drop, said: object, lengths: tuple[int, ...] = ()) -> Outcome:
    text = at("", said)
    return Outcome((), lengths, kind, fault=text if len(text) <= LONGEST_FAULT else f"{text[:LONGEST_FAULT]} ...")
