"""Choose the backend of a trainable model, and the layout of a frozen one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from togi.config.choices import BackendName
from togi.parallel.backend import Backend, BackendOptions, cast
from togi.parallel.fsdp2 import Sharded, shard
from togi.parallel.optimizer import HostWeights
from togi.parallel.process import World
from togi.parallel.replicated import Replicated
from togi.plan.machine import keep_freed
from togi.weights.files import Reader, nothing_left


def reads_parts(world: World, options: BackendOptions, *, trained: bool) -> bool:
    """Whether a model, ``trained`` or frozen, is sharded part by part. Then its weights should stay on disk until needed."""
    if trained and options.backend is BackendName.DEEPSPEED:
        return options.partitions_parts and world.size > 1
    return options.zero_stage in ((1, 2, 3) if trained else (3,)) and world.size > 1


def trainable(module: nn.Module, world: World, options: BackendOptions, read: Reader = nothing_left) -> Backend:
    """Make ``module`` trainable, in place. All ranks must have the same weights, or ``read`` them.

    Stage 0 is the same under every backend. One process does not shard: that gains nothing, and plain PyTorch is faster. Only
    DeepSpeed, which is never a default, is used whenever the flags select it. Quantised weights are not sharded; stages 1 and 2
    would leave them whole anyway.
    """
    if world.device.type == "cpu":
        # a training step frees and allocates the same gigabytes again and again
        keep_freed()
    quantised = any(not parameter.is_floating_point() for parameter in module.parameters())
    if options.backend is BackendName.DEEPSPEED and options.zero_stage > 0 and not quantised:
        from togi.parallel.deepspeed import DeepSpeed  # an optional package

        return DeepSpeed(module, world, options, read)
    if not quantised and reads_parts(world, options, trained=True):
        return Sharded(module, world, options, read)
    read(module)
    return Replicated(module, world, options)


def frozen(
    module: nn.Module, world: World, options: BackendOptions, read: Reader = nothing_left, *, on_host: bool = False
) -> Callable[[], AbstractContextManager[None]]:
    """Make ``module`` ready for scoring only, in place: no gradients, no masters, sharded over the ranks under stage 3.

    Returns the context in which ``module`` can be called. ``on_host``: the weights stay in host memory outside of it. FSDP2 shards
    under either backend; it copies each block's shards when it gathers the block, so the context then does nothing.
    """
    module.requires_grad_(False).eval()
    if options.bf16:
        cast(module.parameters(), torch.bfloat16)
    if reads_parts(world, options, trained=False):
        size = options.fsdp_shard_size
        shard(module, world, bf16=False, reshard_after_forward=True, shard_size=size, on_host=on_host, read=read)
        return nullcontext
    read(module)
    if on_host:
        return HostWeights(module, world.device).on_device
    module.to(world.device)
    return nullcontext
