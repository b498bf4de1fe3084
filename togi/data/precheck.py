"""A cheap check of a data set before anything heavy starts: does it exist, does it have rows and the named fields.

Reads the first rows only and imports neither torch nor transformers nor datasets. What it cannot see cheaply (a bad row far down,
a hub data set) is found when the data is loaded.

What the supervised and preference commands read. The reading itself is in ``records``.

The reward text of conditional SFT. One function writes it, for training and for generation.

``togi.run.iterate_steps`` chooses the reward; ``prompts`` formats prompts.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from togi.config.choices import Overlong
from togi.config.fields import AUTO
from togi.data import items
from togi.data.faults import Drop, RowError, at
from togi.data.items import DEFAULT_SPLIT, Item, Kind
from togi.data.tables import BadRow, guarded, read_head
from togi.errors import DataError


@dataclass(frozen=True, slots=True)
class RecordSpec:
    """Which rows to load and how to make sequences of them. Fields are named as their flags.

    ``max_len``: in tokens, prompt and answer together. Each command reads the keys that it knows. ``max_bad_rows``: the
    share of rows that may be faulty, 0 to 1. ``dataset_num_proc``: processes that tokenise. ``implicit_prompt``: in pairs of whole
    texts, what both begin with is their prompt.
    """

    dataset: str
    dataset_probs: str | None = None
    split: str = DEFAULT_SPLIT
    max_samples: int = 100_000_000
    max_len: int = 2048
    input_key: str = "input"
    output_key: str | None = None
    prompt_key: str | None = None
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    label_key: str = "label"
    input_template: str | None = None
    apply_chat_template: bool = False
    multiturn: bool = False
    pretrain_mode: bool = False
    overlong: Overlong = Overlong.DROP
    placeholder_token: str = ""
    reward_tokens: tuple[str, ...] | None = None
    margin_loss: bool = False
    implicit_prompt: bool = False
    seed: int = 42
    max_bad_rows: float = 0.05
    dataset_num_proc: int | Literal["auto"] = AUTO

    @property
    def template(self) -> str | None:
        """The format string around prompts; None with a chat template, which replaces it."""
        return None if self.apply_chat_template else self.input_template

    def of_a_row(self) -> RecordSpec:
        """Only the settings that decide the result of a given row; the others are at their defaults."""
        others = ("dataset", "dataset_probs", "split", "max_samples", "seed", "max_bad_rows", "dataset_num_proc")
        defaults = asdict(RecordSpec(""))
        return replace(self, **{name: defaults[name] for name in others})


DECIMALS = 2


def with_reward(template: str, prompt: str, reward: float) -> str:
    """``template`` with {input} replaced by the prompt and {reward} by the reward with two decimals.

    Both are replaced at once, so braces in the prompt stay. Minus zero is written as zero.
    """
    assert math.isfinite(reward)
    shown = f"{reward:.{DECIMALS}f}"
    texts = {"{input}": prompt, "{reward}": shown.removeprefix("-") if float(shown) == 0 else shown}
    return re.sub(r"{input}|{reward}", lambda found: texts[found.group()], template)


def asked_reward(csft_prompt: str, template: str) -> float:
    """The reward in ``--csft_prompt``: a number alone, or a number in the words of the template.

    Raises DataError for other words, because the model was not trained on them.
    """
    words = re.escape(template.replace("{input}", "").strip()).replace(re.escape("{reward}"), "(?P<reward>.+?)")
    found = re.fullmatch(words, csft_prompt.strip())
    text = found["reward"] if found else csft_prompt
    try:
        reward = float(text)
    except ValueError:
        reward = math.nan
    if not math.isfinite(reward):
        raise DataError(
            f"--csft_prompt {csft_prompt!r} does not fit --reward_template {template!r}: give a number, or the template's "
            "words with a number in the place of {reward}."
        )
    return reward


Head = tuple[str, Sequence[str] | BadRow]

HEAD_ROWS = 16
PROBABILITY_TOLERANCE = 1e-3


def check_sources(
    text: str, required: Mapping[str, str], split: str = DEFAULT_SPLIT, *, every_row: bool = True
) -> None:
    """Call ``check_source`` for each entry of a comma-separated list."""
    for part in items.split_items(text):
        check_source(part, required, split, every_row=every_row)


def check_source(text: str, required: Mapping[str, str], split: str = DEFAULT_SPLIT, *, every_row: bool = True) -> None:
    """Raise DataError if the data set ``name[@data_dir]`` is missing, is empty or lacks a field. A hub name passes.

    ``required``: the field that each flag names, such as {"input_key": "question"}. ``every_row``: a single bad row
    among the first is an error; else all of them must be bad, and loading counts bad rows.
    """
    item = items.parse_item(text)
    if item.kind is Kind.HUB:
        return
    head = _head(item, split, tuple(required.values()))
    if not head:
        raise no_rows(item.text)
    bad = [f"{place} {row.reason}" for place, row in head if isinstance(row, BadRow)]
    rows = [(place, row) for place, row in head if not isinstance(row, BadRow)]
    if bad and (every_row or not rows):
        raise DataError(bad[0])
    for flag, key in required.items():
        lacking = [(place, fields) for place, fields in rows if key not in fields]
        if lacking and (every_row or len(lacking) == len(rows)):
            place, fields = lacking[0]
            raise DataError(at(place, missing_field(flag, key, fields)))


def missing_field(flag: str, key: str, fields: Iterable[str]) -> RowError:
    """The error for a missing field: names the existing fields, and suggests the nearest name for the flag."""
    names = list(fields)
    near = difflib.get_close_matches(key, names, n=1)
    way_out = f"did you mean --{flag} {shlex.quote(near[0])}?" if near else f"set --{flag} to one of these."
    return Drop.MISSING_FIELD.error(f"has no field {key!r}; it has {items.listed(names)}: {way_out}")


def parse_probs(text: str, sets: int, flag: str = "probs") -> list[float]:
    """Comma-separated positive probabilities, one per set, normalised to sum 1. Raises DataError that starts with ``flag``."""
    parts = text.split(",")
    if len(parts) != sets:
        raise DataError(f"{flag} {text} has {len(parts)} numbers for {sets} data sets: give one probability per set.")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        raise DataError(f"{flag} {text} must be comma-separated numbers, such as 0.7,0.3.") from None
    if not all(value > 0 for value in values):
        raise DataError(f"{flag} {text} must all be positive: leave out a set that is not to be used.")
    if abs(sum(values) - 1) > PROBABILITY_TOLERANCE:
        raise DataError(f"{flag} {text} sum to {sum(values):g}: make them sum to 1.")
    return [value / sum(values) for value in values]


def no_rows(name: str) -> DataError:
    return DataError(f"The data set {name} has no rows: check that it is the right file and was written completely.")


def _head(item: Item, split: str, required: Sequence[str]) -> list[Head]:
    """The field names of the first rows, each with its place; one entry for tables; empty if there is no row."""
    if item.kind is Kind.SAVED:
        return _table_head(item, _saved_fields(item.path, split))
    files = [item.path] if item.kind is Kind.FILE else items.split_files(item.path, split)
    return next((head for file in files if (head := _file_head(item, file, required))), [])


def _file_head(item: Item, path: Path, required: Sequence[str]) -> list[Head]:
    with guarded(path):
        items.check_content(path)
    if path.suffix.lower() in (".parquet", ".arrow"):
        return _table_head(item, [field.name for field in table_fields(path)])
    head = read_head(path, HEAD_ROWS, required)
    return [(place, row if isinstance(row, BadRow) else tuple(row)) for place, row in head]


def _table_head(item: Item, columns: Sequence[str]) -> list[Head]:
    items.check_names(item.text, columns)
    return [(f"Row 0 of {item.text}", columns)] if columns else []


def table_fields(path: Path) -> list[Any]:
    """The columns of a Parquet or Arrow file, each with ``name`` and ``type``; none if it has no row."""
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    try:
        if path.suffix.lower() == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                return list(file.schema_arrow) if file.metadata.num_rows > 0 else []
        with pyarrow.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                reader = batches = pyarrow.ipc.open_stream(source)
            has_rows = any(batch.num_rows > 0 for batch in batches)
            return list(reader.schema) if has_rows else []
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(path, error) from None


def _saved_fields(folder: Path, split: str) -> Sequence[str]:
    """The fields of a folder written by ``save_to_disk``: one folder per split, or the rows of a single one."""
    if (folder / "dataset_dict.json").is_file():
        names = _saved_list(folder / "dataset_dict.json", "splits")
        folder = items.choose_split(str(folder), {name: folder / name for name in names}, split)
    paths = [folder / file["filename"] for file in _saved_list(folder / "state.json", "_data_files")]
    return next(([field.name for field in fields] for path in paths if (fields := table_fields(path))), [])


def _saved_list(path: Path, key: str) -> list[Any]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path | str, error: BaseException) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"{path} cannot be read ({reason}): check that the file is complete and has the right extension.")
