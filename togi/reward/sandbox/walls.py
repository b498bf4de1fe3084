"""What a program under test may do: the kernel's namespaces, or a guard inside Python where they are not available.

The guard (``install``) is an audit hook of Python (PEP 578). It is not a sandbox: a hole in the interpreter escapes it. The
hook refuses network, other processes, C functions and writing outside a folder, and cannot be removed again. Files can be read.

Namespaces (Linux 5.12 or later) give the process its own file system and no rights. After ``enter`` and a fork the child is
isolated. Network: none, not even this machine's. Files: the standard library and the system's libraries, read-only; an empty
writable /tmp in memory; no home folder, no /proc, no /etc. Processes: only its own, which end with its first one. ``renounce``
drops the rights that the setup needed; if root did it, the program also gets a user that owns nothing.

An ordinary user needs a user namespace, root does not. Limits are elsewhere. Not prevented: kernel bugs, and on a virtual machine
addresses of its host (AF_VSOCK), which no network namespace covers.
"""

import ctypes
import os
import platform
import signal
import sys
from pathlib import Path

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

    def is_inside(path: object) -> bool:
        if isinstance(path, int):
            return True  # a file descriptor that is already open
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        return bool(text) and join(real(text), "").startswith(inside)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        refused = event.startswith(REFUSED) or (event == "import" and arguments[0] in REFUSED_MODULES)
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            refused = not is_inside(arguments[0])
        if event in CHANGING:
            paths = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
            refused = not all(map(is_inside, paths))
        if refused:
            raise PermissionError(f"{event} is not permitted here")

    sys.addaudithook(hook)


NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
BIND, RECURSIVE, PRIVATE, NO_SUID, NO_DEVICES = 0x1000, 0x4000, 0x40000, 2, 4
SYS_MOUNT_SETATTR = 442  # the same number on every architecture
THIS_FOLDER, AT_RECURSIVE, READ_ONLY = -100, 0x8000, 1
SET_PARENT_DEATH_SIGNAL, SET_NO_NEW_PRIVILEGES = 1, 38
CAPABILITY_VERSION = 0x20080522
NOBODY = 65534
USER_BASE = 1 << 30
"""Each sandbox of a root process gets its own user, so that the limit on processes counts only its own."""
ROOT = "/proc"
"""Where the new file system is mounted: a folder that always exists and that nothing inside may see."""
SYSTEM = ("/usr", "/lib", "/lib64", "/bin")
TMP = "/tmp"  # noqa: S108  the sandbox's own, in memory
DEVICES = ("/dev/null", "/dev/urandom")


def enter(tmp_bytes: int) -> None:
    """Isolate the children of this process. Raises OSError if the machine does not permit it."""
    if platform.system() != "Linux":
        raise OSError("namespaces are a matter of Linux")
    walls = NEW_MOUNTS | NEW_IPC | NEW_PIDS | NEW_NETWORK
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _call("unshare", walls)
    else:
        _call("unshare", walls | NEW_USER)
        # Map the user to itself: setgroups must be denied before the kernel accepts a group map.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    # Private: the mounts that follow must not show outside.
    _call("mount", None, b"/", None, RECURSIVE | PRIVATE, None)
    _build(tmp_bytes)
    os.chroot(ROOT)
    os.chdir(TMP)


def _build(tmp_bytes: int) -> None:
    """Mount a new root with what Python needs, read-only except /tmp."""
    _mount("tmpfs", ROOT, b"mode=755")
    # Libraries; on many systems /lib and /bin are links into /usr.
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
    # Read-only at once for all mounts; /tmp comes after it.
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _call("syscall", SYS_MOUNT_SETATTR, THIS_FOLDER, ROOT.encode(), AT_RECURSIVE, ctypes.byref(attributes), size)
    _mount("tmpfs", ROOT + TMP, f"size={tmp_bytes},mode=1777".encode())


def die_with_parent(lifeline: int) -> None:
    """End this process, the first of its namespace, when its parent ends, and so everything in the namespace.

    ``lifeline``: the read end of a pipe that the parent holds open, to detect a parent that has already ended.
    """
    _call("prctl", SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    os.set_blocking(lifeline, False)
    try:
        os.read(lifeline, 1)
    except BlockingIOError:
        return
    os._exit(1)


def renounce(launcher_pid: int) -> None:
    """Drop every right for good, in the process that will run the program."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        user = USER_BASE + launcher_pid
        os.setresuid(user, user, user)  # also drops all capabilities
    else:
        header, sets = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
        _call("capset", ctypes.byref(header), ctypes.byref(sets))
    # Programs with the set-uid bit must not bring rights back.
    _call("prctl", SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def _mount(kind: str, target: str, options: bytes) -> None:
    _call("mount", kind.encode(), target.encode(), kind.encode(), NO_SUID | NO_DEVICES, options)


def _call(function: str, *arguments: object) -> None:
    """Call a function of the C library. Raises OSError with its reason."""
    library = ctypes.CDLL(None, use_errno=True)
    if library[function](*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
