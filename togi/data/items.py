"""Parse an entry of ``--dataset`` or ``--prompt_data``: a file, a saved set, a folder of files or a hub name.

Looks at names and folders only. It opens no data and imports nothing heavy, so that the preflight can use it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

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
_SPLIT_WORDS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "eval": "test",
}


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
    name, data_dir = _split_data_dir(text)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".py":
        raise DataError(
            f"{name} is a Python loading script, which Togi never runs: give the data itself ({SUPPORTED})."
        )
    # What exists locally is local; a hub name is tried last, as it cannot be checked here.
    if path.is_file():
        return _file(text, path, data_dir)
    if path.is_dir():
        return _folder(text, path / data_dir)
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
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in FORMATS and _is_data(p.relative_to(folder)))
    if not files:
        raise no_data_files(folder)
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


def no_data_files(folder: Path) -> DataError:
    """The error for a folder without data files. Names a file of another format if there is one."""
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in OTHER_FORMATS:
            return DataError(
                f"The folder {folder} has no data files ({SUPPORTED}): {file.name} {OTHER_FORMATS[file.suffix.lower()]}"
            )
    return DataError(f"The folder {folder} has no data files ({SUPPORTED}): point to the folder that holds them.")


def choose_split(where: str, splits: Mapping[str, T], split: str) -> T:
    """``splits[split]``; raises DataError naming the existing splits."""
    if split not in splits:
        raise DataError(f"{where} has no split {split!r}: choose one of {listed(splits)}.")
    return splits[split]


def listed(names: Iterable[str]) -> str:
    """Names in quotes, for error messages."""
    return ", ".join(repr(name) for name in names)


def _split_data_dir(text: str) -> tuple[str, str]:
    if "@" not in text or Path(text).expanduser().exists():
        return text, ""
    name, _, data_dir = text.rpartition("@")
    if not name or not data_dir:
        raise DataError(f"{text!r} is not a data set: write name or name@data_dir.")
    return name, data_dir


def _file(text: str, path: Path, data_dir: str) -> Item:
    if data_dir:
        raise DataError(f"{text!r} gives a data_dir for the single file {path}: remove @{data_dir}.")
    if path.suffix.lower() in OTHER_FORMATS:
        raise DataError(f"{path} {OTHER_FORMATS[path.suffix.lower()]}")
    if path.suffix.lower() not in FORMATS:
        problem = f"has the unknown extension {path.suffix}" if path.suffix else "has no extension"
        raise DataError(f"{path} {problem}: data files end in {SUPPORTED}.")
    return Item(text, Kind.FILE, str(path))


def _folder(text: str, path: Path) -> Item:
    if not path.is_dir():
        raise DataError(f"There is no folder {path}: check the part after @ in {text!r}.")
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    return Item(text, Kind.SAVED if saved else Kind.FOLDER, str(path))


def _is_data(path: Path) -> bool:
    return path.name not in _METADATA and not any(part.startswith(".") for part in path.parts)


def _split_of(path: Path) -> str:
    """The split in a file's name or folders; "" if there is none."""
    if shard := _SHARD.fullmatch(path.stem):
        return shard["split"]
    for part in (path.stem, *reversed(path.parts[:-1])):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return ""
