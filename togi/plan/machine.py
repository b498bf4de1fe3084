"""What this machine has, without torch: cores, memory, GPUs."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Machine:
    """Cores this process may use, bytes of memory, and GPUs it can see."""

    cpus: int
    memory_bytes: int
    gpus: int


def this_machine() -> Machine:
    """Read the machine. GPUs are counted from CUDA_VISIBLE_DEVICES, or else from the NVIDIA device files."""
    return Machine(len(os.sched_getaffinity(0)), psutil.virtual_memory().total, _visible_gpus())


def joins_cluster() -> bool:
    """Whether RAY_ADDRESS (set by ``ray job submit``) names a cluster; its GPUs are then not those of this machine."""
    return os.environ.get("RAY_ADDRESS", "local") != "local"


def _visible_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    return sum(1 for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
