"""Parse an entry of ``--dataset`` or ``--prompt_data``: a file, a saved set, a folder of files or a hub name.

Looks at names and folders only. It opens no data and imports nothing heavy, so that the preflight can use it.

Recognise files that hold no rows, whatever their names say, and tell how to convert them. Standard library only.

Nothing is converted here: each kind of file has one sentence, raised before a row is read.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeGuard, TypeVar

from togi.errors import DataError

T = TypeVar("T")

# Files of other formats, and what to do with them.
OTHER_FORMATS = {
    **dict.fromkeys((".gz", ".zst", ".bz2", ".xz", ".zip"), "is compressed: unpack it."),
    **dict.fromkeys((".tsv", ".tab"), "is separated by tabs: write it with commas as .csv, or as .jsonl."),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "is a workbook: export it as CSV UTF-8."),
}
FORMATS = {".json": "json", ".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
SUPPORTED = ", ".join(FORMATS)
DEFAULT_SPLIT = "train"

_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPLIT_WORDS = {"train": "train", "test": "test", "eval": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)


class Kind(StrEnum):
    FILE = "file"
    SAVED = "saved"
    FOLDER = "folder"
    HUB = "hub"


@dataclass(frozen=True, slots=True)
class Item:
    """One data set. ``location``: a local path, or the hub name if ``kind`` is HUB; ``text``: as the user wrote it.

    ``data_dir``: the part after ``@``, "" if there is none; for local folders it is already part of ``location``.
    """

    text: str
    kind: Kind
    location: str
    data_dir: str = ""

    @property
    def path(self) -> Path:
        return Path(self.location)

    @property
    def name(self) -> str:
        """A short name for metrics: the file's stem, the folder's name or the hub name without its owner."""
        return self.path.stem if self.kind is Kind.FILE else self.path.name


def parse_items(text: str) -> tuple[Item, ...]:
    """The entries of a comma-separated list. Raises DataError."""
    return tuple(parse_item(part) for part in split_items(text))


def split_items(text: str) -> list[str]:
    """The parts of a comma-separated list. Raises DataError if a file name contains a comma."""
    parts = text.split(",")
    # Is any run of neighbouring parts the name of an existing file?
    for size in range(2, len(parts) + 1):
        for start in range(len(parts) - size + 1):
            name = ",".join(parts[start : start + size]).strip()
            if name and Path(name).expanduser().exists():
                raise DataError(
                    f"{name} has a comma in its name, and commas separate data sets: rename it, or give a link to it "
                    "(ln -s) without one."
                )
    for part in parts if len(parts) > 1 else []:
        parse_item(part, whole=text)
    return parts


def parse_item(text: str, whole: str = "") -> Item:
    """Parse ``name[@data_dir]``. Raises DataError for what does not exist or is not supported.

    ``whole``: the list that the entry is part of, for the message.
    """
    text = text.strip()
    if not text:
        raise DataError("The list of data sets has an empty entry: remove the extra comma or name a data set.")
    name, data_dir = text, ""
    if "@" in text and not Path(text).expanduser().exists():
        name, _, data_dir = text.rpartition("@")
        if not name or not data_dir:
            raise DataError(f"{text!r} is not a data set: write name or name@data_dir.")
    path = Path(name).expanduser()
    if path.suffix.lower() == ".py":
        raise DataError(
            f"{name} is a Python loading script, which Togi never runs: give the data itself ({SUPPORTED})."
        )
    # What exists locally is local; a hub name is tried last, as it cannot be checked here.
    if path.is_file():
        return _file(text, path, data_dir)
    if path.is_dir():
        path = path / data_dir
        if not path.is_dir():
            raise DataError(f"There is no folder {path}: check the part after @ in {text!r}.")
        saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
        return Item(text, Kind.SAVED if saved else Kind.FOLDER, str(path))
    looks_local = path.suffix.lower() in FORMATS or name[0] in "./~" or not _HUB_NAME.fullmatch(name)
    if looks_local:
        commas = f", and the commas in {whole!r}, which separate data sets" if whole else ""
        raise DataError(f"There is no file or folder {path}: check the path{commas}.")
    return Item(text, Kind.HUB, name, data_dir)


def split_files(folder: Path, split: str) -> list[Path]:
    """The data files of one split of a folder, sorted, all of one format.

    The file (``train.jsonl``, ``test-00000-of-00002.parquet``) or a folder above it (``test/a.csv``) names the split. If no file
    names one, all files together are "train". Raises DataError.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in FORMATS and p.name not in _METADATA)
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not files:
        others = (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in OTHER_FORMATS)
        found = next((f"{file.name} {OTHER_FORMATS[file.suffix.lower()]}" for file in others), "")
        raise DataError(
            f"The folder {folder} has no data files ({SUPPORTED}): {found or 'point to the folder that holds them.'}"
        )
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    # Named and unnamed files together would be ambiguous.
    unnamed = splits.pop("", [])
    if unnamed and splits:
        raise DataError(
            f"The folder {folder} has files of the splits {listed(splits)} but {unnamed[0].name} names no split: "
            "rename it, or give files instead of the folder."
        )
    chosen = choose_split(str(folder), splits or {DEFAULT_SPLIT: unnamed}, split)
    formats = sorted({file.suffix.lower() for file in chosen})
    if len(formats) > 1:
        raise DataError(
            f"The folder {folder} mixes the formats {', '.join(formats)}: give the files one by one instead."
        )
    return chosen


def choose_split(where: str, splits: Mapping[str, T], split: str) -> T:
    """``splits[split]``; raises DataError naming the existing splits."""
    if split not in splits:
        raise DataError(f"{where} has no split {split!r}: choose one of {listed(splits)}.")
    return splits[split]


def listed(names: Iterable[str]) -> str:
    """Names in quotes, for error messages."""
    return ", ".join(repr(name) for name in names)


def _file(text: str, path: Path, data_dir: str) -> Item:
    if data_dir:
        raise DataError(f"{text!r} gives a data_dir for the single file {path}: remove @{data_dir}.")
    if path.suffix.lower() in OTHER_FORMATS:
        raise DataError(f"{path} {OTHER_FORMATS[path.suffix.lower()]}")
    if path.suffix.lower() not in FORMATS:
        problem = f"has the unknown extension {path.suffix}" if path.suffix else "has no extension"
        raise DataError(f"{path} {problem}: data files end in {SUPPORTED}.")
    return Item(text, Kind.FILE, str(path))


def _split_of(path: Path) -> str:
    """The split in a file's name or folders; "" if there is none."""
    if shard := _SHARD.fullmatch(path.stem):
        return shard["split"]
    for part in (path.stem, *reversed(path.parts[:-1])):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return ""


HEAD_CHARACTERS = 1 << 20
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_UTF16 = "is UTF-16 text, as some programs export it: save it as UTF-8 (in Excel: CSV UTF-8)."
# First bytes of a file, and what it then is and what to do.
_SIGNS = (
    ((b"version https://git-lfs",), "holds only a Git LFS pointer, not the data: fetch the data with `git lfs pull`."),
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
    if is_text and head.startswith(b"\0\0"):
        raise DataError(f"{path} begins with zero bytes, so it holds no text: write or copy it again.")
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
    if _is_row_list(value) and not text[end:].strip():
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
            f"The first object of {path} goes over {lines} lines: write one object a line (`jq -c . FILE`), or a list of them."
        )


def check_names(path: Path | str, names: Sequence[str], where: str = "") -> None:
    """Raise DataError for two columns of the same name."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path} has two columns of the name {twice[0]!r}{where}: rename one of them.")


def csv_separator(names: Collection[str]) -> str | None:
    """The real separator, in words, of a CSV file whose first line has a single column; None if there is none."""
    alone = "" if len(names) != 1 else next(iter(names))
    return next((word for separator, word in SEPARATORS.items() if separator in alone), None)


def _check_only(path: Path, value: Mapping[str, object], *, is_row: bool) -> None:
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


def _first_value(path: Path) -> tuple[str, object, int]:
    """The head of a file, the JSON value that it starts with (None if it is none) and the end of that value."""
    for text, is_whole in heads(path, errors="replace"):
        start = len(text) - len(text.lstrip())
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except json.JSONDecodeError as error:
            # A value that goes on after the head looks like an error at its end: read more.
            cut_off = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith(("Unterminated", "Invalid \\u"))
            if is_whole or not cut_off:
                return text, None, 0
        except (ValueError, RecursionError):
            return text, None, 0
        else:
            return text, value, end
    raise AssertionError("the last head is the whole file")


def heads(path: Path, errors: str = "strict") -> Iterator[tuple[str, bool]]:
    """Ever longer heads of a text file, and whether each is the whole file; the last one is."""
    size, is_whole = HEAD_CHARACTERS, False
    while not is_whole:
        with path.open(encoding="utf-8-sig", errors=errors) as file:
            text = file.read(size)
        is_whole = len(text) < size
        yield text, is_whole
        size *= 4


def _is_columns(value: Mapping[str, object]) -> bool:
    """Whether an object is a table as pandas writes it: {"a": {"0": ..., "1": ...}}, the same transposed, columns and data
    apart, or equally long lists of texts and numbers.
    """
    columns = list(value.values())
    tables = [column for column in columns if isinstance(column, dict) and column]
    if columns and len(tables) == len(columns):
        return all(key.isdigit() for key in value) or all(key.isdigit() for table in tables for key in table)
    if value.keys() in ({"columns", "data"}, {"columns", "index", "data"}):
        return True
    lists = [column for column in columns if isinstance(column, list) and column]
    items = [item for column in lists for item in column]
    plain = any(isinstance(item, str) for item in items) and not any(isinstance(item, dict | list) for item in items)
    return plain and len(lists) == len(columns) and len({len(column) for column in lists}) == 1


def _is_row_list(value: object) -> TypeGuard[list[dict[str, object]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_messages(value: object) -> bool:
    return _is_row_list(value) and all(_MESSAGE_KEYS & item.keys() for item in value)
