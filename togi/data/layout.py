"""Recognise files that hold no rows, whatever their names say, and tell how to convert them. Standard library only.

Nothing is converted here: each kind of file has one sentence, raised before a row is read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from togi.errors import DataError

HEAD_CHARACTERS = 1 << 20
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_UTF16 = "is UTF-16 text, as some programs export it: save it as UTF-8 (in Excel: CSV UTF-8)."
# First bytes of a file, and what it then is and what to do.
_SIGNS = (
    (
        (b"version https://git-lfs",),
        "holds only a Git LFS pointer, not the data: fetch the data with `git lfs pull`.",
    ),
    ((b"\xff\xfe", b"\xfe\xff"), _UTF16),
    ((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"), "is compressed: unpack it."),
    ((b"PK\x03\x04",), "is a ZIP archive or an Excel workbook: unpack it, or export it as CSV UTF-8."),
    ((b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML"), "is a web page, not data: download the file itself."),
)
_TABLES = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}
_MESSAGE_KEYS = frozenset({"role", "from"})


def check_content(path: Path) -> None:
    """Raise DataError for a file whose first bytes are not those of its format. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(64)
    is_text = path.suffix.lower() not in _TABLES.values()
    for starts, what in _SIGNS:
        if head.startswith(starts) or (is_text and head.lstrip().startswith(starts)):
            raise DataError(f"{path} {what}")
    if is_text and b"\0" in head[:2]:
        raise DataError(f"{path} {_UTF16}")
    for sign, extension in _TABLES.items():
        if head.startswith(sign) and is_text:
            raise DataError(f"{path} is binary data of the format {extension}: let its name end in {extension}.")


def check_objects(path: Path, fields: Collection[str] = ()) -> None:
    """Raise DataError for a JSONL file that is not one object per line, or whose only object holds all rows.

    ``fields``: of a row, if they are known; one object on one line that has them is a row.
    """
    text, value, end = _first_value(path)
    # The usual mistakes: a list, a table in one object, pretty-printed objects.
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value) and not text[end:].strip():
        raise DataError(
            f"{path} is one JSON list: let its name end in .json, or write one object a line (`jq -c .[] FILE`)."
        )
    if not isinstance(value, dict):
        return
    lines = text[:end].strip().count("\n") + 1
    if not text[end:].strip():
        _check_only(path, value, is_row=set(fields) <= value.keys() if fields else lines == 1)
    if lines > 1:
        raise DataError(
            f"The first object of {path} goes over {lines} lines: write one object a line (`jq -c . FILE`), or a list of "
            "them."
        )


def check_names(path: Path | str, names: Sequence[str], where: str = "") -> None:
    """Raise DataError for two columns of the same name."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path} has two columns of the name {twice[0]!r}{where}: rename one of them.")


def csv_separator(names: Collection[str]) -> str | None:
    """The real separator, in words, of a CSV file whose first line has a single column; None if there is none."""
    if len(names) != 1:
        return None
    (name,) = names
    return next((word for separator, word in SEPARATORS.items() if separator in name), None)


def _check_only(path: Path, value: Mapping[str, Any], *, is_row: bool) -> None:
    """Raise DataError if the single object of a file holds columns or lists of rows."""
    if _is_columns(value):
        raise DataError(
            f"{path} is one object that holds a whole table: write one object a line (pandas: `to_json(path, orient='records', "
            "lines=True)`)."
        )
    inside = [key for key, item in value.items() if _is_row_list(item)]
    if inside and not is_row and not any(_is_messages(item) for item in value.values()):
        raise DataError(
            f"{path} is one object with rows in {', '.join(map(repr, inside))}: make a list of rows the whole file, or "
            "write one row a line."
        )


def _first_value(path: Path) -> tuple[str, Any, int]:
    """The head of a file, the JSON value that it starts with (None if it is none) and the end of that value."""
    size = HEAD_CHARACTERS
    while True:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            text = file.read(size)
        start = len(text) - len(text.lstrip())
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except json.JSONDecodeError as error:
            # A value that goes on after the head looks like an error at its end: read more.
            cut_off = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith(("Unterminated", "Invalid \\u"))
            if len(text) < size or not cut_off:
                return text, None, 0
        except (ValueError, RecursionError):
            return text, None, 0
        else:
            return text, value, end
        size *= 4


def _is_columns(value: Mapping[str, Any]) -> bool:
    """Whether an object is a table as pandas writes it: {"a": {"0": ..., "1": ...}}, the same transposed, columns and data
    apart, or equally long lists of texts and numbers.
    """
    columns = list(value.values())
    if columns and all(isinstance(column, dict) and column for column in columns):
        return all(key.isdigit() for key in value) or all(key.isdigit() for column in columns for key in column)
    if value.keys() in ({"columns", "data"}, {"columns", "index", "data"}):
        return True
    if not all(isinstance(column, list) and column for column in columns):
        return False
    items = [item for column in columns for item in column]
    plain = any(isinstance(item, str) for item in items) and not any(isinstance(item, dict | list) for item in items)
    return plain and len({len(column) for column in columns}) == 1


def _is_row_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_messages(value: object) -> bool:
    return _is_row_list(value) and all(_MESSAGE_KEYS & item.keys() for item in value)  # type: ignore[attr-defined]
