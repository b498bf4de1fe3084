"""JSON, JSONL and CSV: the places of rows in a file, and one row as plain Python. Standard library only.

Rows keep the values of the file: a table library would merge columns of mixed types and fill missing keys with nulls. Cells of a
CSV file are strings ("007" stays "007"). A row that cannot be read is a ``BadRow`` in its place, so the others can be used. A file
without any readable row (a list with broken JSON, quotes that never close) is a DataError.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from togi.data.faults import Drop, RowError
from togi.data.items import FORMATS, HEAD_CHARACTERS, check_names, check_objects, csv_separator
from togi.errors import DataError

Row = Mapping[str, Any]

MAX_CELL = (1 << 31) - 1
BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class BadRow:
    """Stands for a row that cannot be read. ``reason``: a sentence to follow its place, "is not valid JSON ..."."""

    reason: str


def json_row(line: bytes) -> Row | BadRow:
    """The row of one line of a JSONL file."""
    try:
        item = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRow(_not_utf8(error))
    except json.JSONDecodeError as error:
        return BadRow(f"is not valid JSON ({error.msg}): repair or remove it.")
    except (ValueError, RecursionError) as error:  # a number with too many digits, or lists nested too deeply
        return BadRow(f"is not valid JSON ({error}): repair or remove it.")
    return as_row(item)


def readable(row: Row | BadRow) -> Row:
    """Return the row. Raises RowError if it cannot be read."""
    if isinstance(row, BadRow):
        raise RowError(Drop.UNREADABLE, row.reason)
    return row


def as_row(item: object) -> Row | BadRow:
    """A JSON value as a row."""
    if not isinstance(item, dict):
        return BadRow(f"is of type {type(item).__name__}, not an object with named fields.")
    return item


@dataclass(frozen=True, slots=True)
class CsvParser:
    """Parses one record of a CSV file, which may span several lines. ``header``: the names in the first record."""

    header: tuple[str, ...]

    def __call__(self, record: bytes) -> Row | BadRow:
        try:
            cells = _cells(record)
        except UnicodeDecodeError as error:
            return BadRow(_not_utf8(error))
        except csv.Error as error:
            return BadRow(f"is not valid CSV ({error}): repair or remove it.")
        if len(cells) != len(self.header):
            return BadRow(
                f"has {len(cells)} cells but the first line names {len(self.header)} columns: quote cells that contain "
                "commas."
            )
        return dict(zip(self.header, cells, strict=True))


def csv_parser(path: Path) -> CsvParser:
    """A parser for the columns that the first record names. Raises DataError."""
    with guarded(path):
        places = list(islice(csv_places(path), 2))
        if not places:
            return CsvParser(())
        # The names may span several lines, so the record ends where the next one begins.
        with path.open("rb") as file:
            file.seek(places[0][0])
            record = file.read(places[1][0] - places[0][0]) if len(places) > 1 else file.read()
        try:
            header = _cells(record)
        except csv.Error as error:
            raise DataError(f"Line {places[0][1]} of {path} is not valid CSV ({error}): repair it.") from None
    check_names(path, header, " in its first line")
    if separator := csv_separator(header):
        raise DataError(
            f"{path} separates its columns by {separator}, not by commas: write it with commas (pandas: "
            "`to_csv(path, index=False)`), or as .jsonl."
        )
    return CsvParser(tuple(header))


def csv_places(path: Path) -> Iterator[tuple[int, int]]:
    """The first byte and the line (from 1) of each record, including the record of names. Raises DataError."""
    csv.field_size_limit(MAX_CELL)
    with path.open("rb") as file:
        lines = _Lines(file)
        reader = csv.reader(lines, strict=True)
        while True:
            place = lines.bytes, lines.number + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                if lines.ended:
                    raise DataError(
                        f"Line {place[1]} of {path} is not valid CSV ({error}): close the quotes that it opens."
                    ) from None
                yield place  # its parser reports what is wrong
                continue
            if cells is None:
                return
            if cells:
                yield place


def json_list(path: Path) -> tuple[str, list[tuple[int, int]]]:
    """The text of a file that is one JSON list, and the (start, end) characters of its items. Raises DataError."""
    with guarded(path):
        text = path.read_text(encoding="utf-8-sig")
    decoder, places = json.JSONDecoder(), list[tuple[int, int]]()
    position = _after_space(text, text.index("[") + 1)
    more = text[position : position + 1] != "]"
    while more:
        try:
            _, end = decoder.raw_decode(text, position)
            places.append((position, end))
            position = _after_space(text, end)
            more = text[position : position + 1] == ","
            if more:
                position = _after_space(text, position + 1)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        except json.JSONDecodeError as error:
            _malformed(path, error)
    rest = _after_space(text, position + 1)
    if rest < len(text):
        _malformed(path, json.JSONDecodeError("Extra data", text, rest))
    return text, places


def is_json_list(path: Path) -> bool:
    """Whether a .json file is one list; otherwise it has one object per line, as many do."""
    with guarded(path), path.open("rb") as file:
        return file.read(4096).removeprefix(BOM).lstrip()[:1] == b"["


def read_head(path: Path, limit: int, fields: Collection[str] = ()) -> list[tuple[str, Row | BadRow]]:
    """At most ``limit`` first rows with their places; time and memory do not depend on the number of rows.

    ``fields``: the fields that rows must have.
    """
    kind = FORMATS[path.suffix.lower()]
    with guarded(path):
        if kind == "csv":
            return _csv_head(path, limit)
        if kind == "json" and is_json_list(path):
            return [(item_place(path, i), as_row(item)) for i, item in enumerate(_list_head(path, limit))]
        check_objects(path, fields)
        with path.open("rb") as lines:
            filled = ((number, line) for number, line in enumerate(_without_bom(lines), start=1) if line.strip())
            return [(line_place(path, number), json_row(line)) for number, line in islice(filled, limit)]


def line_place(path: Path, line: int) -> str:
    """The place of a row by its line, counted as in editors."""
    return f"Line {line} of {path}"


def item_place(path: Path, item: int) -> str:
    """The place of a row in a file that is a JSON list."""
    return f"Item {item} of the list in {path}"


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Raise DataError for a file that cannot be read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} {_not_utf8(error)}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the file and its permissions.") from None


class _Lines:
    """The lines of an open file for the csv module, and how many bytes and lines were read."""

    def __init__(self, file: BinaryIO) -> None:
        self.bytes = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(self.bytes)
        self.number = 0
        self.ended = False
        self._file = file

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            self.ended = True
            raise StopIteration
        self.bytes += len(line)
        self.number += 1
        return line.decode(errors="surrogateescape")


def _cells(record: bytes) -> list[str]:
    lines = io.StringIO(record.decode(), newline="\n")
    return next(filter(None, csv.reader(lines, strict=True)), [])


def _csv_head(path: Path, limit: int) -> list[tuple[str, Row | BadRow]]:
    parser = csv_parser(path)
    # One place more than rows: it is the end of the last row.
    places = list(islice(csv_places(path), 1, limit + 2))
    ends = [start for start, _ in places[1:]]
    with path.open("rb") as file:
        head = file.read(ends[-1]) if len(places) > limit else file.read()
    ends = ends if len(places) > limit else [*ends, len(head)]
    return [(line_place(path, line), parser(head[start:end])) for (start, line), end in zip(places, ends, strict=False)]


def _without_bom(lines: BinaryIO) -> Iterator[bytes]:
    yield lines.readline().removeprefix(BOM)
    yield from lines


def _list_head(path: Path, limit: int) -> list[object]:
    """Decode the first items of a JSON list without reading the rest of the file."""
    size = HEAD_CHARACTERS
    while True:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(size)
        items, error = _decode_items(text, limit)
        # An error at the cut of the head is none of the file; one in a whole file is.
        if error is None or (items and len(text) == size):
            return items
        if len(text) < size:
            _malformed(path, error)
        size *= 4


def _decode_items(text: str, limit: int) -> tuple[list[object], json.JSONDecodeError | None]:
    """The first items of a list that may be cut off, and the error at which decoding stopped."""
    decoder, items = json.JSONDecoder(), list[object]()
    position = text.index("[") + 1
    while len(items) < limit:
        while position < len(text) and text[position] in _SPACE + ",":
            position += 1
        if text[position : position + 1] == "]":
            break
        try:
            item, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            return items, error
        items.append(item)
    return items, None


def _after_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 text ({error.reason} at byte {error.start}): convert it to UTF-8."


def _malformed(path: Path, error: json.JSONDecodeError) -> NoReturn:
    raise DataError(f"Line {error.lineno} of {path} is not valid JSON ({error.msg}): repair or remove it.")
