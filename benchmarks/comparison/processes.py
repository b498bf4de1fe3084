"""Runs a command and watches the memory of its whole process tree."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import psutil

INTERVAL = 0.25
FAMILY = 1.0  # between two looks at which processes there are
AGAIN = 5.0  # at what they share


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

        watcher = Thread(target=watch, args=(process.pid, finished, peak), daemon=True)
        watcher.start()
        code = process.wait()
        finished.set()
        watcher.join()
    if code != 0:
        raise RunFailed(f"{' '.join(command[:6])} ... failed, see {log}:\n{log.read_text()[-3000:]}")
    return Watched(started, peak[0] / 1e9)


def watch(root: int, finished: Event, peak: list[int]) -> None:
    """Keep ``peak[0]`` up to date.

    Dividing shared pages among processes takes the machine 60 ms for a family of Ray's: on two cores that slows down what is
    measured. So it is done where memory could be a new peak, going by what the same processes shared at the last two looks (the
    lesser: a process that forks looks twice its size), and every few seconds.
    """
    shared, processes, found, looked = [0, 0], list[psutil.Process](), 0.0, 0.0
    while not finished.wait(INTERVAL):
        time_now = time.monotonic()
        if time_now - found > FAMILY:
            before, processes, found = processes, family(root), time_now
            shared = shared if processes == before else [0, 0]
        now = sum(map(resident, processes))
        if now - min(shared) > peak[0] or (now > peak[0] and time_now - looked > AGAIN):
            divided = sum(map(proportional, processes))
            shared, peak[0], looked = [shared[1], now - divided], max(peak[0], divided), time_now


def family(root: int) -> list[psutil.Process]:
    """A process and all that descend from it."""
    try:
        process = psutil.Process(root)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def resident(process: psutil.Process) -> int:
    """Bytes in memory, 0 if it has ended."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def proportional(process: psutil.Process) -> int:
    """``resident``, but a page that several processes share is divided among them (Pss)."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0
