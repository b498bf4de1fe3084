"""Walls around the current process, by the kernel (Linux 5.12 or later): namespaces, a file system of its own, no rights.

After ``enter`` and a fork the child is in a machine of its own. Network: none, not even this machine's. Files: the
standard library and the system's libraries to read, an empty /tmp in memory to write; no home folder, no /proc, no /etc.
Processes: only its own, which end with its first one. ``renounce`` drops the rights that building took; where root built, the
program also gets a user that owns nothing.

An ordinary user builds them in a user namespace, root does not need one. Not here: limits. Not
prevented: defects of the kernel, and on a virtual machine addresses of its host (AF_VSOCK), which no network namespace covers.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from pathlib import Path

NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
BIND, RECURSIVE, PRIVATE, NO_SUID, NO_DEVICES = 0x1000, 0x4000, 0x40000, 2, 4
SYS_MOUNT_SETATTR = 442  # one number on every architecture
THIS_FOLDER, AT_RECURSIVE, READ_ONLY = -100, 0x8000, 1
SET_PARENT_DEATH_SIGNAL, SET_NO_NEW_PRIVILEGES = 1, 38
CAPABILITY_VERSION = 0x20080522
NOBODY = 65534
USER_BASE = 1 << 30
"""Each sandbox of a root process gets a user of its own, so that the limit on processes counts only its own."""
ROOT = "/proc"
"""Where the new file system is built: a folder that is always there and that nothing inside may see."""
SYSTEM = ("/usr", "/lib", "/lib64", "/bin")
TMP = "/tmp"  # noqa: S108  one of its own, in memory
DEVICES = ("/dev/null", "/dev/urandom")


def enter(tmp_bytes: int) -> None:
    """Put this process's children behind the walls. Raises OSError where the machine does not permit it."""
    if platform.system() != "Linux":
        raise OSError("namespaces are a matter of Linux")
    walls = NEW_MOUNTS | NEW_IPC | NEW_PIDS | NEW_NETWORK
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _call("unshare", walls)
    else:
        _call("unshare", walls | NEW_USER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _call("mount", None, b"/", None, RECURSIVE | PRIVATE, None)
    _build(tmp_bytes)
    os.chroot(ROOT)
    os.chdir(TMP)


def _build(tmp_bytes: int) -> None:
    """A new root with what Python needs, all of it read-only but /tmp."""
    _mount("tmpfs", ROOT, b"mode=755")
    for path in (*SYSTEM, *dict.fromkeys((sys.base_prefix, sys.base_exec_prefix))):
        inside = Path(ROOT + path)
        if not Path(path).exists() or inside.exists():
            continue
        inside.parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_symlink():
            inside.symlink_to(Path(path).readlink())
        else:
            inside.mkdir()
            _call("mount", path.encode(), os.fsencode(inside), None, BIND | RECURSIVE, None)
    for folder in ("/dev", TMP):
        Path(ROOT + folder).mkdir()
    for path in DEVICES:
        Path(ROOT + path).touch()
        _call("mount", path.encode(), (ROOT + path).encode(), None, BIND, None)
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _call("syscall", SYS_MOUNT_SETATTR, THIS_FOLDER, ROOT.encode(), AT_RECURSIVE, ctypes.byref(attributes), size)
    _mount("tmpfs", ROOT + TMP, f"size={tmp_bytes},mode=1777".encode())


def die_with_parent(lifeline: int) -> None:
    """End this process, the first of its namespace, with the one that made it, and so everything in the namespace.

    ``lifeline``: the reading end of a pipe that the parent holds open, for the case that it is gone already.
    """
    _call("prctl", SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    os.set_blocking(lifeline, False)
    try:
        os.read(lifeline, 1)
    except BlockingIOError:
        return
    os._exit(1)


def renounce(launcher_pid: int) -> None:
    """Give up every right, for good, in the process that is to run the program."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        user = USER_BASE + launcher_pid
        os.setresuid(user, user, user)  # takes all capabilities away
    else:
        header, sets = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
        _call("capset", ctypes.byref(header), ctypes.byref(sets))
    _call("prctl", SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def _mount(kind: str, target: str, options: bytes) -> None:
    _call("mount", kind.encode(), target.encode(), kind.encode(), NO_SUID | NO_DEVICES, options)


def _call(function: str, *arguments: object) -> None:
    """A function of the C library. Raises OSError with its reason."""
    library = ctypes.CDLL(None, use_errno=True)
    if library[function](*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
