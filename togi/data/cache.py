"""The cache of tokenised rows: a folder for each data set and way of reading it, a file for each shard.

The folder name is a digest of everything that the result depends on: rows, settings, tokenizer and ``FORMAT``. The file name has
a digest of the file's bytes. Files are written aside and renamed, so a killed run leaves whole shards, and a damaged file counts
as missing. Above MAX_BYTES in total, the folders that were unused for longest are removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from togi.data.chat import Tokenizer, tokenizer_digest
from togi.data.encode import Outcome, RowReader
from togi.data.shards import Shard, write_shard
from togi.errors import DataError
from togi.obs.way_out import advice, disk_reason
from togi.plan import machine

# Raise it when the same rows and settings give other samples than before, or when the file format changes.
FORMAT = 2
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
        """The shard of these rows; None if there is none. A damaged file is removed."""
        for path in self.folder.glob(f"{_name(part)}.*.safetensors"):
            try:
                if path.name.split(".")[1] == _digest(path):
                    # The time of the folder tells how long it is unused.
                    os.utime(self.folder)
                    return Shard(path)
                path.unlink()
            except FileNotFoundError:  # another run is removing it
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
        except Exception as error:
            if not isinstance(error, OSError) and not disk_reason(error):
                raise
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
        with contextlib.suppress(FileNotFoundError):
            if time.time() - aside.stat().st_mtime > LEFT_OVER_SECONDS:
                aside.unlink()
    ages: list[tuple[float, int, Path]] = []
    for folder in cache_folder().iterdir():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
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
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
