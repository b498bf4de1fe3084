"""Ranks that compute the same batches together: rings, which split the tokens, and groups that split the weights.

Ring attention: here is the communication between the ranks that share the tokens of each batch.

A rank sends to the next rank of its ring while it receives from the one before, over the group's library (nccl on accelerators,
gloo on the CPU). Not here: what is sent, and when (``togi.model.ring_attention``).

Tensor parallelism: each rank of a group holds a part of each large weight of a decoder block, through torch's DTensor plans.

Megatron's split (Shoeybi et al. 2019, arXiv 1909.08053): query, key, value, gate and up projections are split by output, so that
each rank has its own heads and hidden units. Output and down projections are split by input, and their results are summed.
Attention runs unchanged on a rank's own heads. Every rank computes the whole embedding, head and norms, since the fused head
(``togi.model.heads``) reads the whole weight. The data of a group: ``World.shares``. Sharding over groups: ``fsdp2``. Not
supported: adapters, mixtures of experts, sequence parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, parallel

from togi.parallel.process import World


class Ring:
    """The ring of ``world.ring_size`` consecutive ranks of this process. All ranks of the world must make theirs together."""

    def __init__(self, world: World) -> None:
        assert world.ring_size > 1
        self.size = world.ring_size
        self.rank = world.rank % self.size
        self._world = world
        # torch requires that every rank makes every group, also those of other rings
        groups = [dist.new_group(list(range(first, first + self.size))) for first in range(0, world.size, self.size)]
        self._group = groups[world.share]
        first = world.rank - self.rank
        self._next, self._previous = first + (self.rank + 1) % self.size, first + (self.rank - 1) % self.size

    def pass_on(self, block: Tensor, rows: int, channel: int) -> Callable[[], Tensor]:
        """Start to send ``block`` to the next rank and to receive ``rows`` rows of the same shape from the one before.

        Call the result to wait for both and get the received rows. A block without rows is not sent. ``channel`` keeps messages
        apart that are sent at the same time.
        """
        sent, received = block.contiguous(), block.new_empty(rows, *block.shape[1:])
        operations = []
        if len(sent) > 0:
            operations.append(dist.P2POp(dist.isend, sent, self._next, self._group, channel))
        if rows > 0:
            operations.append(dist.P2POp(dist.irecv, received, self._previous, self._group, channel))
        works = dist.batch_isend_irecv(operations) if operations else []

        def arrived() -> Tensor:
            with self._world.collective("ring attention"):
                for work in works:
                    work.wait()

            return received

        return arrived

    def add_up(self, tensor: Tensor) -> None:
        """Replace ``tensor`` on every rank by the sum over the ring."""
        with self._world.collective("ring outputs"):
            dist.all_reduce(tensor, group=self._group)


DATA, TENSOR = "data", "tensor"


def grid(world: World) -> DeviceMesh:
    """All ranks as a mesh: a row for each group. Members are consecutive ranks, so they share a machine if they fit."""
    ranks = torch.arange(world.size).view(-1, world.tensor_size)
    return DeviceMesh(world.device.type, ranks, mesh_dim_names=(DATA, TENSOR))


def _is_grid(mesh: DeviceMesh) -> bool:
    """Whether it is one of ``grid``, and not only of sharding."""
    return mesh.mesh_dim_names == (DATA, TENSOR)


def split(block: nn.Module, mesh: DeviceMesh) -> None:
    """Split a decoder block of the Llama family in place, over a group of ranks that all have its full weights."""
    plan: dict[str, parallel.ParallelStyle] = {
        # the input enters once for all projections, and so does its gradient
        "self_attn": parallel.PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Replicate()},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        ),
        "mlp": parallel.PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)),
        **{f"self_attn.{name}_proj": parallel.ColwiseParallel() for name in ("q", "k", "v")},
        **{f"mlp.{name}_proj": parallel.ColwiseParallel() for name in ("gate", "up")},
        "self_attn.o_proj": parallel.RowwiseParallel(),
        "mlp.down_proj": parallel.RowwiseParallel(),
    }
    there = dict(block.named_modules())
    missing = [name for name in plan if name not in there]
    assert not missing, f"{type(block).__name__} has no {missing[0]}: not of the Llama family"
    # norms of single heads: every rank applies them to its own heads, and their gradients are summed over the group
    norms = [name for name in ("self_attn.q_norm", "self_attn.k_norm") if name in there]
    plan |= {name: parallel.SequenceParallel(sequence_dim=2, use_local_output=True) for name in norms}
    parallel.parallelize_module(block, mesh, plan, src_data_rank=None)


def whole(part: Tensor) -> Tensor:
    """Gather a parameter, moment or gradient from all ranks. Collective: all ranks call it together."""
    if not isinstance(part, DTensor):
        return part
    mesh, placements = part.device_mesh, part.placements
    if not _is_grid(mesh):
        return part.full_tensor()
    # FSDP2 sharded the part that tensor parallelism left: gather over the groups first, then inside of the group
    rows, shape = mesh[DATA], list(part.shape)
    if isinstance(placements[1], Shard):
        shape[placements[1].dim] //= mesh.size(1)
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    cut = DTensor.from_local(
        part.to_local(), rows, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
    ).full_tensor()
    return DTensor.from_local(cut, mesh[TENSOR], [placements[1]], run_check=False).full_tensor()


@torch.no_grad()
def copy_part(target: Tensor, full: Tensor) -> None:
    """Copy this rank's part of ``full``, which every rank has loaded itself, or all of it."""
    if not isinstance(target, DTensor):
        target.copy_(full)
        return
    mesh, placements = target.device_mesh, target.placements
    # split as in ``split``, then shard as FSDP2 does
    if _is_grid(mesh):
        if isinstance(placements[1], Shard):
            full = full.chunk(mesh.size(1), dim=placements[1].dim)[mesh.get_local_rank(TENSOR)]
        mesh, placements = mesh[DATA], (Shard(0),)
    own = distribute_tensor(full.to(target.to_local().device), mesh, placements, src_data_rank=None)
    target.to_local().copy_(own.to_local())


def clip_split_gradients(parameters: Iterable[Tensor], max_norm: float, world: World) -> float:
    """``torch.nn.utils.clip_grad_norm_`` for gradients of which some are sharded over all ranks and others only over groups."""
    own, square = [], 0.0
    for parameter in parameters:
        assert isinstance(parameter.grad, DTensor)
        own.append(parameter.grad.to_local())
        # an element on several ranks must count once in the sum over ranks
        mesh, placements = parameter.grad.device_mesh, parameter.grad.placements
        apart = [mesh.size(dim) for dim, placement in enumerate(placements) if not placement.is_replicate()]
        square += float(own[-1].double().square().sum()) / (world.size // math.prod(apart))
    norm = math.sqrt(world.sum("gradient norm", [square])[0])
    if math.isfinite(norm) and norm > max_norm:
        torch._foreach_mul_(own, max_norm / (norm + 1e-6))
    return norm
