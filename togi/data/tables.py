"""Read JSON, JSONL and CSV files as plain Python rows, whole or only their head. Standard library only.

Rows keep the values of the file: a table library would merge columns of mixed types and fill missing keys with nulls.
Cells of a CSV file are strings ("007" stays "007").
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from togi.data.items import FORMATS
from togi.errors import DataError

Row = Mapping[str, Any]

HEAD_CHARACTERS = 1 << 20
MAX_CELL = (1 << 31) - 1


def read_rows(path: Path) -> list[Row]:
    """All rows of a .json, .jsonl or .csv file. Raises DataError naming the file and the line."""
    return _guarded(path, lambda: list(_READERS[FORMATS[path.suffix.lower()]](path)))


def read_head(path: Path, limit: int) -> list[Row]:
    """At most ``limit`` first rows; time and memory do not depend on the size of the file. Raises DataError."""
    if FORMATS[path.suffix.lower()] == "json" and _is_array(path):
        return _guarded(path, lambda: _array_head(path, limit))
    return _guarded(path, lambda: list(islice(_READERS[FORMATS[path.suffix.lower()]](path), limit)))


def _guarded(path: Path, read: Callable[[], list[Row]]) -> list[Row]:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it to UTF-8."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the file and its permissions.") from None


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, or (as many .json files really are) one object a line."""
    if not _is_array(path):
        yield from _json_lines(path)
        return
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        _malformed(path, error.lineno, error.msg)
    for i, item in enumerate(items):
        yield _object(item, f"item {i} of the list in {path}")


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except json.JSONDecodeError as error:
                _malformed(path, number, error.msg)
            yield _object(item, f"line {number} of {path}")


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise DataError(f"{path} has two columns of one name in its first line: rename one of them.")
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise DataError(
                        f"Line {reader.line_num} of {path} has {len(cells)} cells but the first line names "
                        f"{len(header)} columns: quote cells that contain commas."
                    )
                if cells:
                    yield dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(
                f"Line {reader.line_num} of {path} is not valid CSV ({error}): repair or remove it."
            ) from None


def _array_head(path: Path, limit: int) -> list[Row]:
    """Decode the first items of a JSON list without reading the rest of the file."""
    size = HEAD_CHARACTERS
    while True:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(size)
        rows, error = _decode_items(path, text, limit)
        if error is None or (rows and len(text) == size):
            return rows
        if len(text) < size:
            _malformed(path, error.lineno, error.msg)
        size *= 4


def _decode_items(path: Path, text: str, limit: int) -> tuple[list[Row], json.JSONDecodeError | None]:
    """The first items of a list that may be cut off, and why decoding stopped early."""
    decoder, rows = json.JSONDecoder(), list[Row]()
    position = text.index("[") + 1
    while len(rows) < limit:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if text[position : position + 1] == "]":
            break
        try:
            item, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            return rows, error
        rows.append(_object(item, f"item {len(rows)} of the list in {path}"))
    return rows, None


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _object(item: object, where: str) -> Row:
    if not isinstance(item, dict):
        raise DataError(
            f"{where[0].upper()}{where[1:]} is of type {type(item).__name__}, not an object with named fields."
        )
    return item


def _malformed(path: Path, line: int, message: str) -> NoReturn:
    raise DataError(f"Line {line} of {path} is not valid JSON ({message}): repair or remove it.")


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {"json": _json, "jsonl": _json_lines, "csv": _csv}
