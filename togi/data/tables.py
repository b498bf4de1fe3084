"""JSON, JSONL and CSV: the places of rows in a file, and one row as plain Python. Standard library only.

Rows keep the values of the file: a table library would merge columns of mixed types and fill missing keys with nulls. Cells of a
CSV file are strings ("007" stays "007"). A row that cannot be read is a ``BadRow`` in its place, so the others can be used. A file
without any readable row (a list with broken JSON, quotes that never close) is a DataError.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from togi.data.faults import Drop, at
from togi.data.items import FORMATS, check_names, check_objects, csv_separator, heads
from togi.errors import DataError

Row = Mapping[str, Any]

MAX_CELL = (1 << 31) - 1
BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")


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
    except (ValueError, RecursionError) as error:  # also a number with too many digits, or lists nested too deeply
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        return BadRow(f"is not valid JSON ({reason}): repair or remove it.")
    return as_row(item)


def readable(row: Row | BadRow, place: str | None = None) -> Row:
    """Return the row. Raises RowError if it cannot be read, which begins with its place if that is given."""
    if isinstance(row, BadRow):
        raise Drop.UNREADABLE.error(row.reason if place is None else at(place, row.reason))
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
                f"has {len(cells)} cells but the first line names {len(self.header)} columns: quote cells that contain commas."
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
        _skip_bom(file)
        reader = csv.reader((line.decode(errors="surrogateescape") for line in iter(file.readline, b"")), strict=True)
        while True:
            place = file.tell(), reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                if str(error) == "unexpected end of data":
                    raise DataError(
                        f"Line {place[1]} of {path} is not valid CSV ({error}): close the quotes that it opens."
                    ) from None
                yield place  # its parser reports what is wrong
                continue
            if cells is None:
                return
            if cells:
                yield place


def json_places(path: Path) -> Iterator[tuple[int, int]]:
    """The first byte and the line (from 1) of each line of a file that is not blank."""
    with path.open("rb") as file:
        start = _skip_bom(file)
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                yield start, number
            start += len(line)


def _skip_bom(file: BinaryIO) -> int:
    return file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0)


def json_list(path: Path) -> list[tuple[int, int]]:
    """The (start, end) bytes of the items of a file that is one JSON list. Raises DataError, OSError."""
    content = path.read_bytes()
    text, passed, byte = content.decode("utf-8-sig"), 0, len(BOM) if content.startswith(BOM) else 0
    places = []
    try:
        for _, (start, end) in _items(text):
            first = byte + len(text[passed:start].encode())
            passed, byte = end, first + len(text[start:end].encode())
            places.append((first, byte))
    except json.JSONDecodeError as error:
        raise _malformed(path, error) from None
    return places


def _items(text: str) -> Iterator[tuple[object, tuple[int, int]]]:
    """The items of a text that is one JSON list, with their (start, end) characters. Raises JSONDecodeError."""
    decoder = json.JSONDecoder()
    position = _after_space(text, text.index("[") + 1)
    more = text[position : position + 1] != "]"
    while more:
        item, end = _decode(decoder, text, position)
        yield item, (position, end)
        position = _after_space(text, end)
        more = text[position : position + 1] == ","
        if more:
            position = _after_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    if (rest := _after_space(text, position + 1)) < len(text):
        raise json.JSONDecodeError("Extra data", text, rest)


def line_places(
    path: Path, fields: Collection[str] = ()
) -> tuple[Iterator[tuple[int, int]], Callable[[bytes], Row | BadRow]]:
    """The first byte and the line of each row of a CSV or JSONL file, and how a row is parsed. ``fields``: as in ``read_head``."""
    if FORMATS[path.suffix.lower()] == "csv":
        return islice(csv_places(path), 1, None), csv_parser(path)
    check_objects(path, fields)
    return json_places(path), json_row


def is_json_list(path: Path) -> bool:
    """Whether a .json file is one list; otherwise it has one object per line, as many do."""
    if FORMATS[path.suffix.lower()] != "json":
        return False
    with guarded(path), path.open("rb") as file:
        return file.read(4096).removeprefix(BOM).lstrip()[:1] == b"["


def read_head(path: Path, limit: int, fields: Collection[str] = ()) -> list[tuple[str, Row | BadRow]]:
    """At most ``limit`` first rows with their places; time and memory do not depend on the number of rows.

    ``fields``: the fields that rows must have.
    """
    with guarded(path):
        if is_json_list(path):
            return [(item_place(path, i), as_row(item)) for i, item in enumerate(_list_head(path, limit))]
        places, parse = line_places(path, fields)
        # One place more than rows: it is the end of the last row.
        found = list(islice(places, limit + 1))
        ends = [start for start, _ in found[1:]]
        with path.open("rb") as file:
            head = file.read(ends[-1]) if len(found) > limit else file.read()
    rows = zip(found, [*ends, len(head)], strict=False)
    return [(line_place(path, line), parse(head[start:end])) for (start, line), end in rows][:limit]


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


def _cells(record: bytes) -> list[str]:
    lines = io.StringIO(record.decode(), newline="\n")
    return next(filter(None, csv.reader(lines, strict=True)), [])


def _list_head(path: Path, limit: int) -> list[object]:
    """Decode the first items of a JSON list without reading the rest of the file."""
    for text, is_whole in heads(path):
        items = list[object]()
        try:
            items += (item for item, _ in islice(_items(text), limit))
        except json.JSONDecodeError as error:
            # An error at the cut of the head is none of the file; one in a whole file is.
            if is_whole:
                raise _malformed(path, error) from None
            if not items:
                continue
        return items
    raise AssertionError("the last head is the whole file")


def _decode(decoder: json.JSONDecoder, text: str, position: int) -> tuple[object, int]:
    """The item at ``position`` and where it ends. Raises JSONDecodeError."""
    try:
        item, end = decoder.raw_decode(text, position)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # a number with too many digits, or lists nested too deeply
        raise json.JSONDecodeError(str(error), text, position) from None
    return item, end


def _after_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    assert found is not None
    return found.end()


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 text ({error.reason} at byte {error.start}): convert it to UTF-8."


def _malformed(path: Path, error: json.JSONDecodeError) -> DataError:
    return DataError(f"Line {error.lineno} of {path} is not valid JSON ({error.msg}): repair or remove it.")
