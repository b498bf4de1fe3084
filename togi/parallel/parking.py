"""``--trainer_enable_sleep``: free the memory of tensors that only an optimizer step needs, while other workers compute.

A parked tensor keeps its identity and loses its storage. Its bytes are kept in pinned host memory for an accelerator, and in an
unnamed temporary file for a CPU (in TMPDIR, which should not be in memory itself). Waking restores every bit. The backend knows
which tensors can be parked (``Backend.at_rest``). A parked tensor must not be read.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Iterable
from typing import IO

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from togi.plan.memory import Released, resident_bytes, return_freed


class Parking:
    """Parks the tensors that ``tensors`` yields at each ``sleep``, if they are on ``device``. Others are unchanged."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], device: torch.device) -> None:
        self._tensors = tensors
        self._device = device
        self._parked: list[tuple[torch.UntypedStorage, int]] = []
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the parking
        self._hosts: dict[int, Tensor] = {}
        self.is_asleep = False

    def sleep(self) -> Released:
        """Move the tensors out and free their memory. Returns the bytes moved, and the memory in use before and after."""
        before = self._used()
        if not self.is_asleep:
            self._file.seek(0)
            # by storage: tensors that share one are moved once
            storages = {storage.data_ptr(): storage for storage in map(_storage, self._tensors())}
            self._parked = [(s, s.nbytes()) for s in storages.values() if s.device.type == self._device.type]
            for number, (storage, _) in enumerate(self._parked):
                self._put_out(number, storage)
                # frees the memory; the tensor objects stay, which the optimizer and the modules refer to
                storage.resize_(0)
            self._return_freed()
            self.is_asleep = True
        return Released(sum(nbytes for _, nbytes in self._parked), before, self._used())

    def wake(self) -> None:
        """Allocate the tensors again and restore their content."""
        if self.is_asleep:
            self._file.seek(0)
            for number, (storage, nbytes) in enumerate(self._parked):
                storage.resize_(nbytes)
                self._bring_back(number, storage)
            self.is_asleep = False
            self._parked = []

    def _put_out(self, number: int, storage: torch.UntypedStorage) -> None:
        if self._device.type == "cpu":
            self._file.write(_view(storage))
            return
        # pinned memory is slow to allocate: keep it for the next sleep
        host = self._hosts.get(number)
        if host is None or host.numel() != storage.nbytes():
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
        self._hosts[number] = host.copy_(_bytes_of(storage))

    def _bring_back(self, number: int, storage: torch.UntypedStorage) -> None:
        if self._device.type == "cpu":
            read = self._file.readinto(_view(storage))  # type: ignore[attr-defined]
            assert read == storage.nbytes()
        else:
            _bytes_of(storage).copy_(self._hosts[number])

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
