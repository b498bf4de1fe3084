"""What keeps a program in bounds where the kernel's walls are not to be had: an audit hook of Python (PEP 578).

No sandbox, and nobody should take it for one: who finds a hole in the interpreter is out. It refuses network, other processes,
C functions, and writing outside a folder; a hook cannot be taken away again. Files can be read.
"""

from __future__ import annotations

import os
import sys
from typing import Any

REFUSED = (
    "socket.",
    "ctypes.",
    "subprocess.",
    "pty.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.kill",
    "signal.pthread_kill",
    "mmap.",
    "syslog.",
    "shutil.chown",
)
REFUSED_MODULES = ("ctypes", "_ctypes", "_socket", "_posixsubprocess", "mmap", "_testcapi", "_xxsubinterpreters")
CHANGING = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def install(folder: str) -> None:
    """Refuse from now on, with PermissionError. ``folder`` is the one place to write in."""
    inside = os.path.realpath(folder) + os.sep
    join, real = os.path.join, os.path.realpath  # bound here: the program may replace those of the module

    def is_inside(path: Any) -> bool:
        if isinstance(path, int):
            return True  # a file that is open already
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        return bool(text) and join(real(text), "").startswith(inside)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        refused = event.startswith(REFUSED) or (event == "import" and arguments[0] in REFUSED_MODULES)
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            refused = not is_inside(arguments[0])
        if event in CHANGING:
            paths = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
            refused = not all(map(is_inside, paths))
        if refused:
            raise PermissionError(f"{event} is not permitted here")

    sys.addaudithook(hook)
