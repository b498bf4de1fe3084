"""The C kernels: built once by the machine's compiler, and called with tensors."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from ctypes import byref
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from togi.plan.machine import cache_folder, processor

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
SOURCES = tuple(HERE / name for name in ("layers.c", "attention.c", "optimizer.c"))
HEADERS = (HERE / "numbers.h",)
DIGEST_BYTES = 32
# No -ffast-math, because NaN must stay NaN. libgomp is the one that torch has loaded, so both share one thread pool.
_EXACT = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
FLAGS = ("-O3", "-march=native", "-std=c11", *_EXACT, "-fopenmp", "-fPIC", "-shared")


def own_folder(name: str) -> Path:
    """A folder in the cache for executable code of this user alone. Raises OSError if other users can write to it."""
    folder = cache_folder() / f"{name}-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    owner = folder.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o022:
        raise OSError(f"Others than its user may write to {folder}: remove it.")
    return folder


def processor_mark() -> str:
    """A hash of the processor's name, for caches in a home folder that different machines share."""
    return hashlib.blake2b(processor().encode(), digest_size=8).hexdigest()


def library() -> Path:
    """The path of the library for this source, compiler and processor. Builds it if it is missing or damaged.

    Raises OSError if there is no compiler or other users can write to the folder, SubprocessError if compiling fails, and
    ValueError if CC is not a valid command.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("There is none in the PATH.")
    # the name is a hash of all that the library depends on
    sources = [path.read_text() for path in (*SOURCES, *HEADERS)]
    parts = (*sources, str(FLAGS), compiler, torch.__version__, processor())
    name = hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
    folder = own_folder("kernels")
    path = folder / f"{name}.so"
    if not _is_whole(path):
        start = time.perf_counter()
        # built in a temporary folder and renamed, because other processes may build it at the same time
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / path.name
            words = [*shlex.split(compiler), *FLAGS, *map(str, SOURCES), "-o", str(made), "-lm"]
            subprocess.run(words, check=True, capture_output=True, text=True, errors="replace", timeout=120)
            with made.open("ab") as file:
                file.write(_digest(made.read_bytes()))
            made.replace(path)
        logger.info("Compiled the kernels for the CPU in %.1f s: %s", time.perf_counter() - start, path)
    return path


def _is_whole(path: Path) -> bool:
    """Whether a library ends with the digest of all before it, as ``library`` wrote it. The loader ignores what follows its parts.

    A file that a full disk or a lost machine has cut would be fatal: reading a missing page ends the process.
    """
    content = path.read_bytes() if path.exists() else b""
    return len(content) > DIGEST_BYTES and _digest(content[:-DIGEST_BYTES]) == content[-DIGEST_BYTES:]


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


BLOCK_ROWS = 64
"""Rows over which one thread sums the gradient of a norm's weight."""
PART = 2**14
"""Values whose squares one thread sums. The same number is in optimizer.c."""
_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "norm": (_P, _P, _F, _P, _P, _I, _I),
    "norm_again": (_P, _P, _P, _P, _I, _I),
    "norm_backward": (_P, _P, _P, _P, _P, _P, _I, _I, _I),
    "gate": (_P, _P, _P, _I),
    "gate_backward": (_P, _P, _P, _P, _P, _I),
    "head": (_P, _F, _P, _P, _P, _P, _I, _I),
    "head_backward": (_P, _F, _P, _P, _P, _P, _P, _I, _I),
    "squares": (_P, _I, _P, _I),
    "adamw": (_P, _P, _P, _P, _I, _P, _P, _I),
    "attention": (_P, _P, _P, _P, _P),
    "attention_backward": (_P, _P, _P, _P, _P, _P, _P, _P, _I),
}


def kernels_for(*tensors: Tensor, float32: bool = False) -> HostKernels | None:
    """The kernels, if they are compiled and all ``tensors`` are plain CPU tensors (no shards) of bfloat16. Else None.

    ``float32`` allows tensors that are all float32 too.
    """
    dtypes = {x.dtype for x in tensors}
    fit = dtypes == {torch.bfloat16} or (float32 and dtypes == {torch.float32})
    return compiled() if fit and all(is_plain(x) and x.device.type == "cpu" for x in tensors) else None


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is a tensor or parameter of PyTorch itself, not of a subclass."""
    return type(x) in (Tensor, nn.Parameter)


@cache
def compiled() -> HostKernels | None:
    """The kernels, compiled at the first call. None, with a logged warning, if they cannot be compiled."""
    if os.environ.get("TOGI_CPU_KERNELS") == "0":
        return None
    try:
        return HostKernels(ctypes.CDLL(str(library())))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = f"{getattr(error, 'stderr', None) or ''}{error}".strip()
        logger.warning(
            "The kernels for the CPU cannot be compiled or loaded, so training takes up to twice as long: install a C compiler "
            "(gcc), or set TOGI_CPU_KERNELS=0 to do without. %s",
            said.splitlines()[0],
        )
        return None


class HostKernels:
    """The C functions as methods. Norms and gates have the arguments and results of ``togi.cpu.attention``, in bfloat16."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {name: library[name] for name in SIGNATURES}
        for name, function in self._functions.items():
            # without declared types ctypes would pass pointers and sizes as 32-bit integers
            function.argtypes = SIGNATURES[name]
            function.restype = ctypes.c_int if name.startswith("attention") else None

    def _run(self, name: str, *arguments: object) -> None:
        """Call a C function; it gets the address of a tensor, which must be contiguous. Raises MemoryError."""
        assert all(x.is_contiguous() for x in arguments if isinstance(x, Tensor))
        status = self._functions[name](*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments))
        if status not in (0, None):
            raise MemoryError("not enough memory for attention on the CPU: lower --max_tokens_per_gpu")

    def norm(self, x_TH: Tensor, weight_H: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """The output [T, H], and the scale [T, 1] in float32."""
        x_TH, weight_H = x_TH.contiguous(), weight_H.contiguous()
        out_TH, scale_T1 = torch.empty_like(x_TH), torch.empty(len(x_TH), 1, dtype=torch.float32)
        self._run("norm", x_TH, weight_H, epsilon, out_TH, scale_T1, *x_TH.shape)
        return out_TH, scale_T1

    def norm_again(self, x_TH: Tensor, weight_H: Tensor, scale_T1: Tensor) -> Tensor:
        """The output again, from the scale of ``norm``."""
        x_TH, weight_H = x_TH.contiguous(), weight_H.contiguous()
        out_TH = torch.empty_like(x_TH)
        self._run("norm_again", x_TH, weight_H, scale_T1, out_TH, *x_TH.shape)
        return out_TH

    def norm_backward(self, grad_TH: Tensor, x_TH: Tensor, weight_H: Tensor, scale_T1: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of x [T, H], and that of the weight [H] in float32."""
        grad_TH, x_TH, weight_H = grad_TH.contiguous(), x_TH.contiguous(), weight_H.contiguous()
        rows, width = x_TH.shape
        # one partial sum for each block of rows: the result does not depend on the number of threads
        d_x_TH, d_weight_BH = torch.empty_like(x_TH), torch.zeros(-(-rows // BLOCK_ROWS), width)
        self._run("norm_backward", grad_TH, x_TH, weight_H, scale_T1, d_x_TH, d_weight_BH, BLOCK_ROWS, rows, width)
        return d_x_TH, d_weight_BH.sum(0)

    def gate(self, gate_TH: Tensor, up_TH: Tensor) -> Tensor:
        """``silu(gate) * up``."""
        gate_TH, up_TH = gate_TH.contiguous(), up_TH.contiguous()
        out_TH = torch.empty_like(gate_TH)
        self._run("gate", gate_TH, up_TH, out_TH, out_TH.numel())
        return out_TH

    def gate_backward(self, grad_TH: Tensor, gate_TH: Tensor, up_TH: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up."""
        grad_TH, gate_TH, up_TH = grad_TH.contiguous(), gate_TH.contiguous(), up_TH.contiguous()
        d_gate_TH, d_up_TH = torch.empty_like(gate_TH), torch.empty_like(up_TH)
        self._run("gate_backward", grad_TH, gate_TH, up_TH, d_gate_TH, d_up_TH, grad_TH.numel())
        return d_gate_TH, d_up_TH

    def head(self, raw_kV: Tensor, factor: float, targets_k: Tensor, *, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """For each row of ``factor`` x ``raw``: the target's logit, the log-sum-exp, and the entropy, all float32 [k].

        Without ``entropy`` the last is empty. Raises IndexError for a target outside of the vocabulary, as PyTorch does: the
        kernel would read beyond the row.
        """
        raw_kV, targets_k = raw_kV.contiguous(), targets_k.long().contiguous()
        outside = targets_k[(targets_k < 0) | (targets_k >= raw_kV.shape[1])].tolist()
        if outside:
            raise IndexError(f"token {outside[0]} is none of the {raw_kV.shape[1]} that the model's head predicts")
        chosen_k, norm_k = torch.empty(2, len(raw_kV), dtype=torch.float32)
        entropy_k = torch.empty(len(raw_kV) if entropy else 0, dtype=torch.float32)
        self._run("head", raw_kV, factor, targets_k, chosen_k, norm_k, entropy_k if entropy else None, *raw_kV.shape)
        return chosen_k, norm_k, entropy_k

    def head_backward(
        self,
        raw_kv: Tensor,
        factor: float,
        norm_k: Tensor,
        up_k: Tensor,
        entropy: tuple[Tensor, Tensor] | None,
        targets_k: Tensor,
    ) -> Tensor:
        """Overwrite ``raw``, some columns of the logits, with their gradient. ``targets`` count from the first of these columns.

        ``up_k``: the gradient of the target's log-prob. ``entropy``: the entropies and their gradients, if there are any.
        """
        norm_k, up_k, targets_k = norm_k.contiguous(), up_k.contiguous(), targets_k.contiguous()
        about_entropy = (None, None) if entropy is None else tuple(x.contiguous() for x in entropy)
        self._run("head_backward", raw_kv, factor, norm_k, up_k, *about_entropy, targets_k, *raw_kv.shape)
        return raw_kv

    def attention(
        self, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, segments: SegmentSpans, scale: float, out_HTD: Tensor
    ) -> None:
        """Write causal attention of these segments to ``out_HTD``. All tensors are bfloat16, or all float32.

        Raises MemoryError.
        """
        about = _Segments.of(segments, q_HTD, k_GTD, scale)
        self._run("attention", byref(about), *_read(q_HTD, k_GTD, v_GTD), _written(out_HTD))

    def attention_backward(
        self,
        grad_HTD: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        segments: SegmentSpans,
        scale: float,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Write the gradient of q to ``grads[0]``, and add those of k and v to the other two, which are float32.

        Raises MemoryError.
        """
        d_q_HTD, d_k_GTD, d_v_GTD = grads
        assert d_k_GTD.dtype == d_v_GTD.dtype == torch.float32
        about = _Segments.of(segments, inputs[0], inputs[1], scale)
        views = (*_read(grad_HTD.to(d_q_HTD.dtype), *inputs), _written(d_q_HTD))
        self._run("attention_backward", byref(about), *views, d_k_GTD, d_v_GTD, d_k_GTD.shape[1])

    def square_sum(self, x: Tensor) -> float:
        """The sum of squares of a bfloat16 or float32 tensor, in float64."""
        x = x.contiguous()
        sums = torch.empty(-(-x.numel() // PART), dtype=torch.float64)
        self._run("squares", x, x.dtype == torch.bfloat16, sums, x.numel())
        return float(sums.sum())

    def adamw(
        self, master: Tensor, moments: tuple[Tensor, Tensor], gradient: Tensor, working: Tensor, rates: Rates
    ) -> None:
        """One AdamW step (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2) on a float32 master and its moments, in place.

        The gradient is bfloat16 or float32. ``working`` gets the master rounded to bfloat16.
        """
        gradient, half, (first, second) = gradient.contiguous(), gradient.dtype == torch.bfloat16, rates.betas
        keep, size = 1 - rates.learning_rate * rates.decay, rates.learning_rate / (1 - first**rates.steps)
        root = (1 - second**rates.steps) ** 0.5
        struct = (_F * 8)(keep, 1 - first, second, 1 - second, size, root, rates.epsilon, rates.factor)
        self._run("adamw", master, *moments, gradient, half, working, byref(struct), master.numel())


class Rates(NamedTuple):
    """Numbers of one AdamW step. ``steps`` includes this step. ``factor`` multiplies the gradients first."""

    learning_rate: float
    decay: float
    betas: tuple[float, float]
    epsilon: float
    steps: int
    factor: float


@dataclass(frozen=True, slots=True, eq=False)
class SegmentSpans:
    """The tokens of a pack that each segment sees.

    ``spans`` [X, 2]: first token and last + 1 of each span. ``bounds`` [S + 1]: segment s has the spans from ``bounds[s]`` to
    ``bounds[s + 1]``. A segment's own tokens are its last span. Both are int64.
    """

    spans: Tensor
    bounds: Tensor

    @property
    def count(self) -> int:
        """The number of segments."""
        return len(self.bounds) - 1


class _Segments(ctypes.Structure):
    """The struct ``table`` of attention.c. The caller keeps ``SegmentSpans`` alive."""

    _fields_ = (
        ("spans", _P),
        ("bounds", _P),
        *((name, _I) for name in ("segments", "heads", "groups", "width", "half")),
        ("scale", _F),
    )

    @classmethod
    def of(cls, segments: SegmentSpans, q_HTD: Tensor, k_GTD: Tensor, scale: float) -> _Segments:
        sizes = (segments.count, len(q_HTD), len(k_GTD), q_HTD.shape[2], q_HTD.dtype == torch.bfloat16)
        return cls(segments.spans.data_ptr(), segments.bounds.data_ptr(), *sizes, scale)


class _View(ctypes.Structure):
    """The struct ``view`` of attention.c. It keeps the tensor alive."""

    _fields_ = (("values", _P), ("head", _I), ("token", _I))
    tensor: Tensor

    @classmethod
    def of(cls, x_HTD: Tensor) -> _View:
        view = cls(x_HTD.data_ptr(), x_HTD.stride(0), x_HTD.stride(1))
        view.tensor = x_HTD
        return view


def _read(*tensors: Tensor) -> list[object]:
    return [byref(_View.of(x if x.stride(2) == 1 else x.contiguous())) for x in tensors]


def _written(x_HTD: Tensor) -> object:
    assert x_HTD.stride(2) == 1
    return byref(_View.of(x_HTD))
