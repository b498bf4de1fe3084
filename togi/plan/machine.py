"""The resources of this machine, without torch: cores, memory, GPUs, and the cache folder."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import psutil

from togi.errors import ConfigError

# avx512bw: oneDNN computes bfloat16 with any AVX-512; bf16: ARM.
BF16_FLAGS = frozenset({"avx512bw", "avx512_bf16", "amx_bf16", "bf16"})

GPU_DEVICES = ("nvidia", "dxg", "kfd")


@dataclass(frozen=True, slots=True)
class Machine:
    """Cores that this process may use, bytes of memory, visible GPUs, and whether bfloat16 is fast here.

    A matrix product in bfloat16 was measured at 0.3 GFLOP/s on a CPU with AVX2 only, against 146 in float32.
    """

    cpus: int
    memory_bytes: int
    gpus: int
    fast_bf16: bool = True


def this_machine() -> Machine:
    """Read the resources. GPUs are counted from CUDA_VISIBLE_DEVICES, or else from the NVIDIA device files."""
    gpus = _visible_gpus()
    fast_bf16 = (gpus > 0 and _has_gpu_devices()) or joins_cluster() or cpu_has_bf16(Path("/proc/cpuinfo"))
    return Machine(len(os.sched_getaffinity(0)), psutil.virtual_memory().total, gpus, fast_bf16)


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
    return os.environ.get("RAY_ADDRESS", "local") != "local"


def _has_gpu_devices(folder: Path = Path("/dev")) -> bool:
    """Whether there is a GPU driver (NVIDIA, WSL or AMD). DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES even without one."""
    return any(any(folder.glob(f"{name}*")) for name in GPU_DEVICES)


def _visible_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    return sum(1 for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
