"""Rows of JSONL, CSV and JSON files that are read on demand; only the place of each row is in memory.

``tables`` knows how a row is written in a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from togi.data.items import FORMATS
from togi.data.layout import check_content, check_objects
from togi.data.tables import (
    BOM,
    BadRow,
    Row,
    as_row,
    csv_parser,
    csv_places,
    guarded,
    is_json_list,
    item_place,
    json_list,
    json_row,
    line_place,
    readable,
)

BLOCK = 1 << 22
NEWLINE = ord("\n")
SPACE = tuple(b" \t\r\n\v\f")


@dataclass(frozen=True, slots=True, eq=False)
class LineRows:
    """A JSONL or CSV file. Row i begins at byte ``starts[i]`` in line ``lines[i]``; ``starts`` has one element more."""

    path: Path
    starts: NDArray[np.int64]
    lines: NDArray[np.int64]
    parse: Callable[[bytes], Row | BadRow]

    def __len__(self) -> int:
        return len(self.lines)

    def fetch(self, indices: Sequence[int]) -> list[Row | BadRow]:
        rows = []
        with guarded(self.path), self.path.open("rb") as file:
            for i in indices:
                start, end = self.starts[i : i + 2].tolist()
                file.seek(start)
                rows.append(self.parse(file.read(end - start)))
        return rows

    def place(self, index: int) -> str:
        return line_place(self.path, int(self.lines[index]))

    def digest(self) -> str:
        return file_digest(self.path)


@dataclass(frozen=True, slots=True, eq=False)
class ItemRows:
    """A file that is one JSON list: its ``text``, and the first and last character of each item."""

    path: Path
    text: str
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def fetch(self, indices: Sequence[int]) -> list[Row | BadRow]:
        return [as_row(json.loads(self.text[int(self.starts[i]) : int(self.ends[i])])) for i in indices]

    def place(self, index: int) -> str:
        return item_place(self.path, index)

    def digest(self) -> str:
        return file_digest(self.path)


def open_rows(path: Path) -> LineRows | ItemRows:
    """The rows of a .json, .jsonl or .csv file. Raises DataError naming the file if it cannot be read."""
    with guarded(path):
        check_content(path)
    kind = FORMATS[path.suffix.lower()]
    if kind == "csv":
        return _csv_rows(path)
    if kind == "json" and is_json_list(path):
        text, places = json_list(path)
        table = np.array(places, dtype=np.int64).reshape(-1, 2)
        return ItemRows(path, text, table[:, 0].copy(), table[:, 1].copy())
    return _json_lines(path)


def read_rows(path: Path) -> list[Row]:
    """All rows of such a file, in memory. Raises DataError naming the first row that cannot be read."""
    rows = open_rows(path)
    return [readable(row, rows.place(i)) for i, row in enumerate(rows.fetch(range(len(rows))))]


def file_digest(path: Path) -> str:
    """A digest of a file's bytes and of the format in its name. Raises DataError."""
    digest = hashlib.blake2b(FORMATS[path.suffix.lower()].encode(), digest_size=16)
    with guarded(path), path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _json_lines(path: Path) -> LineRows:
    with guarded(path):
        check_objects(path)
        starts, blank, size = _scan(path)
    filled = np.flatnonzero(~blank)
    return LineRows(path, np.append(starts[filled], size), filled + 1, json_row)


def _csv_rows(path: Path) -> LineRows:
    parser = csv_parser(path)
    with guarded(path):
        size = path.stat().st_size
        table: NDArray[np.int64] = np.fromiter(csv_places(path), dtype=(np.int64, 2))[1:]
    return LineRows(path, np.append(table[:, 0], size), table[:, 1].copy(), parser)


def _scan(path: Path) -> tuple[NDArray[np.int64], NDArray[np.bool_], int]:
    """The first byte of each line, whether the line is blank, and the size of the file in bytes."""
    starts: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    spaced: list[NDArray[np.bool_]] = [np.empty(0, np.bool_)]
    size, last = 0, NEWLINE
    with path.open("rb") as file:
        if file.read(len(BOM)) == BOM:
            size = len(BOM)
        file.seek(size)
        while block := file.read(BLOCK):
            bytes_B = np.frombuffer(block, dtype=np.uint8)
            # A line starts after a newline, which may be the last byte of the block before.
            first = np.flatnonzero(np.append(np.uint8(last), bytes_B[:-1]) == NEWLINE)
            starts.append(first + size)
            spaced.append(np.isin(bytes_B[first], SPACE))
            size, last = size + len(block), int(bytes_B[-1])
        all_starts, blank = np.concatenate(starts), np.concatenate(spaced)
        ends = np.append(all_starts[1:], size)
        for i in np.flatnonzero(blank):  # the line starts with white space; is anything else in it?
            file.seek(int(all_starts[i]))
            blank[i] = not file.read(int(ends[i] - all_starts[i])).strip()
    return all_starts, blank, size
