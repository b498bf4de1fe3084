"""ZeRO stages 1 to 3 with torch's FSDP2 (``fully_shard``): over nccl on accelerators, over gloo on the CPU.

The sharded parameters are the float32 masters, and each block gathers a bfloat16 copy when it runs. Gradients are reduced in
float32 (a bfloat16 reduction measurably distorts the norm) and summed, not averaged. With ``adam_offload`` the shards and AdamW's
moments are in host memory; gathered weights and gradients pass through the device. With ``fsdp_shard_size`` (HSDP) each group
of so many ranks shards a copy of its own: weights are gathered within a group only, and gradients are summed within groups, then
over them. With tensor parallelism (``groups``) a block is sharded over the groups, each of which has its own share of the data,
and the parameters outside of blocks over all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from togi.parallel.backend import BackendOptions, cast, check_same_weights, decoder_blocks
from togi.parallel.groups import DATA, TENSOR, clip_split_gradients, grid, split, whole
from togi.parallel.optimizer import Stepped, fill_missing_gradients, make_adamw, move_buffers, take_step
from togi.parallel.process import World
from togi.weights.files import Reader, nothing_left


def shard(
    module: nn.Module,
    world: World,
    bf16: bool,
    reshard_after_forward: bool,
    *,
    shard_size: int | None = None,
    on_host: bool = False,
    splits: bool = False,
    read: Reader = nothing_left,
) -> None:
    """Shard each block and the root in place, on the rank's device. ``on_host``: the shards stay in host memory until gathered.
    ``shard_size``: over so many consecutive ranks, not over all.

    Blocks are loaded (``read``) and sharded one after the other, so only one is whole at a time. ``splits``: tensor parallelism in
    groups of ``world.tensor_size``. Inputs are not cast, because a batch has a segment table and float32 streams.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32 if bf16 else None,
        cast_forward_inputs=False,
    )
    blocks, rows = decoder_blocks(module), world.mesh(shard_size)
    both = grid(world) if splits else rows
    place = CPUOffloadPolicy(pin_memory=torch.accelerator.is_available()) if on_host else OffloadPolicy()
    # load, check, split and shard one part at a time; the root comes last and takes what is outside of blocks
    for part in (*blocks, module):
        read(part)
        check_same_weights(part, world)
        own_mesh = rows
        if splits and part is not module:
            split(part, both[TENSOR])
            own_mesh = both[DATA]
        fully_shard(
            part, mesh=own_mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward, offload_policy=place
        )
    # buffers are never sharded: they are always on the device
    if on_host:
        move_buffers(module, world.device)
    else:
        module.to(world.device)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            # a plain sum: gloo has no operation that scales and sums at once, which FSDP2 would use for a factor
            part.set_force_sum_reduction_for_comms(True)
    if splits:
        assert isinstance(module, FSDPModule)
        # all ranks of a group have the same gradient of the parameters outside of blocks, and the sum counts each
        module.set_gradient_divide_factor(float(world.tensor_size))


def reshard(module: nn.Module) -> None:
    """Free the gathered weights that a forward without a backward leaves under stages 1 and 2; the shards stay."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


class Sharded(Stepped):
    """The ``Backend`` of several processes, each of which holds a shard of every parameter."""

    def __init__(self, module: nn.Module, world: World, options: BackendOptions, read: Reader = nothing_left) -> None:
        assert options.zero_stage in (1, 2, 3)
        if options.bf16:  # frozen weights need no masters
            cast((p for p in module.parameters() if p.requires_grad), torch.float32)
            cast((p for p in module.parameters() if not p.requires_grad), torch.bfloat16)
        splits = world.tensor_size > 1
        reshards, size, on_host = options.zero_stage == 3, options.fsdp_shard_size, options.adam_offload
        shard(module, world, options.bf16, reshards, shard_size=size, on_host=on_host, splits=splits, read=read)
        self.module, self.world = module, world
        self._zero_stage = options.zero_stage
        self._masters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._optimizer = make_adamw(self._masters, options)

    def backward(self, loss: Tensor, last: bool) -> None:
        assert isinstance(self.module, FSDPModule)
        # Stage 1 keeps whole gradients until the last micro-batch; stages 2 and 3 reduce and shard them at every one.
        self.module.set_requires_gradient_sync(last or self._zero_stage > 1)
        with self.world.collective("backward"):
            torch.autograd.backward(loss)
        if last:
            fill_missing_gradients(self._masters)

    def clip(self, max_norm: float) -> float:
        if self.world.tensor_size > 1:
            return clip_split_gradients(self._masters.values(), max_norm, self.world)
        norm = nn.utils.clip_grad_norm_(self._masters.values(), max_norm)  # sharded, as the gradients are
        with self.world.collective("gradient norm"):
            return float(whole(norm))

    def step(self, learning_rate: float) -> None:
        take_step(self._optimizer, learning_rate)

    def drop_gradients(self) -> None:
        self._optimizer.zero_grad()
