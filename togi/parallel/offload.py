"""Frozen weights that stay in host memory and are on the device only while somebody reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Put the buffers of ``module`` on ``device``, whose weights may be elsewhere."""
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


class HostWeights:
    """The weights of ``module``, which is never trained; its buffers, which are small, stay on the device.

    Nothing is copied back: a frozen weight is the same in both places. In host memory it is pinned, so that it travels at
    full speed.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        move_buffers(module, device)
        pin = torch.accelerator.is_available()
        self._weights = [(p, p.data.cpu().pin_memory() if pin else p.data.cpu()) for p in module.parameters()]
        self._leave()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, the module can be run. Tensors taken from it inside stay valid after."""
        for parameter, host in self._weights:
            parameter.data = host.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        for parameter, host in self._weights:
            parameter.data = host
