"""RMS norms and gates on a CPU by PyTorch operations, a few tokens at a time, so that intermediate values stay in the cache.

``layers`` uses it for float32, and as the fallback if the kernels cannot be compiled. Shape letters: T tokens, H the width of a
layer. Outputs equal Transformers' layers bit for bit. Gradients are computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu

BLOCK_ELEMENTS = 2**17
"""Float32 values of a block: half a megabyte. A backward holds three blocks."""


def norm(x_TH: Tensor, weight_H: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The output [T, H], and ``1 / sqrt(mean(x^2) + epsilon)`` [T, 1] in float32 for the functions below."""
    out_TH = torch.empty_like(x_TH)
    scale_T1 = torch.empty(len(x_TH), 1, dtype=torch.float32)
    for rows in _blocks(*x_TH.shape):
        block = x_TH[rows].float()
        torch.rsqrt(block.pow(2).mean(-1, keepdim=True).add_(epsilon), out=scale_T1[rows])
        torch.mul(weight_H, (block * scale_T1[rows]).to(x_TH.dtype), out=out_TH[rows])
    return out_TH, scale_T1


def norm_again(x_TH: Tensor, weight_H: Tensor, scale_T1: Tensor) -> Tensor:
    """The output again, from the scale of ``norm``."""
    out_TH = torch.empty_like(x_TH)
    for rows in _blocks(*x_TH.shape):
        torch.mul(weight_H, (x_TH[rows].float() * scale_T1[rows]).to(x_TH.dtype), out=out_TH[rows])
    return out_TH


def norm_backward(grad_TH: Tensor, x_TH: Tensor, weight_H: Tensor, scale_T1: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x [T, H], and that of the weight [H] in float32."""
    d_x_TH = torch.empty_like(x_TH)
    d_weight_H = torch.zeros_like(weight_H, dtype=torch.float32)
    wide_H = weight_H.float()
    for rows in _blocks(*x_TH.shape):
        normal = x_TH[rows].float() * scale_T1[rows]
        slope = grad_TH[rows].float()
        d_weight_H += (slope * normal).sum(0)
        slope = slope * wide_H
        # the norm takes out the part of the gradient along x
        along = (slope * normal).mean(-1, keepdim=True)
        d_x_TH[rows] = slope.sub_(normal.mul_(along)).mul_(scale_T1[rows])
    return d_x_TH, d_weight_H


def gate(gate_TH: Tensor, up_TH: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    out_TH = torch.empty_like(gate_TH)
    for rows in _blocks(*gate_TH.shape):
        torch.mul(silu(gate_TH[rows]), up_TH[rows], out=out_TH[rows])
    return out_TH


def gate_backward(grad_TH: Tensor, gate_TH: Tensor, up_TH: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    d_gate_TH, d_up_TH = torch.empty_like(gate_TH), torch.empty_like(up_TH)
    for rows in _blocks(*gate_TH.shape):
        wide, slope = gate_TH[rows].float(), grad_TH[rows].float()
        d_gate_TH[rows] = torch.ops.aten.silu_backward(slope * up_TH[rows], wide)
        d_up_TH[rows] = silu(wide).mul_(slope)
    return d_gate_TH, d_up_TH


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // width)
    return (slice(start, start + step) for start in range(0, rows, step))
