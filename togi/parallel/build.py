"""Which backend a model gets, and how a model that is only scored is laid out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from togi.config.choices import BackendName
from togi.parallel.backend import Backend, BackendOptions, Reader, cast, nothing_left
from togi.parallel.fsdp2 import Sharded, shard
from togi.parallel.offload import HostWeights
from togi.parallel.process import World
from togi.parallel.replicated import Replicated
from togi.plan.memory import keep_freed


def reads_parts(world: World, options: BackendOptions, *, trained: bool) -> bool:
    """Whether a model, ``trained`` or frozen, is sharded part by part, so that its weights had better be left on disk."""
    if trained and options.backend is BackendName.DEEPSPEED:
        return options.partitions_parts and world.size > 1
    return options.zero_stage in ((1, 2, 3) if trained else (3,)) and world.size > 1


def trainable(module: nn.Module, world: World, options: BackendOptions, read: Reader = nothing_left) -> Backend:
    """Make ``module`` trainable, in place. All ranks must bring the same weights, or ``read`` them.

    Stage 0 is the same under every backend. One process never shards: there is nothing to gain, and plain PyTorch is faster;
    only DeepSpeed, which is never a default, is given what was asked for. Nor are quantised weights sharded, which stages 1
    and 2 would leave whole anyway.
    """
    if world.device.type == "cpu":
        keep_freed()
    quantised = any(not parameter.is_floating_point() for parameter in module.parameters())
    if options.backend is BackendName.DEEPSPEED and options.zero_stage > 0 and not quantised:
        from togi.parallel.deepspeed import DeepSpeed  # an optional package

        return DeepSpeed(module, world, options, read)
    if not quantised and reads_parts(world, options, trained=True):
        return Sharded(module, world, options, read)
    read(module)
    return Replicated(module, world, options)


def frozen(module: nn.Module, world: World, options: BackendOptions, read: Reader = nothing_left) -> nn.Module:
    """Make ``module`` ready for scoring only: no gradients, no masters, sharded over the ranks under stage 3.

    By FSDP2 under either backend.
    """
    _freeze(module, options)
    if reads_parts(world, options, trained=False):
        shard(module, world, bf16=False, reshard_after_forward=True, read=read)
    else:
        read(module)
    return module.to(world.device)


def frozen_on_host(
    module: nn.Module, world: World, options: BackendOptions, read: Reader = nothing_left
) -> Callable[[], AbstractContextManager[None]]:
    """Like ``frozen``, with the weights in host memory; returns the context in which ``module`` can be run.

    Under stage 3 each block's shards come from host memory when the block is gathered, so the context does nothing.
    """
    _freeze(module, options)
    if reads_parts(world, options, trained=False):
        shard(module, world, bf16=False, reshard_after_forward=True, on_host=True, read=read)
        return nullcontext
    read(module)
    return HostWeights(module, world.device).on_device


def _freeze(module: nn.Module, options: BackendOptions) -> None:
    module.requires_grad_(False).eval()
    if options.bf16:
        cast(module.parameters(), torch.bfloat16)
