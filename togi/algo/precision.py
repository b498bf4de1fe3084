"""What functions with a gradient of their own share: the dtype of sums and results, and the type of their context."""

from typing import Protocol, TypeVar

import torch
from torch import Tensor

Fixed = TypeVar("Fixed")


class Context(Protocol[Fixed]):
    """The first argument of an autograd function. ``fixed``: what it keeps for the backward beside tensors."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    fixed: Fixed

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or unchanged if it is float64."""
    return tensor.to(wide_dtype(tensor))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of ``full_precision(tensor)``."""
    return torch.promote_types(tensor.dtype, torch.float32)
