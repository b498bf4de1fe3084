"""Files that cannot be written, as one sentence; and what is done on the way out, which never hides why a run ends."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from togi.errors import WriteError

logger = logging.getLogger(__name__)

_ROOM = "make room there"
# What a disk, and not the program, refuses; and what to do.
_ADVICE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "give a folder that can be written to",
    errno.EIO: "check the disk",
}


@contextmanager
def way_out(what: str) -> Iterator[None]:
    """For what is done in ``finally``, ``except`` and ``__exit__``, such as "closing the trackers".

    Where an error is under way already, that it fails too is logged, so that the first error is the one that is shown.
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
    """For what a run can do without: that it fails is logged, and the run goes on."""
    try:
        yield
    except (OSError, WriteError) as error:
        logger.warning("%s failed, and the run goes on without it (%s)", what, " ".join(str(error).split()))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise WriteError naming ``path`` when the block cannot write."""
    try:
        yield
    except Exception as error:
        reason = disk_reason(error)
        is_of_a_file = isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError)
        if not reason and not is_of_a_file:
            raise
        reason = reason or getattr(error, "strerror", None) or str(error)
        raise WriteError(f"{path} cannot be written ({reason}): {advice(error)}.") from error


def disk_reason(error: BaseException) -> str:
    """Why a disk refused to take more, in the words of the system; "" for an error of another kind."""
    code = _code(error)
    return os.strerror(code) if code in _ADVICE else ""


def advice(error: BaseException) -> str:
    """What to do about an error in writing."""
    return _ADVICE.get(_code(error), "check the folder and its permissions")


def _code(error: BaseException) -> int:
    """The system's number of an error, 0 if it has none. Libraries written in Rust have it in their text only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0
