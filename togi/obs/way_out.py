"""Write errors as one sentence, files that are replaced whole, and cleanup that never hides why a run ends."""

import errno
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from togi.errors import WriteError

logger = logging.getLogger(__name__)

_ROOM = "make room there"
# Errors of the disk, not of the program, and the remedy.
_ADVICE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "give a folder that can be written to",
    errno.EIO: "check the disk",
}


@contextmanager
def way_out(what: str) -> Iterator[None]:
    """For cleanup in ``finally``, ``except`` and ``__exit__``; ``what`` is such as "closing the trackers".

    If an error is being raised already, a failure of the cleanup is only logged, so that the first error is the one shown.
    """
    first = sys.exception()
    try:
        yield
    except Exception as error:
        if first is None:
            raise
        logger.warning("%s failed as well (%s)", what, " ".join(str(error).split()) or type(error).__name__)


@contextmanager
def tolerated(what: str) -> Iterator[None]:
    """For work that a run can do without: a failure with files or their content is logged, and the run continues."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, WriteError) as error:
        logger.warning("%s failed, and the run goes on without it (%s)", what, " ".join(str(error).split()))


@contextmanager
def left_out(path: Path) -> Iterator[None]:
    """For a file that a reader can do without: one that is broken is logged and left out."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read and is left out (%s)", path, error)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise WriteError naming ``path`` if the block cannot write."""
    try:
        yield
    except Exception as error:
        reason = disk_reason(error)
        # Network errors are OSErrors too, but no fault of the file.
        is_of_a_file = isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError)
        if not reason and not is_of_a_file:
            raise
        reason = reason or getattr(error, "strerror", None) or str(error)
        raise WriteError(f"{path} cannot be written ({reason}): {advice(error)}.") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, which takes its place at the end; nothing stays of it after an OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        aside.replace(path)
    except OSError:
        with suppress(OSError):  # the folder may not exist
            aside.unlink()
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write aside, then rename: a reader sees the old text or the new one, never a part. Raises WriteError."""
    with writing(path), replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def disk_reason(error: BaseException) -> str:
    """The system's message if the disk refused to write; "" for other errors."""
    code = _code(error)
    return os.strerror(code) if code in _ADVICE else ""


def advice(error: BaseException) -> str:
    """The remedy for a write error."""
    return _ADVICE.get(_code(error), "check the folder and its permissions")


def _code(error: BaseException) -> int:
    """The errno of an error, 0 if it has none. Libraries in Rust have it in their text only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0
