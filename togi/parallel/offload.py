"""Frozen weights in host memory, which are copied to the device only for the forwards that use them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move the buffers of ``module`` to ``device``. Its weights stay where they are."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


class HostWeights:
    """The weights of a frozen ``module`` in host memory. Its buffers, which are small, stay on the device.

    Weights are never copied back, because a frozen weight is the same in both places. Host memory is pinned, so that copies run at
    full speed.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        move_buffers(module, device)
        pin = torch.accelerator.is_available()
        self._device = device
        weights = list(module.parameters())
        numbers = {weight: number for number, weight in enumerate(weights)}  # a tied weight is one tensor in two places
        self._places = [
            (part, name, numbers[weight])
            for part in module.modules()
            for name, weight in part.named_parameters(recurse=False)
        ]
        self._hosts = [_frozen(w.data.cpu().pin_memory() if pin else w.data.cpu()) for w in weights]
        self._put(self._hosts)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Copy the weights to the device; inside the block the module can be called. Its outputs stay valid afterwards."""
        self._put([_frozen(host.data.to(self._device, non_blocking=True)) for host in self._hosts])
        try:
            yield
        finally:
            # the modules refer to the host copies again, so the device copies are freed
            self._put(self._hosts)

    def _put(self, weights: Sequence[nn.Parameter]) -> None:
        for part, name, number in self._places:
            setattr(part, name, weights[number])


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
