"""AdamW, and where tensors lie that are not needed all the time.

The fused AdamW has its state before the first step, so that a checkpoint always has the same tensors. ``HostWeights`` are frozen
weights in host memory, which are copied to the device only for the forwards that use them. ``Parking`` is
``--trainer_enable_sleep``: free the memory of tensors that only an optimizer step needs, while other workers compute.

A parked tensor keeps its identity and loses its storage. Its bytes are kept in pinned host memory for an accelerator, and in an
unnamed temporary file for a CPU (in TMPDIR, which should not be in memory itself). Waking restores every bit. The backend knows
which tensors can be parked (``Backend.at_rest``). A parked tensor must not be read.
"""

from __future__ import annotations

import ctypes
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from mmap import PAGESIZE
from typing import IO

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from togi.cpu import HostKernels, Rates
from togi.parallel.backend import BackendOptions
from togi.parallel.groups import copy_part, whole
from togi.parallel.process import World
from togi.plan.machine import Released, resident_bytes, return_freed

MOMENTS = ("exp_avg", "exp_avg_sq")
ALIGNMENT = 256
"""Weights in one piece of memory begin at multiples of so many bytes, as separate allocations do."""


def make_adamw(parameters: Mapping[str, Tensor], options: BackendOptions) -> torch.optim.AdamW:
    """Make AdamW (Loshchilov & Hutter, 2019) over ``parameters``, with its state."""
    optimizer = adamw_without_state(parameters, options, {name: tuple(p.shape) for name, p in parameters.items()})
    add_state(optimizer, parameters.values())
    return optimizer


def adamw_without_state(
    parameters: Mapping[str, Tensor], options: BackendOptions, shapes: Mapping[str, tuple[int, ...]]
) -> torch.optim.AdamW:
    """``shapes``: of the full parameters. One-dimensional ones (biases, norm weights) get no weight decay.

    A fused kernel takes only parameters of one device mesh, so each mesh has its own group.
    """
    decayed = [p for name, p in parameters.items() if len(shapes[name]) > 1]
    others = [p for name, p in parameters.items() if len(shapes[name]) <= 1]
    groups: list[dict[str, object]] = []
    for chosen, decay in ((decayed, options.l2), (others, 0.0)):
        by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
        for parameter in chosen:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
        groups += [{"params": own, "weight_decay": decay} for own in by_mesh.values()]
    return torch.optim.AdamW(groups, lr=0.0, betas=options.adam_betas, eps=options.eps, fused=True)


def add_state(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """Add zero moments and a step count for each parameter."""
    for parameter in parameters:
        state = optimizer.state[parameter]
        # a tensor on the device, as the fused kernel requires
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter, requires_grad=False)


def moments(optimizer: torch.optim.AdamW) -> list[Tensor]:
    """Both moments of every parameter."""
    return [state[moment] for state in optimizer.state.values() for moment in MOMENTS]


def set_rate(optimizer: torch.optim.AdamW, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def take_step(optimizer: torch.optim.AdamW, learning_rate: float) -> None:
    """Step at ``learning_rate`` and free the gradients."""
    set_rate(optimizer, learning_rate)
    optimizer.step()
    optimizer.zero_grad()


def take_host_step(
    kernels: HostKernels,
    optimizer: torch.optim.AdamW,
    learning_rate: float,
    factor: float,
    parts: Mapping[Tensor, tuple[Tensor | None, Tensor]],
) -> None:
    """``take_step`` in host memory by a C kernel, in one pass over all tensors.

    ``parts``: for each parameter its gradient, which is multiplied by ``factor``, and the bfloat16 working copy to write. A
    gradient of None counts as zero: the parameter had no part in the step, and its moments decay.
    """
    set_rate(optimizer, learning_rate)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient, working = parts[parameter]
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            state = optimizer.state[parameter]
            state["step"] += 1
            steps = int(state["step"])
            rates = Rates(learning_rate, group["weight_decay"], group["betas"], group["eps"], steps, factor)
            kernels.adamw(parameter, (state["exp_avg"], state["exp_avg_sq"]), gradient, working, rates)


class Stepped:
    """What backends have in common that step ``_masters``, whole or sharded by torch, with torch's AdamW."""

    module: nn.Module
    world: World
    _masters: Mapping[str, Tensor]
    _optimizer: torch.optim.AdamW

    def full_parameters(
        self, dtype: torch.dtype | None = None, *, trained_only: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            if trained_only and name not in self._masters:
                continue
            # a working copy is the rounded master: take it if it has the requested dtype
            best = parameter if dtype is parameter.dtype else self._masters.get(name, parameter)
            # cast before gathering: a bfloat16 copy is half the traffic
            part = best.detach().to(self.world.device, best.dtype if dtype is None else dtype)
            with self.world.collective(f"full parameter {name}"):
                full = whole(part)
            yield name, full

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name, master in self._masters.items():
            tensors = {"master": master.detach(), **{m: self._optimizer.state[master][m] for m in MOMENTS}}
            for kind, part in tensors.items():
                with self.world.collective(f"{kind} of {name}"):
                    full = whole(part)
                yield f"{kind}/{name}", full

    def load_state(self, read: Callable[[str], Tensor], steps: int) -> None:
        for name, master in self._masters.items():
            state = self._optimizer.state[master]
            for kind, part in {"master": master, **{moment: state[moment] for moment in MOMENTS}}.items():
                copy_part(part, read(f"{kind}/{name}"))
            state["step"].fill_(steps)

    def at_rest(self) -> Iterable[Tensor]:
        return moments(self._optimizer)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(master.shape) for name, master in self._masters.items()}


def fill_missing_gradients(parameters: Mapping[str, Tensor]) -> None:
    """Give each parameter without a gradient a zero gradient, so that all ranks step the same parameters."""
    for parameter in parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move the buffers of ``module`` to ``device``. Its weights stay where they are."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def pinned(nbytes: int) -> Tensor:
    """Host memory that an accelerator copies at full speed (uint8, uninitialised). Keep the tensor while its memory is used.

    Torch rounds each of its own pinned allocations up to a power of two. So on CUDA pages of plain memory are pinned.
    """
    if not torch.cuda.is_available():
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.accelerator.is_available())
    # whole pages, since a page cannot be pinned twice
    pages = -(-nbytes // PAGESIZE) * PAGESIZE
    room = torch.empty(pages + PAGESIZE, dtype=torch.uint8)
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    host = room[-room.data_ptr() % PAGESIZE :][:nbytes]
    torch.cuda.check_error(cudart.cudaHostRegister(host.data_ptr(), pages, 0))
    weakref.finalize(host, cudart.cudaHostUnregister, host.data_ptr())
    return host


class HostWeights:
    """The weights of a frozen ``module`` in host memory. Its buffers, which are small, stay on the device.

    Weights are never copied back, because a frozen weight is the same in both places. Beside an accelerator they are in one piece
    of pinned memory.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        move_buffers(module, device)
        self._device = device
        weights = list(module.parameters())
        if torch.accelerator.is_available():
            sizes = [-(-weight.nbytes // ALIGNMENT) * ALIGNMENT for weight in weights]
            self._memory = pinned(sum(sizes))
            for weight, part in zip(weights, torch.split(self._memory, sizes), strict=True):
                weight.data = part[: weight.nbytes].view(weight.dtype).view(weight.shape).copy_(weight.data)
        numbers = {weight: number for number, weight in enumerate(weights)}  # a tied weight is one tensor in two places
        self._places = [
            (part, name, numbers[weight])
            for part in module.modules()
            for name, weight in part.named_parameters(recurse=False)
        ]
        self._hosts = [_frozen(weight.data.cpu()) for weight in weights]
        self._put(self._hosts)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Copy the weights to the device; inside the block the module can be called. Its outputs stay valid afterwards."""
        self._put([_frozen(host.data.to(self._device, non_blocking=True)) for host in self._hosts])
        try:
            yield
        finally:
            # the modules refer to the host copies again, so the device copies are freed
            self._put(self._hosts)

    def _put(self, weights: Sequence[nn.Parameter]) -> None:
        for part, name, number in self._places:
            setattr(part, name, weights[number])


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


class Parking:
    """Parks the tensors that ``tensors`` yields at each ``sleep``, if they are on ``device``. Others are unchanged."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], device: torch.device) -> None:
        self._tensors = tensors
        self._device = device
        self._parked: list[tuple[torch.UntypedStorage, slice]] = []
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the parking
        # kept from one sleep to the next, because pinned memory is slow to allocate; None: the file is used
        self._host = None if device.type == "cpu" else torch.empty(0, dtype=torch.uint8)
        self.is_asleep = False

    def sleep(self) -> Released:
        """Move the tensors out and free their memory. Returns the bytes moved, and the memory in use before and after."""
        before = self._used()
        if not self.is_asleep:
            self._file.seek(0)
            # by storage: tensors that share one are moved once
            every = {storage.data_ptr(): storage for storage in map(_storage, self._tensors())}
            storages = [storage for storage in every.values() if storage.device.type == self._device.type]
            bounds = list(accumulate((storage.nbytes() for storage in storages), initial=0))
            self._parked = list(zip(storages, (slice(*ends) for ends in pairwise(bounds)), strict=True))
            if self._host is not None and len(self._host) != bounds[-1]:
                self._host = pinned(bounds[-1])
            for storage, place in self._parked:
                self._put_out(storage, place)
                # frees the memory; the tensor objects stay, which the optimizer and the modules refer to
                storage.resize_(0)
            self._return_freed()
            self.is_asleep = True
        return Released(self._parked[-1][1].stop if self._parked else 0, before, self._used())

    def wake(self) -> None:
        """Allocate the tensors again and restore their content."""
        if self.is_asleep:
            self._file.seek(0)
            for storage, place in self._parked:
                storage.resize_(place.stop - place.start)
                self._bring_back(storage, place)
            self.is_asleep = False
            self._parked = []

    def _put_out(self, storage: torch.UntypedStorage, place: slice) -> None:
        if self._host is None:
            self._file.write(_view(storage))
        else:
            self._host[place].copy_(_bytes_of(storage))

    def _bring_back(self, storage: torch.UntypedStorage, place: slice) -> None:
        if self._host is None:
            read = self._file.readinto(_view(storage))  # type: ignore[attr-defined]
            assert read == storage.nbytes()
        else:
            _bytes_of(storage).copy_(self._host[place])

    def _return_freed(self) -> None:
        """Return freed memory to the system. Torch and the C library would keep it, and other processes could not use it."""
        if self._device.type == "cpu":
            return_freed()
        else:
            torch.accelerator.empty_cache()

    def _used(self) -> int:
        if self._device.type == "cpu":
            return resident_bytes()
        return int(torch.accelerator.memory_reserved(self._device))


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part.detach().untyped_storage()


def _view(storage: torch.UntypedStorage) -> memoryview:
    """The bytes of a storage in host memory. Not through NumPy, after which a storage cannot be resized."""
    area = ctypes.c_char * storage.nbytes()
    return memoryview(area.from_address(storage.data_ptr())).cast("B")


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
