"""A JSONL file whose rows are written in any order, which survives a kill and ends in order.

Until it is complete, ``<path>.partial`` holds everything: a first line that identifies the work, then one line per finished unit
(a prompt with all its outputs, a row with its score), in the order in which they finished. The file itself is written at the
end, whole.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Self

from togi.data.tables import Row
from togi.errors import CheckpointError
from togi.obs.way_out import way_out, writing

PARTIAL = ".partial"


class RowLog:
    """A log of finished units, as a context manager. ``identity``: everything that the rows depend on."""

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        self.path = path
        self.done: dict[int, list[Row]] = {}
        self._partial = path.with_name(path.name + PARTIAL)
        self._identity = dict(identity)

    def __enter__(self) -> Self:
        """Read what an earlier attempt left. Raises CheckpointError if that was other work, or if another process writes here."""
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._partial.touch()
        self._file = self._partial.open("r+b")
        try:
            # Held until the file is closed, also by a kill.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            kept = self._read()
            self._file.truncate(kept)  # drops a line that a kill left incomplete
            self._file.seek(kept)
            if kept == 0:
                self._write(self._identity)
        except BlockingIOError:
            self._file.close()
            raise CheckpointError(
                f"Another process is writing {self._partial}: wait until it has ended, or choose another --output_path."
            ) from None
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with way_out(f"closing {self._partial}"), writing(self._partial):
            self._file.close()

    def add(self, unit: int, rows: Sequence[Row]) -> None:
        """Write a finished unit. It is handed to the operating system when this returns."""
        assert unit not in self.done
        self.done[unit] = list(rows)
        self._write({"unit": unit, "rows": self.done[unit]})

    def finish(self, rows: Iterable[Row]) -> None:
        """Write the final file and remove the partial one."""
        write_rows(self.path, rows)
        self._file.close()
        self._partial.unlink()

    def in_order(self) -> list[Row]:
        """The rows of all finished units, ordered by unit."""
        return [row for unit in sorted(self.done) for row in self.done[unit]]

    def _write(self, record: Row) -> None:
        with writing(self._partial):
            self._file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
            self._file.flush()

    def _read(self) -> int:
        """Fill ``done``. Returns the number of bytes of complete lines."""
        kept = 0
        with self._partial.open("rb") as lines:
            for line in takewhile(lambda line: line.endswith(b"\n"), lines):
                record = json.loads(line.decode("utf-8", "surrogatepass"))
                if kept == 0:
                    self._check(record)
                else:
                    self.done[record["unit"]] = record["rows"]
                kept += len(line)
        return kept

    def _check(self, before: Mapping[str, str]) -> None:
        names = {**before, **self._identity}
        different = [name for name in names if before.get(name) != self._identity.get(name)]
        if different:
            name = different[0]
            raise CheckpointError(
                f"{self._partial} holds the unfinished work of another command ({name} was {before.get(name)}, is "
                f"{self._identity.get(name)}): finish that one, or remove the file."
            )


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a JSONL file aside and rename it. Raises WriteError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            with aside.open("w", encoding="utf-8", errors="surrogatepass") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def digest(content: bytes) -> str:
    """What stands for the content of a file or of rows in the record of a run that may be resumed."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
