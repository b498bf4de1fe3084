"""Fused AdamW whose state exists before the first step, so that a checkpoint always has the same tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from togi.cpu import HostKernels, Rates
from togi.parallel.backend import BackendOptions

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_adamw(parameters: Mapping[str, Tensor], options: BackendOptions) -> torch.optim.AdamW:
    """Make AdamW (Loshchilov & Hutter, 2019) over ``parameters``, with its state."""
    optimizer = adamw_without_state(parameters, options, {name: tuple(p.shape) for name, p in parameters.items()})
    add_state(optimizer, parameters.values())
    return optimizer


def adamw_without_state(
    parameters: Mapping[str, Tensor], options: BackendOptions, shapes: Mapping[str, tuple[int, ...]]
) -> torch.optim.AdamW:
    """``shapes``: of the full parameters. One-dimensional ones (biases, norm weights) get no weight decay.

    A fused kernel takes only parameters of one device mesh, so each mesh has its own group.
    """
    decayed = [p for name, p in parameters.items() if len(shapes[name]) > 1]
    others = [p for name, p in parameters.items() if len(shapes[name]) <= 1]
    groups: list[dict[str, Any]] = []
    for chosen, decay in ((decayed, options.weight_decay), (others, 0.0)):
        by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
        for parameter in chosen:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
        groups += [{"params": own, "weight_decay": decay} for own in by_mesh.values()]
    return torch.optim.AdamW(groups, lr=0.0, betas=options.betas, eps=options.eps, fused=True)


def add_state(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """Add zero moments and a step count for each parameter."""
    for parameter in parameters:
        state = optimizer.state[parameter]
        # a tensor on the device, as the fused kernel requires
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter, requires_grad=False)


def moments(optimizer: torch.optim.AdamW) -> list[Tensor]:
    """Both moments of every parameter."""
    return [state[moment] for state in optimizer.state.values() for moment in MOMENTS]


def set_rate(optimizer: torch.optim.AdamW, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def take_step(optimizer: torch.optim.AdamW, learning_rate: float) -> None:
    """Step at ``learning_rate`` and free the gradients."""
    set_rate(optimizer, learning_rate)
    optimizer.step()
    optimizer.zero_grad()


def take_host_step(
    kernels: HostKernels,
    optimizer: torch.optim.AdamW,
    learning_rate: float,
    factor: float,
    parts: Mapping[Tensor, tuple[Tensor | None, Tensor]],
) -> None:
    """``take_step`` in host memory by a C kernel, in one pass over all tensors.

    ``parts``: for each parameter its gradient, which is multiplied by ``factor``, and the bfloat16 working copy to write. A
    gradient of None counts as zero: the parameter had no part in the step, and its moments decay.
    """
    set_rate(optimizer, learning_rate)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient, working = parts[parameter]
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            state = optimizer.state[parameter]
            state["step"] += 1
            steps = int(state["step"])
            rates = Rates(learning_rate, group["weight_decay"], group["betas"], group["eps"], steps, factor)
            kernels.adamw(parameter, (state["exp_avg"], state["exp_avg_sq"]), gradient, working, rates)


def fill_missing_gradients(parameters: Mapping[str, Tensor]) -> None:
    """Give each parameter without a gradient a zero gradient, so that all ranks step the same parameters."""
    for parameter in parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def clip_gradients(parameters: Mapping[str, Tensor], max_norm: float) -> Tensor:
    """Clip to ``max_norm``. Returns the global L2 norm before clipping, which is sharded if the gradients are."""
    return torch.nn.utils.clip_grad_norm_(list(parameters.values()), max_norm)
