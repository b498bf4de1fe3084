"""Load one data set as rows that can be fetched by index.

Rows of JSON, JSONL and CSV files are plain Python objects, made on demand (``lines``). Parquet, Arrow, saved data sets and hub
data sets are memory-mapped by ``datasets``. Code that comes with data is never run. ``mixture`` mixes several sets.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from togi.data.items import DEFAULT_SPLIT, FORMATS, Item, Kind, choose_split, parse_item, split_files
from togi.data.layout import check_content
from togi.data.lines import file_digest, open_rows
from togi.data.messages import FRAME, holds_messages, unfilled
from togi.data.precheck import no_rows, unreadable
from togi.data.tables import BadRow, Row, guarded
from togi.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


class Rows(Protocol):
    """Rows in a fixed order. ``fetch`` returns them in the order of the indices. Picklable."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> list[Row | BadRow]: ...

    def place(self, index: int) -> str:
        """The place of the row for users: "Line 3 of a.jsonl"."""

    def digest(self) -> str:
        """Equal only for rows of equal content."""


class ChainRows:
    """The rows of several files, concatenated."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = tuple(parts)
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def fetch(self, indices: Sequence[int]) -> list[Row | BadRow]:
        rows: list[Row | BadRow] = []
        # Neighbouring indices of one file are fetched together.
        for part, own in groupby(map(self._find, indices), key=itemgetter(0)):
            rows += self._parts[part].fetch([index for _, index in own])
        return rows

    def place(self, index: int) -> str:
        part, own = self._find(index)
        return self._parts[part].place(own)

    def digest(self) -> str:
        return " ".join(part.digest() for part in self._parts)

    def _find(self, index: int) -> tuple[int, int]:
        part = bisect.bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part > 0 else 0)


class TableRows:
    """Rows of an Arrow table; every row has all columns, with None for a missing value."""

    def __init__(self, dataset: Dataset, text: str, digest: str) -> None:
        self._dataset = dataset.with_format("arrow")
        self._text = text
        self._digest = digest

    def __len__(self) -> int:
        return len(self._dataset)

    def fetch(self, indices: Sequence[int]) -> list[Row | BadRow]:
        rows: list[Row] = self._dataset[list(indices)].to_pylist()
        return [
            {key: unfilled(value) if key in FRAME or holds_messages(value) else value for key, value in row.items()}
            for row in rows
        ]

    def place(self, index: int) -> str:
        return f"Row {index} of {self._text}"

    def digest(self) -> str:
        return self._digest


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A loaded data set with at least one row. ``name``: short, for metrics; ``text``: as the user wrote it."""

    name: str
    text: str
    rows: Rows


def load_source(text: str, split: str = DEFAULT_SPLIT) -> Source:
    """Load ``name[@data_dir]``. A single file has no splits and matches any. Raises DataError."""
    item = parse_item(text)
    match item.kind:
        case Kind.FILE:
            rows = _load_files(item.text, [item.path])
        case Kind.FOLDER:
            rows = _load_files(item.text, split_files(item.path, split))
        case Kind.SAVED:
            rows = _load_saved(item, split)
        case Kind.HUB:
            rows = _load_hub(item, split)
    if len(rows) == 0:
        raise no_rows(item.text)
    return Source(item.name, item.text, rows)


def _load_files(text: str, files: Sequence[Path]) -> Rows:
    """The rows of files of one format, concatenated."""
    name = FORMATS[files[0].suffix.lower()]
    if name not in ("parquet", "arrow"):
        parts = [open_rows(file) for file in files]
        return parts[0] if len(parts) == 1 else ChainRows(parts)
    import pyarrow
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    for file in files:
        with guarded(file):
            check_content(file)
    try:
        dataset = load_dataset(name, data_files=[str(file) for file in files], split="train")
    except (pyarrow.ArrowException, DatasetsError, OSError) as error:
        raise unreadable(", ".join(str(file) for file in files), error) from None
    return TableRows(dataset, text, " ".join(file_digest(file) for file in files))


def _load_saved(item: Item, split: str) -> Rows:
    import pyarrow
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(item.location)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise unreadable(item.path, error) from None
    dataset = choose_split(item.location, loaded, split) if isinstance(loaded, DatasetDict) else loaded
    return TableRows(dataset, item.text, " ".join(file_digest(Path(file["filename"])) for file in dataset.cache_files))


def _load_hub(item: Item, split: str) -> Rows:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        loaded = load_dataset(item.location, data_dir=item.data_dir or None)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        # RuntimeError: a hub data set that needs its own loading script.
        reason = " ".join(str(error).split())
        raise DataError(
            f"{item.text} is neither a local file or folder nor a hub data set that can be loaded ({reason}): "
            "check the name, the network and HF_HUB_OFFLINE, or give a local path."
        ) from None
    dataset = choose_split(item.text, loaded, split)
    return TableRows(dataset, item.text, dataset._fingerprint)  # covers the revision, the files and the split
