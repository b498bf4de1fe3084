"""A watchdog for hangs: when no heartbeat comes in time, the Python stacks of all threads go to a file.

It only writes: ending a stalled process is for its supervisor. ``faulthandler`` keeps one timer a process, so one
``Watchdog`` a process; its timer runs outside the interpreter and also fires while native code holds the lock.
"""

from __future__ import annotations

import faulthandler
from pathlib import Path
from types import TracebackType


class Watchdog:
    """Call ``beat`` at least every ``seconds`` between ``with`` and its end, or find the stacks in ``dump_path``."""

    def __init__(self, seconds: float, dump_path: Path) -> None:
        assert seconds > 0, f"a watchdog of {seconds} s"
        self._seconds = seconds
        self._file = dump_path.open("a", encoding="utf-8")

    def beat(self) -> None:
        faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file)

    def __enter__(self) -> Watchdog:
        self.beat()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
