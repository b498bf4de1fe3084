"""What the learner asks of a backend: gradients, steps and full tensors, whatever lies sharded underneath.

Three implementations, one shared test file: ``Replicated`` (one process, or ZeRO stage 0), ``Sharded`` (FSDP2) and
``DeepSpeed``. All keep float32 master weights and moments, sum gradients over ranks (the learner divides once, by a
global count) and know nothing of losses or batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from togi.config.choices import BackendName, GradAccumDtype
from togi.config.shared import TrainSettings
from togi.parallel.process import World


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """``--bf16``, ``--zero_stage``, ``--adam_betas``, ``--l2``, AdamW's epsilon, ``--backend`` and what only some have.

    bf16: compute in bfloat16 from float32 masters; otherwise everything is in the dtype of the parameters.
    zero_stage: 0 replicates; 1 shards masters and moments; 2 gradients too (reduced at every micro-batch); 3 also
    frees the gathered weights between forward and backward.
    adam_offload: masters and moments live in host memory, and AdamW runs there.
    overlap_comm, zpg (ranks that share one more copy of the weights, ZeRO++), bf16_accumulation (micro-batches are added
    up in bfloat16): of DeepSpeed. FSDP2 always overlaps, gathers over all ranks and adds up in float32.
    """

    bf16: bool = True
    zero_stage: int = 2
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    eps: float = 1e-8
    backend: BackendName = BackendName.FSDP2
    adam_offload: bool = False
    overlap_comm: bool = False
    zpg: int = 1
    bf16_accumulation: bool = False

    @property
    def partitions_parts(self) -> bool:
        """Whether DeepSpeed gets its weights part by part. The groups of ZeRO++ cannot be made ahead of the engine."""
        return self.backend is BackendName.DEEPSPEED and self.zero_stage == 3 and self.zpg == 1


def backend_options(config: TrainSettings, *, bf16: bool) -> BackendOptions:
    """What the flags of a command ask of a backend."""
    return BackendOptions(
        bf16=bf16,
        zero_stage=config.zero_stage,
        betas=config.adam_betas,
        weight_decay=config.l2,
        backend=config.backend,
        adam_offload=config.adam_offload,
        overlap_comm=config.overlap_comm,
        zpg=config.zpg,
        bf16_accumulation=bf16 and config.grad_accum_dtype is GradAccumDtype.BF16,
    )


class Backend(Protocol):
    """A trainable model on this rank. Every method but the properties is called by all ranks together."""

    @property
    def module(self) -> nn.Module:
        """The model to call: ``module(batch, needs, ...)``. Call the root, never a part of it."""
        ...

    @property
    def world(self) -> World: ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of ``loss`` to those held. After the ``last`` one they are summed over ranks."""
        ...

    def clip(self, max_norm: float) -> float:
        """Scale gradients down to a global L2 norm of ``max_norm`` (``math.inf``: do not); returns the norm before.

        Once a step, before ``step``, which may do the scaling.
        """
        ...

    def step(self, learning_rate: float) -> None:
        """One AdamW step on the held gradients, which are then dropped."""
        ...

    def drop_gradients(self) -> None: ...

    def full_parameters(
        self, dtype: torch.dtype | None = None, *, trained_only: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, whole and detached, on every rank, one at a time. ``dtype`` None gives the masters' own.

        ``trained_only`` leaves out those that are frozen, which then need not be gathered.
        """
        ...

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """What a resume needs, whole, one tensor at a time: masters and both moments of what is trained."""
        ...

    def load_state(self, read: Callable[[str], Tensor], steps: int) -> None:
        """Take back what ``state`` gave. ``read`` returns a whole tensor by name; ``steps`` have been taken."""
        ...

    def at_rest(self) -> Iterable[Tensor]:
        """What only a step and ``state`` read, on this rank: moments, masters beside the weights that compute, buffers.

        ``full_parameters`` in the dtype that computes does not. See ``togi.parallel.parking``.
        """
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The names and full shapes of the parameters that are trained."""
        ...


def decoder_blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: the children of its outermost module lists (experts stay with their block)."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [block for child in module.children() for block in decoder_blocks(child)]


def cast(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Change the dtype of floating-point parameters in place; buffers and quantised weights stay as they are."""
    for parameter in parameters:
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


Reader = Callable[[nn.Module], None]
"""Reads the weights of a part of a model that are still on disk (``togi.model.deferred``)."""


def nothing_left(part: nn.Module) -> None:
    """The reader of a model that was read at once."""


def check_same_weights(module: nn.Module, world: World) -> None:
    """Every rank must start from the same weights; a freshly drawn head needs the same seed everywhere. Shards are left out."""
    if world.size == 1:
        return
    # what DeepSpeed has partitioned looks empty
    whole = {n: p.detach() for n, p in module.named_parameters() if not isinstance(p, DTensor) and p.numel() > 0}
    marks = {name: int(torch.hash_tensor(weight).item()) for name, weight in whole.items()}
    others = world.gather("initial weights", marks)
    different = sorted(name for name in marks if any(other.get(name) != marks[name] for other in others))
    assert not different, f"ranks start from different weights, first {different[0]}: seed every rank alike"
