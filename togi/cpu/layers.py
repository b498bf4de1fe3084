"""Layers of known architectures with the kernels of ``kernels``, and linear layers whose weights are packed for the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from togi.algo.precision import Context
from togi.cpu import attention
from togi.cpu.kernels import compiled, is_plain

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


NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})
GATED = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"})
ATTENTION = frozenset({"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"})
_KEEPING = ContextVar("keeping", default=False)


class Way(Protocol):
    """An implementation of norms and gates: the C kernels or ``blocks``, which documents each function."""

    def norm(self, x_TH: Tensor, weight_H: Tensor, epsilon: float) -> tuple[Tensor, Tensor]: ...
    def norm_again(self, x_TH: Tensor, weight_H: Tensor, scale_T1: Tensor) -> Tensor: ...
    def norm_backward(
        self, grad_TH: Tensor, x_TH: Tensor, weight_H: Tensor, scale_T1: Tensor
    ) -> tuple[Tensor, Tensor]: ...
    def gate(self, gate_TH: Tensor, up_TH: Tensor) -> Tensor: ...
    def gate_backward(self, grad_TH: Tensor, gate_TH: Tensor, up_TH: Tensor) -> tuple[Tensor, Tensor]: ...


def use_host_layers(hf: nn.Module) -> None:
    """Give the supported layers of ``hf`` a forward for CPUs, in place. Other devices and tensors use the original forward."""
    config: Any = hf.config
    for layer in hf.modules():
        # bound to the instance: other models of the process keep the original forward
        kind = type(layer).__name__
        if kind in NORMS:
            layer.forward = MethodType(_norm, layer)
        elif kind in GATED and config.hidden_act == "silu":
            layer.forward = MethodType(_gated_mlp, layer)
        elif kind in ATTENTION:
            layer.forward = MethodType(_lean_attention, layer)


def rms_norm(x: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + epsilon)`` over the last dimension, in float32 up to the product with the weight."""
    out: Tensor = _Norm.apply(x, weight_H, epsilon)  # type: ignore[no-untyped-call]
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    out: Tensor = _Gated.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


def _norm(layer: Any, x: Tensor) -> Tensor:
    if _on_host(x, layer.weight):
        return rms_norm(x, layer.weight, layer.variance_epsilon)
    done: Tensor = type(layer).forward(layer, x)
    return done


def _gated_mlp(layer: Any, x: Tensor) -> Tensor:
    with not_kept(x):
        gate, up = layer.gate_proj(x), layer.up_proj(x)
    product = gated(gate, up) if _on_host(gate, up) else layer.act_fn(gate) * up
    with not_kept(product):
        down: Tensor = layer.down_proj(product)
    return down


def _lean_attention(layer: nn.Module, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
    with not_kept(hidden_states):
        return type(layer).forward(layer, hidden_states, *args, **kwargs)


def not_kept(out: Tensor) -> AbstractContextManager[None]:
    """Inside the block, autograd does not save ``out`` if a norm or gate of this module made it: the backward recomputes it."""
    node = out.grad_fn
    if node is None or node.name() not in AGAIN or _KEEPING.get():
        return nullcontext()
    dropped = _Dropped(out, node, AGAIN[node.name()])
    return torch.autograd.graph.saved_tensors_hooks(dropped.pack, dropped.unpack)


@contextmanager
def keeping_outputs() -> Iterator[None]:
    """Inside the block, ``not_kept`` has no effect: activation checkpointing decides itself which tensors are saved."""
    token = _KEEPING.set(True)
    try:
        yield
    finally:
        _KEEPING.reset(token)


View = tuple[torch.Size, tuple[int, ...], int]
"""Shape, strides and offset in the memory of a tensor."""


class _Dropped:
    """The output of ``node``, which is not saved. ``again`` recomputes it once for all its users in one backward."""

    def __init__(self, out: Tensor, node: Any, again: Callable[..., Tensor]) -> None:
        self._place, self._node, self._again = out.untyped_storage().data_ptr(), node, again
        self._users = 0
        self._made: Tensor | None = None

    def pack(self, saved: Tensor) -> Tensor | View:
        # autograd also saves weights here: only the output itself, or a view of it, is dropped
        if not is_plain(saved) or saved.untyped_storage().data_ptr() != self._place:
            return saved
        self._users += 1
        return saved.shape, saved.stride(), int(saved.storage_offset())

    def unpack(self, saved: Tensor | View) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        made = self._again(*self._node.saved_tensors) if self._made is None else self._made
        # the last user frees the recomputed output
        self._users -= 1
        self._made = made if self._users > 0 else None
        return made.as_strided(*saved)


def _on_host(*tensors: Tensor) -> bool:
    """Whether all are plain CPU tensors of one supported dtype. Shards of tensor parallelism are not plain."""
    plain = all(is_plain(x) and x.device.type == "cpu" for x in tensors)
    return plain and len({x.dtype for x in tensors}) == 1 and tensors[0].dtype in (torch.bfloat16, torch.float32)


def _by(x: Tensor) -> Way:
    """The C kernels for bfloat16 if they are compiled, else ``blocks``."""
    return (compiled() if x.dtype == torch.bfloat16 else None) or attention


def _flat(x: Tensor) -> Tensor:
    """``x`` as [T, H]."""
    return x.reshape(-1, x.shape[-1])


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context[None], x: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        out_TH, scale_T1 = _by(x).norm(_flat(x), weight_H, epsilon)
        ctx.save_for_backward(x, weight_H, scale_T1)
        return out_TH.view(x.shape)

    @staticmethod
    def again(x: Tensor, weight_H: Tensor, scale_T1: Tensor) -> Tensor:
        """The output, from the tensors saved for the backward."""
        return _by(x).norm_again(_flat(x), weight_H, scale_T1).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[None], grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_H, scale_T1 = ctx.saved_tensors
        d_x_TH, d_weight_H = _by(x).norm_backward(_flat(grad), _flat(x), weight_H, scale_T1)
        return d_x_TH.view(x.shape), d_weight_H.to(weight_H.dtype), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context[None], gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _Gated.again(gate, up)

    @staticmethod
    def again(gate: Tensor, up: Tensor) -> Tensor:
        """The output, from the tensors saved for the backward."""
        return _by(gate).gate(_flat(gate), _flat(up)).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[None], grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        d_gate_TH, d_up_TH = _by(gate).gate_backward(_flat(grad), _flat(gate), _flat(up))
        return d_gate_TH.view(gate.shape), d_up_TH.view(up.shape)


AGAIN: dict[str, Callable[..., Tensor]] = {"_NormBackward": _Norm.again, "_GatedBackward": _Gated.again}
