"""What ``host_blocks`` computes, by C kernels for bfloat16: one pass over memory in place of many operations.

The machine's own C compiler builds them once, in less than a second, for the processor at hand; the library stays in
``$TOGI_CACHE/kernels``. Without a compiler, and with ``TOGI_CPU_KERNELS=0``, PyTorch's operations do the same more slowly.
Outputs differ from theirs by a rounding of bfloat16 at most, in very few places; gradients are computed in float32 alike.

Not here: which tensors they are for (``host_layers``).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".c")
# NaN must stay NaN: no -ffast-math. libgomp is the one that torch has loaded, so both share one pool of threads.
FLAGS = ("-O3", "-march=native", "-std=c11", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
BLOCK_ROWS = 64
"""Rows whose gradients of a norm's weight are added up by one thread."""
_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "norm": (_P, _P, _F, _P, _P, _I, _I),
    "norm_again": (_P, _P, _P, _P, _I, _I),
    "norm_backward": (_P, _P, _P, _P, _P, _P, _I, _I, _I),
    "gate": (_P, _P, _P, _I),
    "gate_backward": (_P, _P, _P, _P, _P, _I),
}


@cache
def compiled() -> HostKernels | None:
    """The kernels; None, with a warning, where they cannot be compiled."""
    if os.environ.get("TOGI_CPU_KERNELS") == "0":
        return None
    try:
        return HostKernels(ctypes.CDLL(str(_library())))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        logger.warning(
            "The kernels for the CPU cannot be compiled, so training takes about a fifth longer: install a C compiler (gcc), "
            "or set TOGI_CPU_KERNELS=0 to do without. %s",
            said.strip().splitlines()[0],
        )
        return None


class HostKernels:
    """Arguments and results are those of ``host_blocks``, in bfloat16."""

    def __init__(self, library: Any) -> None:
        self._library = library
        for name, types in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None

    def norm(self, x_TH: Tensor, weight_H: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """The output, and the scale [T, 1] in float32."""
        x_TH, weight_H = x_TH.contiguous(), weight_H.contiguous()
        out_TH, scale_T1 = torch.empty_like(x_TH), torch.empty(len(x_TH), 1, dtype=torch.float32)
        self._library.norm(*_places(x_TH, weight_H), epsilon, *_places(out_TH, scale_T1), *x_TH.shape)
        return out_TH, scale_T1

    def norm_again(self, x_TH: Tensor, weight_H: Tensor, scale_T1: Tensor) -> Tensor:
        """The output alone."""
        x_TH, weight_H = x_TH.contiguous(), weight_H.contiguous()
        out_TH = torch.empty_like(x_TH)
        self._library.norm_again(*_places(x_TH, weight_H, scale_T1, out_TH), *x_TH.shape)
        return out_TH

    def norm_backward(self, grad_TH: Tensor, x_TH: Tensor, weight_H: Tensor, scale_T1: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of x, and that of the weight in float32."""
        grad_TH, x_TH, weight_H = grad_TH.contiguous(), x_TH.contiguous(), weight_H.contiguous()
        rows, width = x_TH.shape
        d_x_TH, d_weight_BH = torch.empty_like(x_TH), torch.zeros(-(-rows // BLOCK_ROWS), width)
        places = _places(grad_TH, x_TH, weight_H, scale_T1, d_x_TH, d_weight_BH)
        self._library.norm_backward(*places, BLOCK_ROWS, rows, width)
        return d_x_TH, d_weight_BH.sum(0)

    def gate(self, gate_TH: Tensor, up_TH: Tensor) -> Tensor:
        """``silu(gate) * up``."""
        gate_TH, up_TH = gate_TH.contiguous(), up_TH.contiguous()
        out_TH = torch.empty_like(gate_TH)
        self._library.gate(*_places(gate_TH, up_TH, out_TH), out_TH.numel())
        return out_TH

    def gate_backward(self, grad_TH: Tensor, gate_TH: Tensor, up_TH: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up."""
        grad_TH, gate_TH, up_TH = grad_TH.contiguous(), gate_TH.contiguous(), up_TH.contiguous()
        d_gate_TH, d_up_TH = torch.empty_like(gate_TH), torch.empty_like(up_TH)
        places = _places(grad_TH, gate_TH, up_TH, d_gate_TH, d_up_TH)
        self._library.gate_backward(*places, grad_TH.numel())
        return d_gate_TH, d_up_TH


def _places(*tensors: Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]


def _library() -> Path:
    """The library for this source, compiler and processor, built if it is not there. Raises OSError or SubprocessError."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("There is none in the PATH.")
    parts = (SOURCE.read_text(), str(FLAGS), compiler, torch.__version__, _processor())
    name = hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
    folder = Path(os.environ.get("TOGI_CACHE", "~/.cache/togi")).expanduser() / "kernels"
    path = folder / f"{name}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        start = time.perf_counter()
        # aside and renamed: other processes build it at the same time
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / path.name
            words = [*shlex.split(compiler), *FLAGS, str(SOURCE), "-o", str(made), "-lm"]
            subprocess.run(words, check=True, capture_output=True, text=True, timeout=120)
            made.replace(path)
        logger.info("Compiled the kernels for the CPU in %.1f s: %s", time.perf_counter() - start, path)
    return path


def _processor() -> str:
    """What the compiled code depends on: a cache may be shared by machines that differ."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)})) or platform.processor()
