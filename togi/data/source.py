"""Load one data set as rows that can be fetched by index.

Rows of JSON, JSONL and CSV files are plain Python objects, made on demand; only the place of each row is in memory, and
``tables`` knows how a row is written in a file. Parquet, Arrow, saved data sets and hub data sets are memory-mapped by
``datasets``. Code that comes with data is never run. Several sets are concatenated, or drawn with probabilities.

Only places are mixed, never tables: a pick is (source, row), and each record is built from its source's own row. So sets with
different columns cannot clash.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from togi.data import items, tables
from togi.data.items import DEFAULT_SPLIT, Item, Kind
from togi.data.messages import FRAME, holds_messages, unfilled
from togi.data.precheck import no_rows, parse_probs, table_fields, unreadable
from togi.data.tables import BadRow, Row
from togi.errors import DataError
from togi.obs.way_out import advice, disk_reason

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, slots=True, eq=False)
class FileRows:
    """The rows of a .json, .jsonl or .csv file: the bytes of each, and its number in ``placed`` (a line or an item of a list)."""

    path: Path
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    numbers: NDArray[np.int64]
    parse: Callable[[bytes], Row | BadRow]
    placed: Callable[[Path, int], str]

    def __len__(self) -> int:
        return len(self.numbers)

    def fetch(self, indices: Sequence[int]) -> list[Row | BadRow]:
        rows = []
        with tables.guarded(self.path), self.path.open("rb") as file:
            for i in indices:
                file.seek(int(self.starts[i]))
                rows.append(self.parse(file.read(int(self.ends[i] - self.starts[i]))))
        return rows

    def place(self, index: int) -> str:
        return self.placed(self.path, int(self.numbers[index]))

    def digest(self) -> str:
        return file_digest(self.path)


def open_rows(path: Path) -> FileRows:
    """The rows of such a file. Raises DataError naming the file if it cannot be read."""
    with tables.guarded(path):
        items.check_content(path)
        if tables.is_json_list(path):
            places = np.array(tables.json_list(path), dtype=np.int64).reshape(-1, 2)
            starts, ends = places.T.copy()
            return FileRows(path, starts, ends, np.arange(len(places)), tables.json_row, tables.item_place)
        lines, parse = tables.line_places(path)
        starts, numbers = np.fromiter(lines, dtype=(np.int64, 2)).reshape(-1, 2).T.copy()
        ends = np.append(starts[1:], path.stat().st_size)[: len(starts)]
        return FileRows(path, starts, ends, numbers, parse, tables.line_place)


def read_rows(path: Path) -> list[Row]:
    """All rows of such a file, in memory. Raises DataError naming the first row that cannot be read."""
    rows = open_rows(path)
    return [tables.readable(row, rows.place(i)) for i, row in enumerate(rows.fetch(range(len(rows))))]


def file_digest(path: Path) -> str:
    """A digest of a file's bytes and of the format in its name. Raises DataError."""
    start = hashlib.blake2b(items.FORMATS[path.suffix.lower()].encode(), digest_size=16)
    with tables.guarded(path), path.open("rb") as file:
        return hashlib.file_digest(file, lambda: start).hexdigest()


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
    item = items.parse_item(text)
    match item.kind:
        case Kind.FILE:
            rows = _load_files(item.text, [item.path])
        case Kind.FOLDER:
            rows = _load_files(item.text, items.split_files(item.path, split))
        case Kind.SAVED:
            rows = _load_saved(item, split)
        case Kind.HUB:
            rows = _load_hub(item, split)
    if len(rows) == 0:
        raise no_rows(item.text)
    return Source(item.name, item.text, rows)


def _load_files(text: str, files: Sequence[Path]) -> Rows:
    """The rows of files of one format, concatenated."""
    name = items.FORMATS[files[0].suffix.lower()]
    if name not in ("parquet", "arrow"):
        parts = [open_rows(file) for file in files]
        return parts[0] if len(parts) == 1 else ChainRows(parts)
    import pyarrow
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    for file in files:
        with tables.guarded(file):
            items.check_content(file)
    try:
        dataset = load_dataset(name, data_files=[str(file) for file in files], split="train")
    except (pyarrow.ArrowException, DatasetsError, OSError, ValueError) as error:
        _check_cache(_root(error))
        _check_types(files)
        raise unreadable(", ".join(str(file) for file in files), _root(error)) from None
    return TableRows(dataset, text, " ".join(file_digest(file) for file in files))


def _root(error: BaseException) -> BaseException:
    """The error that one of ``datasets`` comes from."""
    return error if error.__cause__ is None else _root(error.__cause__)


def _check_cache(error: BaseException) -> None:
    """Raise DataError if an error is one of the folder to which ``datasets`` writes every table that it reads."""
    from datasets import config

    if isinstance(error, OSError) and error.errno is not None:
        raise DataError(
            f"The Hugging Face cache {config.HF_DATASETS_CACHE} cannot be written ({error.strerror}): {advice(error)}, or set "
            "HF_HOME to another folder."
        ) from None


def _check_types(files: Sequence[Path]) -> None:
    """Raise DataError for a column that ``datasets`` does not know, and for files that make no common table."""
    from datasets.features.features import generate_from_arrow_type

    tables_of = {file: fields for file in files if (fields := table_fields(file))}
    for file, fields in tables_of.items():
        for field in fields:
            try:
                generate_from_arrow_type(field.type)
            except ValueError:
                raise DataError(
                    f"{file} has the column {field.name!r} of the type {field.type}, which the library datasets cannot read: "
                    "write the file without this column, or with text or lists in it."
                ) from None
        if fields != (first := next(iter(tables_of.items())))[1]:
            raise DataError(
                f"{first[0]} and {file} have different columns or types, so that they are no common table: give each as "
                "a data set of its own, with a comma in between."
            )


def _load_saved(item: Item, split: str) -> Rows:
    import pyarrow
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(item.location)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise unreadable(item.path, error) from None
    dataset = items.choose_split(item.location, loaded, split) if isinstance(loaded, DatasetDict) else loaded
    return TableRows(dataset, item.text, " ".join(file_digest(Path(file["filename"])) for file in dataset.cache_files))


def _load_hub(item: Item, split: str) -> Rows:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        loaded = load_dataset(item.location, data_dir=item.data_dir or None)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        # RuntimeError: a hub data set that needs its own loading script.
        if disk_reason(_root(error)):
            _check_cache(_root(error))
        reason = " ".join(str(error).split())
        raise DataError(
            f"{item.text} is neither a local file or folder nor a hub data set that can be loaded ({reason}): "
            "check the name, the network and HF_HUB_OFFLINE, or give a local path."
        ) from None
    dataset = items.choose_split(item.text, loaded, split)
    return TableRows(dataset, item.text, dataset._fingerprint)  # covers the revision, the files and the split


DEFAULT_DATASOURCE = "default"
DATASOURCE_COLUMNS = ("datasource", "data_source")
DRAW = 1000


@dataclass(frozen=True, slots=True)
class Pick:
    """One row of the mixture. ``repeat``: the number of its earlier occurrences (0 for the first)."""

    source: int
    row: int
    repeat: int = 0

    @property
    def id(self) -> str:
        """Unique in the mixture and stable between runs: "source:row", then "source:row#1" for a repeat."""
        return f"{self.source}:{self.row}" + (f"#{self.repeat}" if self.repeat > 0 else "")

    @classmethod
    def of(cls, id: str) -> Self:
        """The pick of an id."""
        return cls(*map(int, id.replace("#", ":").split(":")))


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """Data sets and the order of their rows. ``places``: (source, row, repeat) of each, shape (M, 3)."""

    sources: tuple[Source, ...]
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def picks(self) -> Iterator[Pick]:
        """The rows in order, as an iterator that does not build all picks at once."""
        return (
            Pick(*place) for start in range(0, len(self), DRAW) for place in self.places[start : start + DRAW].tolist()
        )

    @property
    def datasources(self) -> list[str]:
        """The datasource of the rows of each set that have no such column: the name of the set, if there are several."""
        if len(self.sources) == 1:
            return [DEFAULT_DATASOURCE]
        names = [source.name for source in self.sources]
        return [source.text if names.count(source.name) > 1 else source.name for source in self.sources]

    def rows_used(self, source: int) -> range:
        """The distinct rows of a source that are used, always from its beginning."""
        own = self.places[self.places[:, 0] == source, 1]
        return range(int(own.max()) + 1 if len(own) > 0 else 0)

    def rows(self) -> list[Row]:
        """The row of every pick, in order, all in memory. Raises DataError for a row that cannot be read."""
        found = [source.rows.fetch(self.rows_used(index)) for index, source in enumerate(self.sources)]
        return [tables.readable(found[pick.source][pick.row], self.place(pick)) for pick in self.picks]

    def place(self, pick: Pick) -> str:
        """The place of a pick's row in words: file and line."""
        return self.sources[pick.source].rows.place(pick.row)


def load_mixture(
    datasets: str, probs: str | None, *, split: str = DEFAULT_SPLIT, seed: int = 42, max_samples: int = 100_000_000
) -> Mixture:
    """Load comma-separated sets and mix them. Raises DataError.

    Without ``probs`` the sets are concatenated, and ``max_samples`` is shared in proportion to their sizes, so later sets never
    vanish. With ``probs`` rows are drawn until every set was used up once (short sets repeat), and ``max_samples`` truncates.
    """
    names = items.split_items(datasets)
    weights = None if probs is None else parse_probs(probs, len(names))
    sources = tuple(load_source(name, split) for name in names)
    sizes = [len(source.rows) for source in sources]
    places = concatenate(sizes, max_samples) if weights is None else interleave(sizes, weights, seed, max_samples)
    # Rows of a set come in turn, so the number of earlier occurrences is the number of earlier rounds.
    repeats = np.empty(len(places), dtype=np.int64)
    for source, size in enumerate(sizes):
        turns = np.flatnonzero(places[:, 0] == source)
        repeats[turns] = np.arange(len(turns)) // size
    return Mixture(sources, np.column_stack([places, repeats]))


def concatenate(sizes: Sequence[int], max_samples: int) -> NDArray[np.int64]:
    """Places (source, row), shape (M, 2): the first rows of each set, up to its share of ``max_samples``."""
    shares = proportional_shares(sizes, max_samples)
    sources = np.repeat(np.arange(len(sizes)), shares)
    rows = np.concatenate([np.arange(share) for share in shares])
    return np.stack([sources, rows], axis=1)


def proportional_shares(sizes: Sequence[int], total: int) -> list[int]:
    """Whole numbers that sum to min(total, sum of sizes), in proportion to the sizes by the largest-remainder method.

    Every set gets at least one row if ``total`` allows it.
    """
    if sum(sizes) <= total:
        return list(sizes)
    exact = [total * size / sum(sizes) for size in sizes]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    while total >= len(sizes) and 0 in shares:
        shares[shares.index(max(shares))] -= 1
        shares[shares.index(0)] += 1
    return shares


def interleave(sizes: Sequence[int], probs: Sequence[float], seed: int, max_samples: int) -> NDArray[np.int64]:
    """Places (source, row), shape (M, 2), drawn until every set was used up once; a set that runs out starts again.

    The same order as ``datasets.interleave_datasets(..., stopping_strategy="all_exhausted")``: sources are drawn in blocks of 1000
    from NumPy's default generator.
    """
    rng = np.random.default_rng(seed)
    blocks: list[NDArray[np.int64]] = []
    left = np.array(sizes)
    while (left > 0).any() and len(blocks) * DRAW < max_samples:
        blocks.append(rng.choice(len(sizes), size=DRAW, p=probs))
        left -= np.bincount(blocks[-1], minlength=len(sizes))
    drawn = np.concatenate(blocks)
    # The k-th draw of a source is its row k, modulo its size. The end is where the last set has had all rows.
    rows = np.empty_like(drawn)
    end = 0
    for source, size in enumerate(sizes):
        turns = np.flatnonzero(drawn == source)
        rows[turns] = np.arange(len(turns)) % size
        end = max(end, int(turns[size - 1]) + 1 if len(turns) >= size else len(drawn))
    return np.stack([drawn, rows], axis=1)[: min(end, max_samples)]
