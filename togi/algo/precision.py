"""The dtype of sums and results: float32, or float64 from float64."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or unchanged if it is float64."""
    return tensor.to(wide_dtype(tensor))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of ``full_precision(tensor)``."""
    return torch.promote_types(tensor.dtype, torch.float32)
