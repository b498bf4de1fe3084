"""Linear layers for generation on a CPU: their weights in the order that oneDNN's products read.

A decode step multiplies few tokens with all weights, and PyTorch reorders a weight anew in each product: that is more than a
third of the product's time. Weights that change only with an update are reordered once instead. Results are the same up to the
order of float32 sums.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

TOKENS = 16
"""Of a product, for which oneDNN chooses the order. Products of any other number are right too, and not slower."""


def pack_linears(model: nn.Module) -> None:
    """Reorder the weights of all linear layers of ``model``, which only infers from now on, and let go of the plain ones.

    Leaves those alone that are on other devices, of other types than ``packable`` says, or of a class of their own.
    """
    types = packable()
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.device.type == "cpu" and layer.weight.dtype in types:
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), TOKENS)
            layer.forward = partial(_linear, packed, layer.bias)  # type: ignore[method-assign]
            # an embedding that is tied to it keeps its own
            layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)


def packable() -> frozenset[torch.dtype]:
    """What oneDNN multiplies on this processor: float32, and bfloat16 where there are instructions for it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return frozenset()
    narrow = {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    return frozenset({torch.float32} | narrow)


def _linear(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out
