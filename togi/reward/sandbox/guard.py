"""Restricts a program where the kernel's namespaces are not available, by an audit hook of Python (PEP 578).

This is not a sandbox: a hole in the interpreter escapes it. The hook refuses network, other processes, C functions and writing
outside a folder, and cannot be removed again. Files can be read.
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
    """Refuse from now on with PermissionError. ``folder``: the only place that can be written."""
    inside = os.path.realpath(folder) + os.sep
    join, real = os.path.join, os.path.realpath  # bound here: the program may replace those of the module

    def is_inside(path: Any) -> bool:
        if isinstance(path, int):
            return True  # a file descriptor that is already open
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
