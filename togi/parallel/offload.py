"""Frozen weights that stay in host memory and are on the device only while somebody reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Put the buffers of ``module`` on ``device``, whose weights may be elsewhere."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


class HostWeights:
    """The weights of ``module``, which is never trained; its buffers, which are small, stay on the device.

    Nothing is copied back: a frozen weight is the same in both places. In host memory it is pinned, so that it travels at
    full speed.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        move_buffers(module, device)
        pin = torch.accelerator.is_available()
        self._device = device
        weights = list(module.parameters())
        numbers = {weight: number for number, weight in enumerate(weights)}  # a tied weight is one, in two places
        self._places = [
            (part, name, numbers[weight])
            for part in module.modules()
            for name, weight in part.named_parameters(recurse=False)
        ]
        self._hosts = [_frozen(w.data.cpu().pin_memory() if pin else w.data.cpu()) for w in weights]
        self._put(self._hosts)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, the module can be run. Tensors taken from it inside stay valid after."""
        self._put([_frozen(host.data.to(self._device, non_blocking=True)) for host in self._hosts])
        try:
            yield
        finally:
            self._put(self._hosts)

    def _put(self, weights: Sequence[nn.Parameter]) -> None:
        for part, name, number in self._places:
            setattr(part, name, weights[number])


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
