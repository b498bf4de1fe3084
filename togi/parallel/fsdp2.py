"""ZeRO stages 1 to 3 with torch's FSDP2 (``fully_shard``): over nccl on accelerators, over gloo on the CPU.

Sharded parameters are the float32 masters; each block gathers a bfloat16 copy when it runs. Gradients are reduced in
float32 (bfloat16 reduction was measured to distort the norm) and summed, not averaged. With ``adam_offload`` the shards
are in host memory, and so are AdamW's moments; gathered weights and gradients pass through the device. Where groups of ranks
part the weights of the blocks (``tensor``), a block is sharded over the groups, which each have their own part of the data, and
what is outside of blocks over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from togi.parallel.adamw import MOMENTS, clip_gradients, fill_missing_gradients, make_adamw, moments, take_step
from togi.parallel.backend import BackendOptions, Reader, cast, check_same_weights, decoder_blocks, nothing_left
from togi.parallel.offload import move_buffers
from togi.parallel.process import World
from togi.parallel.tensor import DATA, TENSOR, clip_split_gradients, copy_part, grid, split, whole


def shard(
    module: nn.Module,
    world: World,
    bf16: bool,
    reshard_after_forward: bool,
    *,
    on_host: bool = False,
    splits: bool = False,
    read: Reader = nothing_left,
) -> None:
    """Shard each block and the root in place, on the rank's device; ``on_host``: in host memory until they are gathered.

    One after the other: where their weights are still on disk (``read``), only one is whole at a time. ``splits``: the ranks
    of a group of ``world.tensor_size`` hold parts of the blocks' weights. Inputs are not cast: the segment table and float streams
    of a batch must arrive as they are.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32 if bf16 else None,
        cast_forward_inputs=False,
    )
    blocks, rows = decoder_blocks(module), world.mesh()
    both = grid(world) if splits else rows
    place = CPUOffloadPolicy(pin_memory=torch.accelerator.is_available()) if on_host else OffloadPolicy()
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
    if on_host:
        move_buffers(module, world.device)
    else:
        module.to(world.device)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            # gloo can sum, but not scale and sum in one go, which is what a factor asks of nccl.
            part.set_force_sum_reduction_for_comms(True)
    if splits:
        assert isinstance(module, FSDPModule)
        # all ranks of a group have the same gradient of what is outside of blocks, and all are summed
        module.set_gradient_divide_factor(float(world.tensor_size))


class Sharded:
    """The ``Backend`` of several processes that hold a part each."""

    def __init__(self, module: nn.Module, world: World, options: BackendOptions, read: Reader = nothing_left) -> None:
        assert options.zero_stage in (1, 2, 3)
        if options.bf16:  # frozen weights need no masters
            cast((p for p in module.parameters() if p.requires_grad), torch.float32)
            cast((p for p in module.parameters() if not p.requires_grad), torch.bfloat16)
        splits = world.tensor_size > 1
        reshard, on_host = options.zero_stage == 3, options.adam_offload
        shard(module, world, options.bf16, reshard, on_host=on_host, splits=splits, read=read)
        self.module = module
        self.world = world
        self._zero_stage = options.zero_stage
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._optimizer = make_adamw(self._trained, options)

    def backward(self, loss: Tensor, last: bool) -> None:
        assert isinstance(self.module, FSDPModule)
        # Stage 1 keeps whole gradients until the last micro-batch; the others hand each micro-batch's shards out at
        # once.
        self.module.set_requires_gradient_sync(last or self._zero_stage > 1)
        with self.world.collective("backward"):
            torch.autograd.backward(loss)
        if last:
            fill_missing_gradients(self._trained)

    def clip(self, max_norm: float) -> float:
        if self.world.tensor_size > 1:
            return clip_split_gradients(self._trained.values(), max_norm, self.world)
        norm = clip_gradients(self._trained, max_norm)
        with self.world.collective("gradient norm"):
            return float(whole(norm))

    def step(self, learning_rate: float) -> None:
        take_step(self._optimizer, learning_rate)

    def drop_gradients(self) -> None:
        self._optimizer.zero_grad()

    def full_parameters(
        self, dtype: torch.dtype | None = None, *, trained_only: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            if trained_only and name not in self._trained:
                continue
            # Cast before gathering: half the traffic.
            part = parameter.detach().to(self.world.device, parameter.dtype if dtype is None else dtype)
            with self.world.collective(f"full parameter {name}"):
                full = whole(part)
            yield name, full

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._trained.items():
            tensors = {"master": parameter.detach(), **{m: self._optimizer.state[parameter][m] for m in MOMENTS}}
            for kind, part in tensors.items():
                with self.world.collective(f"{kind} of {name}"):
                    full = whole(part)
                yield f"{kind}/{name}", full

    def load_state(self, read: Callable[[str], Tensor], steps: int) -> None:
        for name, parameter in self._trained.items():
            state = self._optimizer.state[parameter]
            copy_part(parameter, read(f"master/{name}"))
            for moment in MOMENTS:
                copy_part(state[moment], read(f"{moment}/{name}"))
            state["step"].fill_(steps)

    def at_rest(self) -> Iterable[Tensor]:
        return moments(self._optimizer)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self._trained.items()}
