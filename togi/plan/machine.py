"""This machine: processors, GPUs, where bfloat16 helps, and the memory of a process. Linux; no torch.

Resident memory includes the processes that a process started, such as the parts of a tensor-parallel engine. Shared memory is
counted in each of them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar, cast

from togi.config.infer import ChatConfig, InferConfig
from togi.config.iterate import IterateConfig
from togi.config.parse import Parsed, Source
from togi.config.shared import ModelSettings
from togi.config.tools import ServeRMConfig
from togi.errors import ConfigError, RunError

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
    import psutil  # not at the top: ``togi doctor`` must run without it

    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """The peak resident memory of this process and its children since the last call, and the highest so far."""

    def __init__(self) -> None:
        self.highest = 0

    def take(self) -> int:
        """The peak in bytes since the last call; then resets it. If the system does not permit a reset: since the start."""
        import psutil

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


# avx512bw: oneDNN computes bfloat16 with any AVX-512; bf16: ARM.
BF16_FLAGS = frozenset({"avx512bw", "avx512_bf16", "amx_bf16", "bf16"})

GPU_DEVICES = ("nvidia", "dxg", "kfd")
# The first GPUs with bfloat16 are those of the Ampere generation.
BF16_CAPABILITY = 8.0
NVIDIA_SMI_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Machine:
    """Cores that this process may use, bytes of memory, visible GPUs, and whether bfloat16 is fast here.

    A matrix product in bfloat16 was measured at 0.3 GFLOP/s on a CPU with AVX2 only, against 146 in float32. ``bf16_gpus``: there
    are GPUs, and all of them have bfloat16.
    """

    cpus: int
    memory_bytes: int
    gpus: int
    fast_bf16: bool = True
    bf16_gpus: bool = False


def this_machine() -> Machine:
    """Read the resources. GPUs are counted from CUDA_VISIBLE_DEVICES, or else from the NVIDIA device files."""
    gpus = _visible_gpus()
    on_gpu = gpus > 0 and _has_gpu_devices()
    fast_bf16 = on_gpu or joins_cluster() or cpu_has_bf16(Path("/proc/cpuinfo"))
    bf16_gpus = on_gpu and gpus_have_bf16(shutil.which("nvidia-smi"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(len(os.sched_getaffinity(0)), memory, gpus, fast_bf16, bf16_gpus)


def gpus_have_bf16(nvidia_smi: str | None) -> bool:
    """Whether all GPUs have bfloat16, by the program of the driver at ``nvidia_smi``. True without it, False if it fails."""
    return nvidia_smi is None or min(_capabilities(nvidia_smi), default=0.0) >= BF16_CAPABILITY


@cache
def _capabilities(nvidia_smi: str) -> tuple[float, ...]:
    """The compute capability of each GPU; none if the program fails."""
    words = [nvidia_smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=NVIDIA_SMI_SECONDS)
        return tuple(float(line) for line in done.stdout.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()


def cpu_has_bf16(cpuinfo: Path) -> bool:
    """Whether the CPU has instructions that torch's bfloat16 kernels use. True if the file does not tell."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), None)
    return flags is None or not BF16_FLAGS.isdisjoint(flags)


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What code compiled for this processor depends on, since machines that differ may share a folder."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)})) or platform.processor()


def cache_folder() -> Path:
    """``$TOGI_CACHE``, by default ``~/.cache/togi``."""
    return Path(os.environ.get("TOGI_CACHE", "~/.cache/togi")).expanduser()


def check_compiler() -> None:
    """Raise ConfigError if this machine lacks a C++ compiler or Python headers for ``--torch_compile``."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"--torch_compile needs a C++ compiler and there is no {compiler}: install it, or leave the flag out."
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise ConfigError("--torch_compile needs Python's header files: install python3-dev, or leave the flag out.")


def joins_cluster() -> bool:
    """Whether RAY_ADDRESS (set by ``ray job submit``) names a cluster; its GPUs are not those of this machine."""
    return os.environ.get("RAY_ADDRESS") not in (None, "", "local")


def ray_place(address: str) -> tuple[str, int] | None:
    """Host and port of a RAY_ADDRESS; None for ``auto``, which Ray looks up. Raises ConfigError for no known form."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/\s]+?)\]?:(\d+)", address)
    if address == "auto":
        return None
    if found is None or not 0 < int(found[2]) < 1 << 16:
        raise ConfigError(
            f"RAY_ADDRESS {address} must be host:port, ray://host:port, auto or local: change it, or unset it."
        )
    return found[1], int(found[2])


def _has_gpu_devices(folder: Path = Path("/dev")) -> bool:
    """Whether there is a GPU driver (NVIDIA, WSL or AMD). DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES even without one."""
    return any(any(folder.glob(f"{name}*")) for name in GPU_DEVICES)


def _visible_gpus(folder: Path = Path("/dev")) -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    if (folder / "dxg").exists():  # WSL's one file for all GPUs
        return len(_capabilities(shutil.which("nvidia-smi") or "nvidia-smi"))
    return sum(1 for path in folder.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


Config = TypeVar("Config", bound=ModelSettings | InferConfig | IterateConfig | ChatConfig | ServeRMConfig)
WITHOUT_BF16 = (
    "--bf16: this CPU has no bfloat16 instructions and would be hundreds of times slower with it, so everything is computed and "
    "saved in float32"
)
WITH_BF16 = "--bf16 is on: all GPUs of this machine have bfloat16; --no_bf16 computes in float32"


def usable_precision(parsed: Parsed[Config], machine: Machine) -> tuple[Parsed[Config], str | None]:
    """The settings with ``--bf16`` on if it was left to this machine and its GPUs have it, and off if this CPU lacks it.

    With the sentence that says what changed, if anything did.
    """
    asked = parsed.config.bf16
    usable = asked and machine.fast_bf16 if "bf16" in parsed.given else machine.bf16_gpus
    if usable is asked:
        return parsed, None
    sources = dict(parsed.sources) | {"bf16": Source.AUTO}
    config = cast(Config, parsed.config.model_copy(update={"bf16": usable}))
    return Parsed(config, sources), WITH_BF16 if usable else WITHOUT_BF16
