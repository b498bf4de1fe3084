"""RMS norms and gated MLPs on a CPU, a few tokens at a time: what is computed on them stays in the processor's cache.

Shape letters: T tokens, H the width of a layer. Transformers computes a norm in float32 with a pass over all tokens for each
operation, and autograd keeps two float32 copies of them; here a block of tokens goes through all operations at once and only the
input is kept. Nor do the projections that read a norm's or gate's output keep that: it is computed again in the backward, which
costs less than the memory did. Outputs are those of Transformers bit for bit; gradients are computed in float32 and rounded once.

Not here: kernels for other devices (``liger``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from transformers import PreTrainedModel

BLOCK_ELEMENTS = 2**17
"""Float32 values of a block: half a megabyte, of which a backward holds three."""
NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})
GATED = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"})
ATTENTION = frozenset({"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"})


def use_host_layers(hf: PreTrainedModel, *, again: bool = True) -> None:
    """Give the layers that are known a forward for CPUs. On other devices and for other tensors they do as before.

    ``again``: outputs of norms and gates are not kept for the backward. It must be off where something else decides what is
    kept, as checkpointing without re-entrance does.
    """
    config: Any = hf.config
    for layer in hf.modules():
        kind = type(layer).__name__
        if kind in NORMS:
            layer.forward = MethodType(_norm, layer)
        elif kind in GATED and config.hidden_act == "silu":
            layer.forward = MethodType(_lean_mlp if again else _gated_mlp, layer)
        elif kind in ATTENTION and again:
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
    gate, up = layer.gate_proj(x), layer.up_proj(x)
    product = gated(gate, up) if _on_host(gate, up) else layer.act_fn(gate) * up
    down: Tensor = layer.down_proj(product)
    return down


def _lean_mlp(layer: Any, x: Tensor) -> Tensor:
    with not_kept(x):
        gate, up = layer.gate_proj(x), layer.up_proj(x)
    product = gated(gate, up) if _on_host(gate, up) else layer.act_fn(gate) * up
    with not_kept(product):
        down: Tensor = layer.down_proj(product)
    return down


def _lean_attention(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    with not_kept(hidden_states):
        return type(layer).forward(layer, hidden_states, *args, **kwargs)


def not_kept(out: Tensor) -> AbstractContextManager[None]:
    """Inside, nothing keeps ``out`` for a backward if a norm or a gate here made it: it is computed again from their inputs."""
    node = out.grad_fn
    if node is None or node.name() not in AGAIN:
        return nullcontext()
    dropped = _Dropped(out, node, AGAIN[node.name()])
    return torch.autograd.graph.saved_tensors_hooks(dropped.pack, dropped.unpack)


class _Dropped:
    """The output of ``node``, which ``again`` makes of what the node keeps, once for all who need it in one backward."""

    def __init__(self, out: Tensor, node: Any, again: Callable[..., Tensor]) -> None:
        self._place, self._node, self._again = out.untyped_storage().data_ptr(), node, again
        self._users = 0
        self._made: Tensor | None = None

    def pack(self, saved: Tensor) -> Tensor | tuple[Any, ...]:
        if not _is_plain(saved) or saved.untyped_storage().data_ptr() != self._place:
            return saved
        self._users += 1
        return saved.shape, saved.stride(), saved.storage_offset()

    def unpack(self, saved: Tensor | tuple[Any, ...]) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        made = self._again(*self._node.saved_tensors) if self._made is None else self._made
        self._users -= 1
        self._made = made if self._users > 0 else None
        return made.as_strided(*saved)


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter)


def _on_host(*tensors: Tensor) -> bool:
    """Plain CPU tensors of one type, as opposed to the shards of tensor parallelism."""
    plain = all(_is_plain(x) and x.device.type == "cpu" for x in tensors)
    return plain and len({x.dtype for x in tensors}) == 1 and tensors[0].dtype in (torch.bfloat16, torch.float32)


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // width)
    return (slice(start, start + step) for start in range(0, rows, step))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        x_TH = x.reshape(-1, x.shape[-1])
        out_TH = torch.empty_like(x_TH)
        scale_T1 = torch.empty(len(x_TH), 1, dtype=torch.float32)
        for rows in _blocks(*x_TH.shape):
            block = x_TH[rows].float()
            torch.rsqrt(block.pow(2).mean(-1, keepdim=True).add_(epsilon), out=scale_T1[rows])
            torch.mul(weight_H, (block * scale_T1[rows]).to(x.dtype), out=out_TH[rows])
        ctx.save_for_backward(x, weight_H, scale_T1)
        return out_TH.view(x.shape)

    @staticmethod
    def again(x: Tensor, weight_H: Tensor, scale_T1: Tensor) -> Tensor:
        """The output, from what is kept for the backward."""
        x_TH = x.reshape(-1, x.shape[-1])
        out_TH = torch.empty_like(x_TH)
        for rows in _blocks(*x_TH.shape):
            torch.mul(weight_H, (x_TH[rows].float() * scale_T1[rows]).to(x.dtype), out=out_TH[rows])
        return out_TH.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_H, scale_T1 = ctx.saved_tensors
        x_TH, grad_TH = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        d_x_TH = torch.empty_like(x_TH)
        d_weight_H = torch.zeros_like(weight_H, dtype=torch.float32)
        wide_H = weight_H.float()
        for rows in _blocks(*x_TH.shape):
            normal = x_TH[rows].float() * scale_T1[rows]
            slope = grad_TH[rows].float()
            if ctx.needs_input_grad[1]:
                d_weight_H += (slope * normal).sum(0)
            slope = slope * wide_H
            along = (slope * normal).mean(-1, keepdim=True)
            d_x_TH[rows] = slope.sub_(normal.mul_(along)).mul_(scale_T1[rows])
        return d_x_TH.view(x.shape), d_weight_H.to(weight_H.dtype), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _Gated.again(gate, up)

    @staticmethod
    def again(gate: Tensor, up: Tensor) -> Tensor:
        """The output, from what is kept for the backward."""
        gate_TH, up_TH = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
        out_TH = torch.empty_like(gate_TH)
        for rows in _blocks(*gate_TH.shape):
            torch.mul(silu(gate_TH[rows]), up_TH[rows], out=out_TH[rows])
        return out_TH.view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        gate_TH, up_TH, grad_TH = (x.reshape(-1, x.shape[-1]) for x in (gate, up, grad))
        d_gate_TH, d_up_TH = torch.empty_like(gate_TH), torch.empty_like(up_TH)
        for rows in _blocks(*gate_TH.shape):
            wide, slope = gate_TH[rows].float(), grad_TH[rows].float()
            d_gate_TH[rows] = torch.ops.aten.silu_backward(slope * up_TH[rows], wide)
            d_up_TH[rows] = silu(wide).mul_(slope)
        return d_gate_TH.view(gate.shape), d_up_TH.view(up.shape)


AGAIN: dict[str, Callable[..., Tensor]] = {"_NormBackward": _Norm.again, "_GatedBackward": _Gated.again}
