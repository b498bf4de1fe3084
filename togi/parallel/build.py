"""Which backend a model gets, and how a model that is only scored is laid out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from togi.parallel.backend import Backend, BackendOptions, cast
from togi.parallel.fsdp2 import Sharded, shard
from togi.parallel.process import World
from togi.parallel.replicated import Replicated


def trainable(module: nn.Module, world: World, options: BackendOptions) -> Backend:
    """Make ``module`` trainable, in place. All ranks must bring the same weights.

    One process never shards: there is nothing to gain, and plain PyTorch is faster. Nor are quantised weights sharded, which
    stages 1 and 2 would leave whole anyway.
    """
    quantised = any(not parameter.is_floating_point() for parameter in module.parameters())
    if world.size == 1 or options.zero_stage == 0 or quantised:
        return Replicated(module, world, options)
    return Sharded(module, world, options)


def frozen(module: nn.Module, world: World, options: BackendOptions) -> nn.Module:
    """Make ``module`` ready for scoring only: no gradients, no masters, sharded over the ranks under stage 3."""
    module.requires_grad_(False).eval()
    if options.bf16:
        cast(module.parameters(), torch.bfloat16)
    if world.size > 1 and options.zero_stage == 3:
        shard(module, world, bf16=False, reshard_after_forward=True)
    return module.to(world.device)


class Lodging:
    """Where a frozen model lives between its calls: on its device, or with ``offload`` in host memory.

    Not for sharded models, whose parameters the sharding moves itself. On a CPU both are the same place.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, offload: bool) -> None:
        self._module = module
        self._device = device
        self._offload = offload and device.type != "cpu"
        if self._offload:
            module.to("cpu")

    @contextmanager
    def used(self) -> Iterator[None]:
        """The model is on its device inside."""
        if not self._offload:
            yield
            return
        self._module.to(self._device)
        try:
            yield
        finally:
            self._module.to("cpu")
            torch.accelerator.empty_cache()
