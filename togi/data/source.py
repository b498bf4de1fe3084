"""Load one data set: rows that can be fetched by index, wherever they come from.

JSON, JSONL and CSV stay plain Python rows (see ``tables``); Parquet, Arrow, saved data sets and hub data sets are
memory-mapped by ``datasets``. No code that comes with data is ever run. Mixing several sets is in ``mixture``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from togi.data.items import DEFAULT_SPLIT, FORMATS, Item, Kind, choose_split, parse_item, split_files
from togi.data.precheck import no_rows, unreadable
from togi.data.tables import Row, read_rows
from togi.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


class Rows(Protocol):
    """Rows in a fixed order. ``fetch`` returns them in the order of the indices."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> list[Row]: ...


@dataclass(frozen=True, slots=True, eq=False)
class ListRows:
    """Rows in memory; each may have its own fields."""

    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, indices: Sequence[int]) -> list[Row]:
        return [self.rows[i] for i in indices]


class TableRows:
    """Rows of an Arrow table; every row has all columns, with None where it has no value."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def fetch(self, indices: Sequence[int]) -> list[Row]:
        rows: list[Row] = self._dataset[list(indices)].to_pylist()
        return rows


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A loaded data set with at least one row. ``name`` is short, for metrics; ``text`` is what the user wrote."""

    name: str
    text: str
    rows: Rows


def load_source(text: str, split: str = DEFAULT_SPLIT) -> Source:
    """Load ``name[@data_dir]``. A single file has no splits and serves any. Raises DataError."""
    item = parse_item(text)
    match item.kind:
        case Kind.FILE:
            rows = _load_files([item.path])
        case Kind.FOLDER:
            rows = _load_files(split_files(item.path, split))
        case Kind.SAVED:
            rows = _load_saved(item.path, split)
        case Kind.HUB:
            rows = _load_hub(item, split)
    if len(rows) == 0:
        raise no_rows(item.text)
    return Source(item.name, item.text, rows)


def _load_files(files: Sequence[Path]) -> Rows:
    """Files of one format, one after the other."""
    name = FORMATS[files[0].suffix.lower()]
    if name not in ("parquet", "arrow"):
        return ListRows(list(chain.from_iterable(read_rows(file) for file in files)))
    import pyarrow
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return TableRows(load_dataset(name, data_files=[str(file) for file in files], split="train"))
    except (pyarrow.ArrowException, DatasetsError, OSError) as error:
        raise unreadable(", ".join(str(file) for file in files), error) from None


def _load_saved(folder: Path, split: str) -> Rows:
    import pyarrow
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise unreadable(folder, error) from None
    return TableRows(choose_split(str(folder), loaded, split) if isinstance(loaded, DatasetDict) else loaded)


def _load_hub(item: Item, split: str) -> Rows:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        loaded = load_dataset(item.location, data_dir=item.data_dir or None)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        # RuntimeError: a hub data set that would need its own loading script.
        reason = " ".join(str(error).split())
        raise DataError(
            f"{item.text} is neither a local file or folder nor a hub data set that can be loaded ({reason}): "
            "check the name, the network and HF_HUB_OFFLINE, or give a local path."
        ) from None
    return TableRows(choose_split(item.text, loaded, split))
