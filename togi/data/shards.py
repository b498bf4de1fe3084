"""Tokenised rows as arrays: a ``Shard`` is one memory-mapped file; a ``Table`` is all rows of one data set.

Shape letters: N rows, S sequences (one or two per used row, none for others), T tokens, R trained parts, L lengths (one per
sequence that was tokenised). Files are safetensors; ``Entry`` knows which files exist and whether they are intact.

The cache has a folder for each data set and way of reading it, a file for each shard. The folder name is a digest of everything
that the result depends on: rows, settings, tokenizer and ``FORMAT``. The file name has a digest of the file's bytes. Files are
written aside and renamed, so a killed run leaves whole shards, and a damaged file counts as missing. Above MAX_BYTES in total,
the folders that were unused for longest are removed.

The rows of one data set as a ``Table``: cached shards, and the missing ones, made in one process or several.

Processes are started as ``python -m togi.data.shards`` with the job in a file: that needs nothing of the main module, and no
state of this process (threads, devices, process groups) is inherited.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from togi.data.chat import Tokenizer, tokenizer_digest
from togi.data.encode import Outcome, encode_rows
from togi.data.faults import FAULTS, SHOWN_FAULTS, Drop, Note
from togi.data.rows import RowReader
from togi.data.source import Rows
from togi.data.turns import Coded
from togi.errors import DataError, RunError
from togi.obs.way_out import advice, disk_reason
from togi.plan import machine

# Raise it when the same rows and settings give other samples than before, or when the file format changes.
FORMAT = 3
MAX_BYTES = 20 * 2**30
LEFT_OVER_SECONDS = 3600
ASIDE = ".part"


def cache_folder() -> Path:
    """``$TOGI_CACHE/data``, by default ``~/.cache/togi/data``."""
    return machine.cache_folder() / "data"


@dataclass(frozen=True, slots=True)
class Entry:
    """The cached shards of one data set, read in one way."""

    folder: Path

    @classmethod
    def of(cls, rows: str, reader: RowReader, tokenizer: Tokenizer) -> Entry:
        """The entry for rows with this digest."""
        text = f"{FORMAT}\n{rows}\n{reader!r}\n{tokenizer_digest(tokenizer)}"
        return cls(cache_folder() / hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest())

    def find(self, part: range) -> Shard | None:
        """The shard of these rows; None if there is none that can be read. A damaged file is removed."""
        try:
            paths = list(self.folder.glob(f"{_name(part)}.*.safetensors"))
        except OSError:  # a folder of another user
            return None
        for path in paths:
            try:
                if path.name.split(".")[1] == _digest(path):
                    # The time of the folder tells how long it is unused. A shared or read-only one keeps its time.
                    with contextlib.suppress(OSError):
                        os.utime(self.folder)
                    return Shard(path)
                path.unlink()
            except OSError:  # another run is removing it, or it is another user's
                continue
        return None

    def write(self, part: range, outcomes: Sequence[Outcome]) -> None:
        """Write the outcomes of these rows. Raises DataError if nothing can be written."""
        # A name per process: several runs may fill the same entry.
        aside = self.folder / f"{_name(part)}.{os.getpid()}{ASIDE}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_shard(aside, outcomes)
            aside.rename(self.folder / f"{_name(part)}.{_digest(aside)}.safetensors")
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"Tokenised rows cannot be kept in {self.folder} ({disk_reason(error) or error}): {advice(error)}, or set "
                "TOGI_CACHE to another folder."
            ) from None
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()


def remove_oldest(*, keep: Path) -> None:
    """Remove the folders that are unused for longest, except ``keep``, until the total is at most MAX_BYTES."""
    # First the files that killed runs left unfinished.
    for aside in cache_folder().glob(f"*/*{ASIDE}"):
        with contextlib.suppress(OSError):  # gone, or another user's, as below
            if time.time() - aside.stat().st_mtime > LEFT_OVER_SECONDS:
                aside.unlink()
    ages: list[tuple[float, int, Path]] = []
    for folder in cache_folder().iterdir():
        with contextlib.suppress(OSError):
            size = sum(file.stat().st_size for file in folder.iterdir())
            ages.append((folder.stat().st_mtime, size, folder))
    total = sum(size for _, size, _ in ages)
    for _, size, folder in sorted(ages):
        if total > MAX_BYTES and folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
            total -= size


def _name(part: range) -> str:
    return f"{part.start:09d}-{part.stop:09d}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


# Reasons are stored by their index; 0 is "used".
REASONS: tuple[Drop | None, ...] = (None, *Drop)
# Notes are stored as bits.
NOTES: tuple[Note, ...] = tuple(Note)
FAULT_CODES = np.array([code for code, reason in enumerate(REASONS) if reason in FAULTS], dtype=np.uint8)

_TYPES = {"I32": np.int32, "F64": np.float64, "U8": np.uint8, "BOOL": np.bool_}
_PER_SAMPLE = ("tokens_T", "token_counts_S", "prompt_lengths_S", "run_counts_S", "runs_R", "labels_R", "values_S")


def write_shard(path: Path, rows: Sequence[Outcome]) -> None:
    """Write a shard. Keeps the first SHOWN_FAULTS faults in words, and the reason of each. Sequences must have the same values."""
    coded = [sequence for outcome in rows for sequence in outcome.coded]
    names = sorted(coded[0].values) if coded else []
    assert all(sorted(sequence.values) == names for sequence in coded), "sequences with different values"
    faults = [(i, outcome.fault) for i, outcome in enumerate(rows) if outcome.fault]
    values = [sequence.values[name] for sequence in coded for name in names]
    runs = [run for sequence in coded for run in sequence.runs]
    arrays = {
        "drops_N": np.array([REASONS.index(outcome.drop) for outcome in rows], dtype=np.uint8),
        "cut_N": np.array([outcome.was_cut for outcome in rows], dtype=np.bool_),
        "notes_N": np.array([sum(1 << NOTES.index(each) for each in outcome.notes) for outcome in rows], np.int32),
        "widths_N": np.array([len(outcome.coded) for outcome in rows], dtype=np.uint8),
        "lengths_L": np.array([*chain.from_iterable(outcome.lengths for outcome in rows)], dtype=np.int32),
        "tokens_T": np.concatenate([np.empty(0, np.int32), *(sequence.tokens for sequence in coded)]),
        "token_counts_S": np.array([len(sequence.tokens) for sequence in coded], dtype=np.int32),
        "prompt_lengths_S": np.array([sequence.prompt_length for sequence in coded], dtype=np.int32),
        "merged_S": np.array([sequence.merged for sequence in coded], dtype=np.bool_),
        "run_counts_S": np.array([len(sequence.runs) for sequence in coded], dtype=np.int32),
        "runs_R": np.array(runs, dtype=np.int32).reshape(-1, 2),
        "labels_R": np.array([label for sequence in coded for label in sequence.labels], dtype=np.float64),
        "values_S": np.array(values, dtype=np.float64).reshape(len(coded), len(names)),
    }
    # A single entry only: safetensors writes several in any order, but equal shards must be equal files.
    words = {"names": names, "faults": faults[:SHOWN_FAULTS]}
    save_file(arrays, path, metadata={"words": json.dumps(words)})


class Shard:
    """The rows of one file. Tokens stay on disk until they are used."""

    def __init__(self, path: Path) -> None:
        # The header of safetensors: its size in 8 bytes, then JSON. The arrays behind it are memory-mapped.
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + size)
        words = json.loads(header.pop("__metadata__")["words"])
        self._arrays: dict[str, NDArray[Any]] = {
            name: np.asarray(data[slice(*place["data_offsets"])]).view(_TYPES[place["dtype"]]).reshape(place["shape"])
            for name, place in header.items()
        }
        self._names: list[str] = words["names"]
        self.faults: list[tuple[int, str]] = words["faults"]
        # Ends of each row, sequence and run, to slice the flat arrays.
        self._sequence_ends = np.cumsum(self._arrays["widths_N"], dtype=np.int64)
        self._token_ends = np.cumsum(self._arrays["token_counts_S"], dtype=np.int64)
        self._run_ends = np.cumsum(self._arrays["run_counts_S"], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._sequence_ends)

    def last_tokens(self) -> set[int]:
        """The last tokens of the trained parts."""
        starts_S = self._token_ends - self._arrays["token_counts_S"]
        starts_R = np.repeat(starts_S, self._arrays["run_counts_S"])
        lasts_R = starts_R + np.maximum(self._arrays["runs_R"][:, 1], 1) - 1
        return set(np.unique(self._arrays["tokens_T"][lasts_R]).tolist())

    def coded(self, row: int) -> tuple[Coded, ...]:
        """The sequences of a row."""
        return tuple(self._sequence(i) for i in range(*_span(self._sequence_ends, row)))

    def content(self, name: str) -> NDArray[Any]:
        """One of the arrays that samples are made of."""
        return self._arrays[name]

    def _sequence(self, i: int) -> Coded:
        first, end = _span(self._run_ends, i)
        runs = tuple((start, stop) for start, stop in self._arrays["runs_R"][first:end].tolist())
        return Coded(
            self._arrays["tokens_T"][slice(*_span(self._token_ends, i))],
            runs,
            int(self._arrays["prompt_lengths_S"][i]),
            bool(self._arrays["merged_S"][i]),
            tuple(self._arrays["labels_R"][first:end].tolist()),
            dict(zip(self._names, self._arrays["values_S"][i].tolist(), strict=True)),
        )


class Table:
    """All used rows of several data sets, as consecutive shards. ``starts``: the first row of each set, and the end.

    ``widths_N``, ``sizes_N``: sequences of each row, and their tokens.

    ``merged_N``: whether a token of the row holds the end of its prompt and the start of its answer. ``learned_S``,
    ``prompt_lengths_S``: the number of trained tokens of each sequence, and of those before the first of them.
    """

    def __init__(self, *sets: Sequence[Shard]) -> None:
        self._shards = tuple(chain.from_iterable(sets))
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self.starts = np.cumsum([0, *(sum(map(len, shards)) for shards in sets)])
        self.drops_N, self.notes_N, self.lengths_L = map(self._joined, ("drops_N", "notes_N", "lengths_L"))
        self.widths_N, self.prompt_lengths_S, token_counts_S, run_counts_S = (
            self._joined(name).astype(np.int64)
            for name in ("widths_N", "prompt_lengths_S", "token_counts_S", "run_counts_S")
        )
        self.cut = int(self._joined("cut_N").sum())
        rows_S = np.repeat(np.arange(len(self)), self.widths_N)
        self.sizes_N = np.bincount(rows_S, token_counts_S, minlength=len(self)).astype(np.int64)
        self.merged_N = np.bincount(rows_S[self._joined("merged_S")], minlength=len(self)) > 0
        # The first token of a sequence never counts.
        starts_R, ends_R = self._joined("runs_R").T.astype(np.int64)
        sequences_R = np.repeat(np.arange(len(rows_S)), run_counts_S)
        learned_S = np.bincount(sequences_R, ends_R - np.maximum(starts_R, 1), minlength=len(rows_S))
        self.learned_S = learned_S.astype(np.int64)

    def __len__(self) -> int:
        return len(self.drops_N)

    def rows(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows at these places (source, row, repeat)."""
        return self.starts[places[:, 0]] + places[:, 1]

    def _joined(self, name: str) -> NDArray[Any]:
        return np.concatenate([shard.content(name) for shard in self._shards])

    def last_tokens(self) -> set[int]:
        """The last tokens of the trained parts."""
        return set[int]().union(*(shard.last_tokens() for shard in self._shards))

    def largest_token(self) -> int:
        """The largest token id of all rows; -1 if there is none."""
        return max(int(shard.content("tokens_T").max(initial=-1)) for shard in self._shards)

    def faults(self) -> list[tuple[int, str]]:
        """The first SHOWN_FAULTS faulty rows, and what is wrong with each, to be printed after its place."""
        starts = (self._ends - [len(shard) for shard in self._shards]).tolist()
        parts = zip(starts, self._shards, strict=True)
        return [(start + row, text) for start, shard in parts for row, text in shard.faults][:SHOWN_FAULTS]

    def notes(self) -> Counter[Note]:
        """How many rows have each note."""
        return Counter({note: int((self.notes_N >> bit & 1).sum()) for bit, note in enumerate(NOTES)})

    def coded(self, row: int) -> tuple[Coded, ...]:
        """The sequences of a row; empty if it is not used."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return self._shards[shard].coded(row - int(self._ends[shard]) + len(self._shards[shard]))

    def content(self) -> Iterable[bytes]:
        """Everything that samples are made of, in an order that does not depend on the division into shards."""
        for name in _PER_SAMPLE:
            yield name.encode()
            for shard in self._shards:
                yield shard.content(name).tobytes()


def _span(ends: NDArray[np.int64], i: int) -> tuple[int, int]:
    return (int(ends[i - 1]) if i > 0 else 0), int(ends[i])


SHARD_ROWS = 4096
MOST_SHARDS = 256
# Below this, starting processes takes longer than tokenising.
PARALLEL_ROWS = 20_000


@dataclass(frozen=True, slots=True)
class Job:
    """Everything needed to make any shard of a data set."""

    rows: Rows
    reader: RowReader
    tokenizer: Tokenizer
    entry: Entry

    def make(self, part: range) -> None:
        """Tokenise these rows and write their shard."""
        self.entry.write(part, list(encode_rows(self.rows, part, self.reader, self.tokenizer)))


def encoded(
    rows: Rows, used: range, reader: RowReader, tokenizer: Tokenizer, processes: int | Literal["auto"]
) -> list[Shard]:
    """The shards of the used rows, made by at most ``processes`` processes. Raises DataError for what is not the fault of one."""
    job = Job(rows, reader, tokenizer, Entry.of(rows.digest(), reader, tokenizer))
    # Stage 1: which shards are in the cache?
    found = {part: job.entry.find(part) for part in shard_ranges(used)}
    missing = [part for part, shard in found.items() if shard is None]
    # Stage 2: make the others.
    if missing:
        if (number := _number_of_processes(missing, processes, tokenizer)) > 1:
            _make_in_processes(job, missing, number)
        else:
            for part in missing:
                job.make(part)
        remove_oldest(keep=job.entry.folder)
    # Stage 3: open all of them.
    shards = [job.entry.find(part) if shard is None else shard for part, shard in found.items()]
    made = [shard for shard in shards if shard is not None]
    if len(made) < len(shards):
        raise RunError(f"Tokenised rows vanished from {job.entry.folder}: is another program removing its files?")
    return made


def shard_ranges(used: range) -> list[range]:
    """The rows of each shard: SHARD_ROWS, or more if there would be more than MOST_SHARDS files to hold open."""
    size = max(SHARD_ROWS, -(-len(used) // MOST_SHARDS))
    return [used[start : start + size] for start in range(0, len(used), size)]


def _number_of_processes(missing: Sequence[range], asked: int | Literal["auto"], tokenizer: Tokenizer) -> int:
    if not type(tokenizer).__module__.startswith("transformers."):
        return 1  # its class came with the model's files, so other processes cannot unpickle it
    if asked == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        asked = cores if sum(len(part) for part in missing) >= PARALLEL_ROWS else 1
    return min(asked, len(missing))


def _make_in_processes(job: Job, missing: Sequence[range], processes: int) -> None:
    """Dispatch the shards to processes in turn. Raises the error of the first that failed."""
    # Children import what this process imports, and do not add threads to their processes.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryDirectory(prefix="togi-data-") as folder:
        file = Path(folder) / "job"
        file.write_bytes(pickle.dumps(job))
        children = []
        try:
            for number in range(processes):
                parts = [f"{part.start}:{part.stop}" for part in missing[number::processes]]
                words = [sys.executable, "-m", "togi.data.shards", str(file), *parts]
                children.append(subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL))
            for child in children:
                child.wait()
        # On an interrupt too: no child goes on alone.
        finally:
            for child in children:
                child.kill()
                child.wait()
        for child in children:
            if (complaint := _complaint(file, child.pid)).is_file():
                raise DataError(complaint.read_text(encoding="utf-8"))
            if child.returncode != 0:
                raise RunError(f"A process that tokenises rows ended with status {child.returncode}; see its output.")


def _complaint(file: Path, pid: int) -> Path:
    """The file in which a process reports a fault of the data."""
    return file.with_name(f"complaint.{pid}")


def _work(file: Path, parts: Sequence[str]) -> None:
    """Make these shards, unless the parent process is gone; a DataError is written to the file ``_complaint``."""
    parent = os.getppid()
    job: Job = pickle.loads(file.read_bytes())  # noqa: S301  of the process that started this one
    try:
        for part in parts:
            start, stop = map(int, part.split(":"))
            if os.getppid() == parent:
                job.make(range(start, stop))
    except DataError as error:
        _complaint(file, os.getpid()).write_text(str(error), encoding="utf-8")


if __name__ == "__main__":
    _work(Path(sys.argv[1]), sys.argv[2:])
