"""What a process occupies, read from the system, and giving memory back to it. Linux; without torch.

Resident memory is that of a process and the processes it started, such as the parts of a tensor-parallel engine. Memory that
several of them share is counted in each.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from togi.errors import RunError

RESET_PEAK = "5"
# Measured memory also moves for other reasons: threads, caches, what a first call allocates.
NOISE_BYTES = 32 << 20
MADV_DONTNEED = 4  # of Linux's madvise
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


@dataclass(frozen=True, slots=True)
class Released:
    """What a worker gave back: ``nbytes`` were let go, and memory in use was measured ``before`` and ``after``, in bytes."""

    nbytes: int
    before: int
    after: int

    def check(self, who: str) -> Released:
        """Raise RunError if the measured memory did not fall as it should have. Half of it, beyond noise, is enough."""
        fell = self.before - self.after
        if fell < self.nbytes / 2 - NOISE_BYTES:
            raise RunError(
                f"{who} let go of {self.nbytes / 1e6:.0f} MB to sleep, but its memory went from {self.before / 1e6:.0f} to "
                f"{self.after / 1e6:.0f} MB: run without the sleep flags, and report this with the versions in the run folder."
            )
        return self


def resident_bytes() -> int:
    """The resident memory of this process alone."""
    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """The largest resident memory of this process and its children since it was last asked, and of all times."""

    def __init__(self) -> None:
        self.highest = 0

    def take(self) -> int:
        """Bytes; begins anew. Where the system does not let it begin anew, the largest since the start."""
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        peak = sum(_take_peak(Path(f"/proc/{process.pid}")) for process in family)
        self.highest = max(self.highest, peak)
        return peak


def _take_peak(process: Path) -> int:
    try:
        status = (process / "status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):  # a child that has ended in the meantime
        return 0
    with suppress(OSError):
        (process / "clear_refs").write_text(RESET_PEAK, encoding="utf-8")
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(peak.split()[1]) * 1024


def keep_freed() -> None:
    """From now on the C library keeps what this process frees for what it allocates next, until ``return_freed``.

    A training step frees and allocates the same gigabytes as the last one. Else large tensors get pages of their own each time,
    which the system must find and clear first.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def return_freed() -> None:
    """Give pages that the C library keeps for later allocations back to the system."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def release_pages(address: int, nbytes: int) -> int:
    """Give back the whole pages of anonymous memory at ``address``, which reads as zeros from then on.

    Returns how many bytes of them were resident. Raises OSError.
    """
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = max(0, (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start)
    if length == 0:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    present = (ctypes.c_ubyte * (length // mmap.PAGESIZE))()
    place, size = ctypes.c_void_p(start), ctypes.c_size_t(length)
    if libc.mincore(place, size, present) != 0 or libc.madvise(place, size, MADV_DONTNEED) != 0:
        raise OSError(ctypes.get_errno(), "pages could not be given back")
    return sum(1 for page in bytes(present) if page & 1) * mmap.PAGESIZE
