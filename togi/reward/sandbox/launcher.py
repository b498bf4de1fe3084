"""The first process of a sandbox, started by ``run`` with a job on a file descriptor: namespaces, limits, then the program.

    launcher          makes the namespaces and waits; exit status 0: the program ended by itself with status 0
      first process   of the namespaces: everything in them ends with it, and it ends with the launcher
        program       under limits and without rights

Without namespaces the launcher runs the program itself, behind a guard inside Python. Only the launcher writes to standard
error: text there says why the program was not run.
"""

import contextlib
import json
import os
import resource
import sys
from collections.abc import Callable

from togi.reward.sandbox import calls, walls

FAILED = 1


def main() -> None:
    """Enter the sandbox and run the job. With namespaces it continues in the program's process only."""
    with os.fdopen(int(sys.argv[1])) as file:
        job = json.load(file)
    # The answer must not import Togi, nor see how it was started.
    sys.path[:] = [path for path in sys.path if path != job["package_root"]]
    sys.argv[:] = ["answer.py"]
    # Descriptors of the outside are opened before the namespaces hide them.
    program = role(job)
    if job["walls"]:
        try:
            walls.enter(job["limits"]["file_bytes"])
            become_the_program(job["limits"])
        except OSError as error:
            os.write(2, f"{error}\n".encode())
            os._exit(FAILED)
    # Only now: errors of the setup go to standard error.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    if not job["walls"]:
        limit(job["limits"])
        walls.install(os.getcwd())  # noqa: PTH109
    program()


def role(job: calls.Message) -> Callable[[], None]:
    """The function to run inside. Opens everything that comes from outside."""
    if job["role"] == "program":
        return lambda: exec(compile(job["code"], "<answer>", "exec"), {"__name__": "__main__"})  # noqa: S102
    channel = calls.Channel.take()
    if job["role"] == "serve":
        return lambda: calls.serve(job["code"], channel)
    verdict = os.fdopen(job["verdict_fd"], "w")
    return lambda: calls.judge(job["setup"], job["tests"], channel, verdict)


def become_the_program(limits: dict[str, int]) -> None:
    """Fork twice and return in the last process only."""
    lifeline, held = os.pipe()
    launcher = os.getpid()
    first = os.fork()
    if first != 0:
        # The launcher waits, and its exit status is that of the program.
        os.close(lifeline)
        os._exit(_ending_of(first))
    # The first process of the namespace: the kernel kills the others when it ends.
    os.close(held)
    walls.die_with_parent(lifeline)
    program = os.fork()
    if program != 0:
        os._exit(_ending_of(program))
    # The program itself: under limits, then without rights.
    os.close(lifeline)
    limit(limits)
    walls.renounce(launcher)


def _ending_of(child: int) -> int:
    return FAILED if os.waitpid(child, 0)[1] != 0 else 0


def limit(limits: dict[str, int]) -> None:
    """Set kernel limits, which children inherit and cannot raise."""
    wanted = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    for name, value in wanted.items():
        with contextlib.suppress(ValueError):  # already lower, or (macOS) not supported
            resource.setrlimit(name, (value, value))
