"""Linear layers for generation on a CPU, with their weights in the layout that oneDNN reads.

A decode step multiplies few tokens by all weights, and PyTorch reorders the weight for each product, which takes more than a third
of its time. Here each weight is reordered once after a weight update. Results are the same up to the order of float32 sums.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

TOKENS = 16
"""The number of tokens for which oneDNN chooses the layout. Products of any other number are correct too, and not slower."""


def pack_linears(model: nn.Module) -> None:
    """Reorder the weights of all linear layers of ``model`` in place, and free the plain ones. It can then only infer.

    Skips layers on other devices, of dtypes that are not in ``packable()``, or of a subclass of ``nn.Linear``.
    """
    types = packable()
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.device.type == "cpu" and layer.weight.dtype in types:
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), TOKENS)
            layer.forward = partial(_linear, packed, layer.bias)  # type: ignore[method-assign]
            # a tied embedding keeps the plain weight
            layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)


def packable() -> frozenset[torch.dtype]:
    """The dtypes that oneDNN multiplies on this processor: float32, and bfloat16 if it has instructions for it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return frozenset()
    narrow = {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    return frozenset({torch.float32} | narrow)


def _linear(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out
