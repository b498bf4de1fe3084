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
    """``started``: seconds since 1970. ``peak_gb``: the most memory of all processes together that was seen, in 10^9 bytes."""

    started: float
    peak_gb: float


def run_watched(command: Sequence[str], environment: Mapping[str, str], cwd: Path, log: Path) -> Watched:
    """Run to the end; output goes to ``log``. Raises ``RunFailed`` if the command fails."""
    peak, finished = [0], Event()
    with log.open("w") as sink:
        started = time.time()
        process = subprocess.Popen(command, env=environment, cwd=cwd, stdout=sink, stderr=subprocess.STDOUT)

        def watch() -> None:
            most = 0
            while not finished.wait(INTERVAL):
                pids = family(process.pid)
                if (now := sum(map(resident, pids))) > most:  # the walk that divides shared pages costs time: only then
                    most, peak[0] = now, max(peak[0], sum(map(proportional, pids)))

        watcher = Thread(target=watch, daemon=True)
        watcher.start()
        code = process.wait()
        finished.set()
        watcher.join()
    if code != 0:
        raise RunFailed(f"{' '.join(command[:6])} ... failed, see {log}:\n{log.read_text()[-3000:]}")
    return Watched(started, peak[0] / 1e9)


def family(root: int) -> set[int]:
    """A process and all that descend from it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := read(entry / "stat")):
            parents[int(entry.name)] = int(fields.rpartition(")")[2].split()[1])
    found, grown = {root}, True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in found} - found
        found |= children
        grown = bool(children)
    return found


def resident(pid: int) -> int:
    """Bytes in memory of one process, 0 if it has ended."""
    fields = read(Path(f"/proc/{pid}/statm"))
    return int(fields.split()[1]) * PAGE if fields else 0


def proportional(pid: int) -> int:
    """``resident``, but a page that several processes share is divided among them (Pss)."""
    for line in read(Path(f"/proc/{pid}/smaps_rollup")).splitlines():
        name, _, rest = line.partition(":")
        if name == "Pss":
            return 1024 * int(rest.split()[0])
    return 0


def read(path: Path) -> str:
    """ "" for a process that has ended."""
    try:
        return path.read_text()
    except OSError:
        return ""
