"""The rows of one data set as a ``Table``: cached shards, and the missing ones, made in one process or several.

Processes are started as ``python -m togi.data.prepare`` with the job in a file: that needs nothing of the main module, and no
state of this process (threads, devices, process groups) is inherited.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from togi.data.cache import Entry, remove_oldest
from togi.data.chat import Tokenizer
from togi.data.encode import RowReader, encode_rows
from togi.data.shards import Table
from togi.data.source import Rows
from togi.errors import DataError, RunError

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
) -> Table:
    """The used rows, tokenised by at most ``processes`` processes. Raises DataError for what is not the fault of one row."""
    job = Job(rows, reader, tokenizer, Entry.of(rows.digest(), reader, tokenizer))
    # Stage 1: which shards are in the cache?
    found = {part: job.entry.find(part) for part in shard_ranges(used)}
    missing = [part for part, shard in found.items() if shard is None]
    # Stage 2: make the others.
    if missing:
        number = _number_of_processes(missing, processes, tokenizer)
        if number > 1:
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
    return Table(made)


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
                words = [sys.executable, "-m", "togi.data.prepare", str(file), *parts]
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
