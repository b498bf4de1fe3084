"""The first process of a sandbox, started by ``run`` with a job on a file descriptor: walls, limits, then the program.

    launcher          makes the namespaces and waits; exit status 0: the program ended by itself with status 0
      first process   of the namespaces: everything in them ends with it, and it with the launcher
        program       under limits and without rights

Without namespaces the launcher runs the program itself, behind ``guard``. Standard error is for the launcher alone: what is there
at the end says why the program was never run.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

from togi.reward.sandbox import calls, guard, namespaces

FAILED = 1


def main() -> None:
    """With namespaces it returns in the program's process only."""
    with os.fdopen(int(sys.argv[1])) as file:
        job = json.load(file)
    sys.path[:] = [path for path in sys.path if path != job["package_root"]]
    sys.argv[:] = ["answer.py"]
    program = role(job)
    if job["walls"]:
        try:
            namespaces.enter(job["limits"]["file_bytes"])
            become_the_program(job["limits"])
        except OSError as error:
            os.write(2, f"{error}\n".encode())
            os._exit(FAILED)
    silence()
    if not job["walls"]:
        limit(job["limits"])
        guard.install(os.getcwd())  # noqa: PTH109
    program()


def role(job: dict[str, Any]) -> Callable[[], None]:
    """What to do behind the walls. Everything from outside them is opened here."""
    if job["role"] == "program":
        return lambda: exec(compile(job["code"], "<answer>", "exec"), {"__name__": "__main__"})  # noqa: S102
    channel = calls.Channel.take()
    if job["role"] == "serve":
        return lambda: calls.serve(job["code"], channel)
    verdict = os.fdopen(job["verdict_fd"], "w")
    return lambda: calls.judge(job["setup"], job["tests"], channel, verdict)


def become_the_program(limits: dict[str, int]) -> None:
    """Fork twice; return in the last process only."""
    lifeline, held = os.pipe()
    launcher = os.getpid()
    first = os.fork()
    if first != 0:
        os.close(lifeline)
        os._exit(_ending_of(first))
    os.close(held)
    namespaces.die_with_parent(lifeline)
    program = os.fork()
    if program != 0:
        os._exit(_ending_of(program))
    os.close(lifeline)
    limit(limits)
    namespaces.renounce(launcher)


def _ending_of(child: int) -> int:
    return FAILED if os.waitpid(child, 0)[1] != 0 else 0


def silence() -> None:
    """Standard error to nowhere, in the program's process."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def limit(limits: dict[str, int]) -> None:
    """Limits of the kernel, which children inherit and nobody can raise."""
    wanted = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    for name, value in wanted.items():
        with contextlib.suppress(ValueError):  # lower already, or (macOS) not to be limited
            resource.setrlimit(name, (value, value))
