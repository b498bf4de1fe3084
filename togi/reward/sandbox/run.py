"""Starts sandboxes and returns their results. Standard library only: runs in the reward's worker process.

``walls`` says what a program may do behind namespaces, or a guard where the machine does not permit them
(``walls_are_to_be_had``). In both cases the program gets no environment variables, and kernel limits on processor time, memory,
files and processes. The wall clock is enforced here. A sandbox stays in the worker's process group, so it ends with the worker.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

PACKAGE_ROOT = str(Path(__file__).parents[3])
START = "import sys; sys.path.insert(0, {!r}); from togi.reward.sandbox.launcher import main; main()"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one program. ``wall_seconds``: for all its cases together; the others per process, ``processes`` at most.

    ``file_bytes``: for its output, each file, and its whole /tmp.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 10.0
    memory_bytes: int = 1 << 29
    file_bytes: int = 16 << 20
    processes: int = 8
    open_files: int = 64


class SandboxError(OSError):
    """A sandbox could not be set up and the program was not run. May be transient."""


@lru_cache(maxsize=1)
def walls_are_to_be_had() -> bool:
    """Whether this machine permits namespaces: tried once, with an empty program."""
    try:
        return run_program("", "", Limits(), time.monotonic() + 30, walls=True).ended_well
    except SandboxError:
        return False


@dataclass(frozen=True, slots=True)
class Ended:
    """A program's output, and whether it ended by itself with exit status 0 and in time."""

    output: str
    ended_well: bool


def run_program(code: str, stdin: str, limits: Limits, deadline: float, *, walls: bool) -> Ended:
    """Run a program with a text as standard input. ``deadline``: on the monotonic clock. Raises SandboxError."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as printed:
        given.write(stdin.encode())
        given.seek(0)
        with _started({"role": "program", "code": code}, limits, given, printed, walls=walls) as process:
            ended_well = _wait(process, deadline) == 0
        printed.seek(0)
        return Ended(printed.read(limits.file_bytes).decode(errors="replace"), ended_well)


def run_tests(code: str, setup: str, tests: Sequence[str], limits: Limits, deadline: float, *, walls: bool) -> str:
    """Returns one character per test (``calls``), none for tests that were not reached. Code and tests have separate sandboxes."""
    # Two pipes connect tests and code; a file takes the verdict, which the code never sees.
    to_code, from_judge = os.pipe()
    to_judge, from_code = os.pipe()
    with contextlib.ExitStack() as stack:
        ours = [
            stack.enter_context(os.fdopen(fd, "rb" if fd in (to_code, to_judge) else "wb"))
            for fd in (to_code, from_judge, to_judge, from_code)
        ]
        verdict = stack.enter_context(tempfile.TemporaryFile())
        job = {"role": "judge", "setup": setup, "tests": list(tests), "verdict_fd": verdict.fileno()}
        fds = (verdict.fileno(),)
        judge = stack.enter_context(_started(job, limits, ours[2], ours[1], walls=walls, pass_fds=fds))
        tested = stack.enter_context(_started({"role": "serve", "code": code}, limits, ours[0], ours[3], walls=walls))
        for end in ours:
            end.close()  # otherwise neither side would see that the other has ended
        if _wait(judge, deadline) is not None:
            _wait(tested, time.monotonic() + 1)  # raises if it was never started
        verdict.seek(0)
        return verdict.read().decode()


@contextlib.contextmanager
def _started(
    job: dict[str, object],
    limits: Limits,
    stdin: IO[bytes],
    stdout: IO[bytes],
    *,
    walls: bool,
    pass_fds: tuple[int, ...] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher with a job; at the end it is killed and reaped with everything that it started."""
    with tempfile.TemporaryDirectory(prefix="togi-sandbox-") as folder, tempfile.TemporaryFile() as file:
        record = {**job, "limits": asdict(limits), "walls": walls, "package_root": PACKAGE_ROOT}
        file.write(json.dumps(record).encode())
        file.seek(0)
        command = [sys.executable, "-I", "-S", "-B", "-c", START.format(PACKAGE_ROOT), str(file.fileno())]
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE if walls else subprocess.DEVNULL,
            cwd=folder,
            env=ENVIRONMENT,
            pass_fds=(file.fileno(), *pass_fds),
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()


def _wait(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    """The exit status; None after the deadline. Raises SandboxError if the program was not run."""
    try:
        status = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    reason = b"" if process.stderr is None else process.stderr.read()
    if reason:
        raise SandboxError(reason.decode(errors="replace").strip())
    return status
