"""ZeRO stages 1 to 3 with DeepSpeed's engine, behind the same protocol as the other backends.

DeepSpeed averages gradients over ranks and expects a fixed number of micro-batches a step. Here gradients are summed: the loss
is multiplied by the number of ranks, which cancels the average. ``last`` marks the end of a step, so any number of micro-batches
works. Gradients are reduced in float32. The optimizer is torch's fused AdamW, on the host and on the device: DeepSpeed's own C++
optimizer compiles for minutes at its first use. DeepSpeed's checkpoints are not used, because whole tensors by name fit every
backend and number of ranks.

Under stage 3 a model is partitioned part by part, so that weights on disk are loaded as they are needed. The other stages have
whole weights anyway. Written for DeepSpeed 0.19. It uses internals of its optimizers where there is no public call: the norm
before the step, dropping gradients, moments before the first step.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from togi.device import default_device
from togi.errors import ConfigError
from togi.parallel.backend import BackendOptions, cast, check_same_weights, decoder_blocks
from togi.parallel.optimizer import MOMENTS, adamw_without_state, add_state, moments, set_rate
from togi.parallel.process import World
from togi.parallel.replicated import BUCKET_ELEMENTS
from togi.weights.files import Reader, nothing_left

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed calls collectives by names that torch has deprecated.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
# Set before the import, when DeepSpeed detects the accelerator.
if default_device().type == "cpu":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402
from deepspeed import utils  # noqa: E402
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer  # noqa: E402
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer  # noqa: E402

EXPERTS = "experts"
# Under stage 3 working copies up to this size stay whole on every rank: gathering norm weights costs more than it saves.
RESIDENT_ELEMENTS = 100_000
MASTER = "master"


class DeepSpeed:
    """The ``Backend`` that trains with DeepSpeed's ZeRO, in one process or several."""

    def __init__(self, module: nn.Module, world: World, options: BackendOptions, read: Reader = nothing_left) -> None:
        assert options.zero_stage in (1, 2, 3)
        if world.size % options.zpg != 0:
            raise ConfigError(
                f"--zpg {options.zpg} must divide the number of workers of a model, which is {world.size}."
            )
        _meet(world)
        self._shapes = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
        # load the weights: part by part where DeepSpeed can partition them, else whole
        parts = {}
        if options.zero_stage == 3:
            _mark_sparse_blocks(module)
        if options.partitions_parts:
            parts = _partition(module, world, options, read)
        else:
            read(module)
            check_same_weights(module, world)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        # DeepSpeed rounds the weights to bfloat16 before it makes the masters: keep the loaded ones and set them below.
        loaded = {name: p.data for name, p in trained.items()} if options.bf16 and not parts else {}
        self._adamw = adamw_without_state(trained, options, self._shapes)
        # the engine; its hooks run between _unwrap and _wrap and see only the outputs' tensors
        module.register_forward_hook(_unwrap)
        with redirect_stdout(StringIO()):  # memory reports
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=self._adamw, config=_config(world, options), dist_init_required=False
            )
        module.register_forward_hook(_wrap)
        self.module, self.world = module, world
        self._options, self._trained = options, trained
        # moments exist before the first step, and masters have the loaded precision
        kinds = {BF16_Optimizer: _FirstStage, DeepSpeedZeroOptimizer: _SecondStage}
        self._zero: _Shards = kinds.get(type(self._engine.optimizer), _ThirdStage)(self._engine.optimizer)
        add_state(self._adamw, self._zero.masters())
        self._zero.link_state()
        if loaded:
            self._set(lambda name: {MASTER: loaded[name]})
        for name, part in parts.items():
            utils.safe_set_local_fp32_param(trained[name], part)

    def backward(self, loss: Tensor, last: bool) -> None:
        optimizer = self._engine.optimizer
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed does this in hooks on outputs that are tensors. Togi's outputs are records, so it is done here.
        optimizer.clear_backward_seen_flag()
        optimizer.backward_prologue()
        optimizer.enter_backward()
        with self.world.collective("backward"):
            self._engine.backward(loss * self.world.size)

    def clip(self, max_norm: float) -> float:
        with self.world.collective("gradient norm"):
            norm = self._zero.norm()
        # the step scales the gradients, by the same norm
        self._engine.optimizer.clip_grad = max_norm if math.isfinite(max_norm) else 0.0
        return norm if norm >= 0 else math.nan  # DeepSpeed returns -1 for a norm that is not finite

    def step(self, learning_rate: float) -> None:
        set_rate(self._adamw, learning_rate)
        with self.world.collective("optimizer step"):
            self._engine.step()
        assert self._engine.was_step_applied(), "a step on gradients that are not finite"
        self.drop_gradients()

    def drop_gradients(self) -> None:
        self._zero.drop_gradients()
        self._engine.optimizer.clip_grad = 0.0

    def full_parameters(
        self, dtype: torch.dtype | None = None, *, trained_only: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            if trained_only and name not in self._trained:
                continue
            from_master = self._options.bf16 and dtype is not torch.bfloat16 and name in self._trained
            with self.world.collective(f"full parameter {name}"):
                whole = utils.safe_get_full_fp32_param(parameter) if from_master else _gathered(parameter)
            yield name, whole if dtype is None else whole.to(dtype)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._trained.items():
            for kind in (MASTER, *MOMENTS):
                with self.world.collective(f"{kind} of {name}"):
                    if kind == MASTER:
                        whole = utils.safe_get_full_fp32_param(parameter)
                    else:
                        whole = utils.safe_get_full_optimizer_state(parameter, kind)
                yield f"{kind}/{name}", whole

    def load_state(self, read: Callable[[str], Tensor], steps: int) -> None:
        self._set(lambda name: {kind: read(f"{kind}/{name}") for kind in (MASTER, *MOMENTS)})
        for master in self._zero.masters():
            self._adamw.state[master]["step"].fill_(steps)

    def at_rest(self) -> Iterable[Tensor]:
        return [*self._zero.masters(), *moments(self._adamw), *self._zero.buffers()]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def _set(self, values: Callable[[str], dict[str, Tensor]]) -> None:
        """Set masters and moments from ``values(name)``, and round the masters into the working copies."""
        for name, parameter in self._trained.items():
            for kind, value in values(name).items():
                if kind == MASTER:
                    utils.safe_set_full_fp32_param(parameter, value)
                    self._zero.set_working(parameter, value)
                else:
                    utils.safe_set_full_optimizer_state(parameter, value, kind)
        self._zero.refresh()


class _Shards(ABC):
    """The operations that differ between DeepSpeed's optimizers. As written here the working copies are whole on every rank."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def masters(self) -> list[Tensor]:
        """This rank's flat float32 tensors, which AdamW updates."""
        return [group["params"][0] for group in self._optimizer.optimizer.param_groups]

    def link_state(self) -> None:
        """Link the moments to DeepSpeed's own records of them."""
        self._optimizer._lazy_init_hp_params_optimizer_state()

    def buffers(self) -> list[Tensor]:
        """The buffers of gradients. They hold no data between two steps."""
        return []

    @abstractmethod
    def norm(self) -> float:
        """The global L2 norm of the gradients. Negative or infinite if they are not finite."""

    @abstractmethod
    def drop_gradients(self) -> None: ...

    def set_working(self, parameter: nn.Parameter, value: Tensor) -> None:  # noqa: B027
        """Round ``value``, the new master of ``parameter``, into the working copy, or leave it to ``refresh``."""

    def refresh(self) -> None:
        """Round the masters into the working copies, unless ``set_working`` has done it."""
        self._optimizer.update_lp_params()


class _FirstStage(_Shards):
    """Stage 1 with bfloat16: gradients are whole on every rank too, in float32."""

    def buffers(self) -> list[Tensor]:
        return [*self._optimizer.fp32_groups_gradients_flat]

    def norm(self) -> float:
        return float(get_global_norm_of_tensors(self._optimizer.get_grads_for_norm()[0]))

    def drop_gradients(self) -> None:
        self._optimizer.clear_hp_grads()
        self._optimizer.clear_lp_grads(set_to_none=True)


class _SecondStage(_Shards):
    """Stage 2, and stage 1 in float32 or with offload."""

    def norm(self) -> float:
        return float(self._optimizer.scaled_global_norm())

    def drop_gradients(self) -> None:
        optimizer = self._optimizer
        optimizer.zero_grad()
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        for group in range(len(optimizer.bit16_groups)):
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
            _zero_gradients(self.masters())


class _ThirdStage(_Shards):
    """Stage 3: every rank holds a partition of each parameter."""

    def masters(self) -> list[Tensor]:
        return [*self._optimizer.fp32_partitioned_groups_flat]

    def link_state(self) -> None:
        pass

    def buffers(self) -> list[Tensor]:
        return [self._optimizer.grad_partitions_flat_buffer]

    def norm(self) -> float:
        return float(combine_grad_norm_groups(self._optimizer._get_norm_groups()))

    def drop_gradients(self) -> None:
        optimizer = self._optimizer
        optimizer.zero_grad()
        optimizer.averaged_gradients = {}
        # a parameter without a gradient in a step would keep the old content of the buffer
        optimizer.grad_partitions_flat_buffer.zero_()
        if optimizer.offload_optimizer:
            optimizer.reset_cpu_buffers()
            _zero_gradients(self.masters())

    def set_working(self, parameter: nn.Parameter, value: Tensor) -> None:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(value)

    def refresh(self) -> None:
        self._optimizer.invalidate_secondary_tensor()


def _zero_gradients(masters: Iterable[Tensor]) -> None:
    for master in masters:
        if master.grad is not None:
            master.grad.zero_()


def _gathered(parameter: nn.Parameter) -> Tensor:
    """The full working copy. Under stage 3 a clone of it, because the gathered one is freed again."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _meet(world: World) -> None:
    """Let DeepSpeed use the existing process group, and no extension that must be compiled first."""
    world.open_group()
    os.environ["LOCAL_RANK"] = str(world.device.index or 0)
    # On the CPU this is the number of devices. Without it DeepSpeed calls numactl.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", str(world.size)))
    # DeepSpeed's switch for an all-reduce through shared memory: it is in C++ and for inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


def _config(world: World, options: BackendOptions) -> dict[str, object]:
    return {
        # the learner forms the batches: DeepSpeed uses these numbers only to count samples
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "bf16": {"enabled": options.bf16},
        "data_types": {"grad_accum_dtype": options.grad_accum_dtype.value},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": options.zero_stage,
            "overlap_comm": options.overlap_comm,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "zero_hpz_partition_size": options.zpg,
            "stage3_param_persistence_threshold": RESIDENT_ELEMENTS,
            "offload_optimizer": {
                "device": "cpu" if options.adam_offload else "none",
                "pin_memory": options.adam_offload and world.device.type != "cpu",
            },
        },
    }


def _partition(module: nn.Module, world: World, options: BackendOptions, read: Reader) -> dict[str, Tensor]:
    """Load and partition one part after the other. Returns this rank's partition of each trainable weight before rounding."""
    parts: dict[str, Tensor] = {}
    for part in (*decoder_blocks(module), module):
        read(part)
        check_same_weights(part, world)
        names = {parameter: name for name, parameter in module.named_parameters()}
        fresh = [parameter for parameter in part.parameters() if not hasattr(parameter, "ds_id")]
        unrounded: dict[Any, Tensor] = {p: p.data for p in fresh if p.requires_grad and options.bf16}
        if options.bf16:
            cast(fresh, torch.bfloat16)
        with redirect_stdout(StringIO()):
            deepspeed.zero.Init(module=part, config_dict_or_path=_config(world, options), dtype=fresh[0].dtype)
        # keep only this rank's partition in float32, and free the whole weights one by one
        while unrounded:
            parameter, whole = unrounded.popitem()
            size = parameter.ds_tensor.ds_numel
            own = whole.flatten()[world.rank * size : (world.rank + 1) * size]
            parts[names[parameter]] = nn.functional.pad(own.float(), (0, size - len(own)))
    return parts


def _mark_sparse_blocks(module: nn.Module) -> None:
    """Gather a block of experts as a whole, because different ranks run different experts of it."""
    sparse = {type(part) for part in module.modules() if EXPERTS in dict(part.named_children())}
    if sparse:
        utils.set_z3_leaf_modules(module, list(sparse))


class _Tensors(dict[str, Tensor]):
    """The differentiable outputs of a forward as a dict, in which DeepSpeed's hooks on the model find tensors."""

    def __init__(self, record: Any) -> None:
        self.record = record
        super().__init__({name: v for name, v in vars(record).items() if isinstance(v, Tensor) and v.requires_grad})


def _unwrap(module: nn.Module, inputs: object, record: object) -> _Tensors:
    """The first forward hook, before DeepSpeed's: from a record to a dict."""
    return _Tensors(record)


def _wrap(module: nn.Module, inputs: object, tensors: _Tensors) -> object:
    """The last forward hook, after DeepSpeed's: back to the record."""
    return dataclasses.replace(tensors.record, **tensors)
