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
AGAIN = 1.0  # between two looks at what is shared, unless memory grows


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
            most, looked = 0, 0.0
            while not finished.wait(INTERVAL):
                processes = family(process.pid)
                now, is_time = sum(map(resident, processes)), time.monotonic() - looked > AGAIN
                # dividing shared pages costs time; a process that forks looks twice its size, so that no maximum is the last word
                if now > most or (now > peak[0] and is_time):
                    most, peak[0] = max(most, now), max(peak[0], sum(map(proportional, processes)))
                    looked = time.monotonic()

        watcher = Thread(target=watch, daemon=True)
        watcher.start()
        code = process.wait()
        finished.set()
        watcher.join()
    if code != 0:
        raise RunFailed(f"{' '.join(command[:6])} ... failed, see {log}:\n{log.read_text()[-3000:]}")
    return Watched(started, peak[0] / 1e9)


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
