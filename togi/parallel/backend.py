"""The ``Backend`` protocol of the learner: gradients, steps and full tensors, for any kind of sharding.

Three implementations share one test file: ``Replicated`` (one process, or ZeRO stage 0), ``Sharded`` (FSDP2) and ``DeepSpeed``.
All keep float32 master weights and moments, and sum gradients over ranks (the learner divides once, by a global count). They do
not depend on losses or batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from togi.config.choices import BackendName, GradAccumDtype
from togi.config.shared import TrainSettings
from togi.parallel.process import World


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """Settings of training by the names of their flags, and AdamW's epsilon.

    bf16: compute in bfloat16 from float32 masters; otherwise everything is in the dtype of the parameters.
    zero_stage: 0 replicates; 1 shards masters and moments; 2 shards gradients too (reduced at every micro-batch); 3 also
    frees the gathered weights between forward and backward.
    fsdp_shard_size: FSDP2 shards over so many consecutive ranks, and each such group has a copy; None: over all ranks.
    adam_offload: masters and moments are in host memory, and AdamW runs there.
    overlap_comm, zpg (the number of ranks that share a second copy of the weights, ZeRO++) and grad_accum_dtype (in which
    gradients of micro-batches are summed) are DeepSpeed's. FSDP2 always overlaps and sums in float32.
    """

    bf16: bool = True
    zero_stage: int = 2
    adam_betas: tuple[float, float] = (0.9, 0.95)
    l2: float = 0.0
    eps: float = 1e-8
    backend: BackendName = BackendName.FSDP2
    adam_offload: bool = False
    overlap_comm: bool = False
    fsdp_shard_size: int | None = None
    zpg: int = 1
    grad_accum_dtype: GradAccumDtype = GradAccumDtype.FP32

    @classmethod
    def of(cls, config: TrainSettings) -> Self:
        """The options from the flags of a command."""
        return cls(**config.model_dump(include={field.name for field in fields(cls)}))

    @property
    def partitions_parts(self) -> bool:
        """Whether DeepSpeed loads its weights part by part. With ZeRO++ it cannot: the engine must make the groups first."""
        return self.backend is BackendName.DEEPSPEED and self.zero_stage == 3 and self.zpg == 1


class Backend(Protocol):
    """A trainable model on this rank. All methods are collective: all ranks call them together."""

    module: nn.Module
    """The model: ``module(batch, needs, ...)``. Call the root, never a part of it, so that the hooks of sharding run."""
    world: World

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradients of ``loss``. After the ``last`` call of a step they are summed over ranks."""

    def clip(self, max_norm: float) -> float:
        """Clip gradients to a global L2 norm of ``max_norm`` (``math.inf``: no clip). Returns the norm before clipping.

        Call it once a step, before ``step``, which may do the scaling.
        """

    def step(self, learning_rate: float) -> None:
        """One AdamW step on the accumulated gradients, which are then freed."""

    def drop_gradients(self) -> None: ...

    def full_parameters(
        self, dtype: torch.dtype | None = None, *, trained_only: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Gather every parameter, full and detached, on every rank, one at a time. ``dtype`` None gives the masters' dtype.

        ``trained_only`` skips frozen parameters, which then need not be gathered.
        """

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The state for a resume, one full tensor at a time: masters and both moments of the trainable parameters."""

    def load_state(self, read: Callable[[str], Tensor], steps: int) -> None:
        """Load what ``state`` yielded. ``read`` returns a full tensor by name; ``steps``: optimizer steps taken so far."""

    def at_rest(self) -> Iterable[Tensor]:
        """This rank's tensors that only ``step`` and ``state`` read: moments, masters beside the working weights, buffers.

        ``full_parameters`` in the dtype of the working weights does not read them. See ``togi.parallel.optimizer``.
        """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The names and full shapes of the trainable parameters."""


def decoder_blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: the children of its outermost module lists (experts stay with their block)."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [block for child in module.children() for block in decoder_blocks(child)]


def cast(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Change the dtype of floating-point parameters in place. Buffers and quantised weights are unchanged."""
    for parameter in parameters:
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def check_same_weights(module: nn.Module, world: World) -> None:
    """Check that every rank starts from the same weights. A new head needs the same seed on all ranks. Shards are skipped."""
    if world.size == 1:
        return
    # parameters that DeepSpeed has partitioned look empty
    whole = {n: p.detach() for n, p in module.named_parameters() if not isinstance(p, DTensor) and p.numel() > 0}
    marks = {name: int(torch.hash_tensor(weight).item()) for name, weight in whole.items()}
    others = world.gather("initial weights", marks)
    different = sorted(name for name in marks if any(other.get(name) != marks[name] for other in others))
    assert not different, f"ranks start from different weights, first {different[0]}: seed every rank alike"
