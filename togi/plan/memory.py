"""The memory of a process, as the system reports it, and returning memory to the system. Linux; no torch.

Resident memory includes the processes that a process started, such as the parts of a tensor-parallel engine. Shared memory is
counted in each of them.
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
# Measured memory also changes for other reasons: threads, caches, allocations of a first call.
NOISE_BYTES = 32 << 20
MADV_DONTNEED = 4  # of Linux's madvise
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


@dataclass(frozen=True, slots=True)
class Released:
    """A worker's release of memory: ``nbytes`` were freed; memory in use was ``before`` and ``after`` it, in bytes."""

    nbytes: int
    before: int
    after: int

    def check(self, who: str) -> Released:
        """Raise RunError if the measured memory did not fall enough. Half of ``nbytes``, less noise, is enough."""
        fell = self.before - self.after
        if fell < self.nbytes / 2 - NOISE_BYTES:
            raise RunError(
                f"{who} let go of {self.nbytes / 1e6:.0f} MB to sleep, but its memory went from {self.before / 1e6:.0f} to "
                f"{self.after / 1e6:.0f} MB: run without the sleep flags, and report this with the versions in the run folder."
            )
        return self


def resident_bytes() -> int:
    """The resident memory of this process alone, in bytes."""
    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """The peak resident memory of this process and its children since the last call, and the highest so far."""

    def __init__(self) -> None:
        self.highest = 0

    def take(self) -> int:
        """The peak in bytes since the last call; then resets it. If the system does not permit a reset: since the start."""
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        peak = sum(_take_peak(Path(f"/proc/{process.pid}")) for process in family)
        self.highest = max(self.highest, peak)
        return peak


def _take_peak(process: Path) -> int:
    try:
        status = (process / "status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):  # a child that has just ended
        return 0
    with suppress(OSError):
        (process / "clear_refs").write_text(RESET_PEAK, encoding="utf-8")
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(peak.split()[1]) * 1024


def keep_freed() -> None:
    """Let the C library keep freed memory for later allocations, until ``return_freed``.

    A training step frees and allocates the same gigabytes as the last one. Otherwise large tensors get new pages each
    time, which the system must find and clear first.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def return_freed() -> None:
    """Return the pages that the C library keeps for later allocations to the system."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def release_pages(address: int, nbytes: int) -> int:
    """Release the whole pages of anonymous memory at ``address``, which then reads as zeros.

    Returns how many bytes of them were resident. Raises OSError.
    """
    # Only pages that are entirely inside: the edges may belong to other memory.
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = max(0, (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start)
    if length == 0:
        return 0
    # Count the resident pages first: those never touched give nothing back.
    libc = ctypes.CDLL(None, use_errno=True)
    present = (ctypes.c_ubyte * (length // mmap.PAGESIZE))()
    place, size = ctypes.c_void_p(start), ctypes.c_size_t(length)
    if libc.mincore(place, size, present) != 0 or libc.madvise(place, size, MADV_DONTNEED) != 0:
        raise OSError(ctypes.get_errno(), "pages could not be given back")
    return sum(1 for page in bytes(present) if page & 1) * mmap.PAGESIZE
