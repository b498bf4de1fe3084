"""A cheap look at a data set before anything heavy starts: does it exist, has it rows, has it the fields asked for.

Reads the first rows only and imports neither torch nor transformers nor datasets. What it cannot see cheaply (a bad row
far down, a hub data set) is found when the data is loaded.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from togi.data.items import DEFAULT_SPLIT, FORMATS, Item, Kind, choose_split, listed, parse_item, split_files
from togi.data.tables import read_head
from togi.errors import DataError

HEAD_ROWS = 16


def check_sources(text: str, required_keys: Sequence[str], split: str = DEFAULT_SPLIT) -> None:
    """``check_source`` for each entry of a comma-separated list."""
    for part in text.split(","):
        check_source(part, required_keys, split)


def check_source(text: str, required_keys: Sequence[str], split: str = DEFAULT_SPLIT) -> None:
    """Raise DataError if the data set ``name[@data_dir]`` is missing, is empty or lacks a field. A hub name passes."""
    item = parse_item(text)
    if item.kind is Kind.HUB:
        return
    rows = _head_fields(item, split)
    if not rows:
        raise no_rows(item.text)
    for number, fields in enumerate(rows):
        for key in required_keys:
            if key not in fields:
                raise missing_field(f"Row {number} of {item.text}", key, fields)


def missing_field(where: str, key: str, fields: Iterable[str]) -> DataError:
    """The error for a field that is not there: names what there is and the nearest name."""
    names = list(fields)
    near = difflib.get_close_matches(key, names, n=1)
    way_out = f"did you mean {near[0]!r}?" if near else "set the flag that names the field to one of these."
    return DataError(f"{where} has no field {key!r}; it has {listed(names)}: {way_out}")


def no_rows(name: str) -> DataError:
    return DataError(f"The data set {name} has no rows: check that it is the right file and was written completely.")


def _head_fields(item: Item, split: str) -> list[Sequence[str]]:
    """The field names of each of the first rows; for tables one entry, none if there is no row."""
    if item.kind is Kind.SAVED:
        return _saved_fields(item.path, split)
    files = [item.path] if item.kind is Kind.FILE else split_files(item.path, split)
    for file in files:
        if fields := _file_fields(file):
            return fields
    return []


def _file_fields(path: Path) -> list[Sequence[str]]:
    match FORMATS[path.suffix.lower()]:
        case "parquet":
            return _parquet_fields(path)
        case "arrow":
            return _arrow_fields(path)
        case _:
            return [tuple(row) for row in read_head(path, HEAD_ROWS)]


def _parquet_fields(path: Path) -> list[Sequence[str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(path, error) from None
    with file:
        return [file.schema_arrow.names] if file.metadata.num_rows > 0 else []


def _arrow_fields(path: Path) -> list[Sequence[str]]:
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                reader = batches = pyarrow.ipc.open_stream(source)
            has_rows = any(batch.num_rows > 0 for batch in batches)
            return [reader.schema.names] if has_rows else []
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(path, error) from None


def _saved_fields(folder: Path, split: str) -> list[Sequence[str]]:
    """A folder written by ``save_to_disk``: one folder a split, or the rows of the only one."""
    index = folder / "dataset_dict.json"
    if index.is_file():
        splits = {name: folder / name for name in json.loads(index.read_text(encoding="utf-8"))["splits"]}
        folder = choose_split(str(folder), splits, split)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    for file in state["_data_files"]:
        if fields := _arrow_fields(folder / file["filename"]):
            return fields
    return []


def unreadable(path: Path | str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"{path} cannot be read ({reason}): check that the file is complete and has the right extension.")
