"""Runs a command and watches the memory of its whole process tree."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

PAGE = os.sysconf("SC_PAGE_SIZE")
INTERVAL = 0.25


class RunFailed(SystemExit):
    """A command ended with an error; the message has the end of what it printed."""


@dataclass(frozen=True, slots=True)
class Watched:
    """``started``: seconds since 1970. ``peak_gb``: the largest sum of resident sets that was seen, in 10^9 bytes."""

    started: float
    peak_gb: float


def run_watched(command: Sequence[str], environment: Mapping[str, str], cwd: Path, log: Path) -> Watched:
    """Run to the end; output goes to ``log``. Raises ``RunFailed`` if the command fails.

    A page that several processes share counts once in each, so that a side of many processes never looks smaller than it is.
    """
    peak, finished = [0], Event()
    with log.open("w") as sink:
        started = time.time()
        process = subprocess.Popen(command, env=environment, cwd=cwd, stdout=sink, stderr=subprocess.STDOUT)

        def watch() -> None:
            while not finished.wait(INTERVAL):
                peak[0] = max(peak[0], resident(process.pid))

        watcher = Thread(target=watch, daemon=True)
        watcher.start()
        code = process.wait()
        finished.set()
        watcher.join()
    if code != 0:
        raise RunFailed(f"{' '.join(command[:6])} ... failed, see {log}:\n{log.read_text()[-3000:]}")
    return Watched(started, peak[0] / 1e9)


def resident(root: int) -> int:
    """Bytes in memory of a process and all that descend from it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := read(entry / "stat")):
            parents[int(entry.name)] = int(fields.rpartition(")")[2].split()[1])
    family, grown = {root}, True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in family} - family
        family |= children
        grown = bool(children)
    return sum(int(fields.split()[1]) * PAGE for pid in family if (fields := read(Path(f"/proc/{pid}/statm"))))


def read(path: Path) -> str:
    """ "" for a process that has ended."""
    try:
        return path.read_text()
    except OSError:
        return ""
