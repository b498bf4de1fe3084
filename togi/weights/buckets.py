"""Weight updates from a trainer to a generation engine: which tensors are sent (manifest) and how (buckets).

The engine checks the manifest before any tensor is sent. So a wrong name, shape or dtype is an error that names it, never a hang
or a half-updated model. Buckets are flat byte arrays: a few large transfers in place of one for each parameter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor by its Hugging Face checkpoint name. ``dtype`` is torch's name without the prefix ("bfloat16")."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorSpec:
        return cls(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    @property
    def nbytes(self) -> int:
        itemsize: int = getattr(torch, self.dtype).itemsize
        return int(np.prod(self.shape, dtype=np.int64)) * itemsize


@dataclass(frozen=True, slots=True)
class Manifest:
    """All tensors that one weight update sends: the whole model, or only a LoRA adapter (``togi.weights.adapters``).

    ``adapter_scale``: alpha / rank of an adapter; None if the whole model is sent.
    """

    version: int
    tensors: tuple[TensorSpec, ...]
    adapter_scale: float | None = None

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors)


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Consecutive tensors of a manifest in one flat array of bytes; ``offsets`` are in bytes.

    In host memory ``data`` is an array, on a GPU a tensor.
    """

    tensors: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    data: NDArray[np.uint8] | Tensor

    @classmethod
    def of(cls, tensors: tuple[TensorSpec, ...], offsets: tuple[int, ...], data: Tensor) -> Self:
        """A bucket over the memory of ``data`` (uint8)."""
        return cls(tensors, offsets, data.numpy() if data.device.type == "cpu" else data)

    def as_tensor(self) -> Tensor:
        """``data`` as a tensor over the same memory."""
        return self.data if isinstance(self.data, Tensor) else torch.from_numpy(self.data)

    def own(self) -> Bucket:
        """A bucket that no one else can write to: itself if its memory is read-only, else a copy."""
        if isinstance(self.data, np.ndarray) and not self.data.flags.writeable:
            return self
        copied = self.data.clone() if isinstance(self.data, Tensor) else self.data.copy()
        return Bucket(self.tensors, self.offsets, copied)

    def unpack(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) as read-only views of ``data``. Clone a tensor that outlives the bucket."""
        for spec, (name, raw) in zip(self.tensors, self.contents(), strict=True):
            yield name, raw.view(getattr(torch, spec.dtype)).view(spec.shape)

    def contents(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, bytes) of each tensor, as views of ``data``."""
        raw = self.as_tensor()
        for spec, offset in zip(self.tensors, self.offsets, strict=True):
            yield spec.name, raw[offset : offset + spec.nbytes]


class Checksum:
    """A checksum over the names and contents of an update's tensors, which does not depend on the buckets.

    It finds lost, stale or damaged tensors. The content of a tensor enters as the exclusive or of its 8-byte words, which runs at
    the speed of memory.
    """

    def __init__(self) -> None:
        self._marks: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Add tensors, or their bytes, on whatever device they are: they stay there."""
        for name, tensor in tensors:
            self._marks[name] = _mark(_bytes_of(tensor))

    def digest(self) -> str:
        """A hex string that is the same in every process that added the same tensors."""
        marks = {
            name: int(words.item()) ^ int.from_bytes(bytes(rest.tolist()), "little")
            for name, (words, rest) in self._marks.items()
        }
        return hashlib.blake2b(repr(sorted(marks.items())).encode(), digest_size=16).hexdigest()


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _mark(raw: Tensor) -> tuple[Tensor, Tensor]:
    """The exclusive or of the whole 8-byte words of ``raw``, and the bytes after them.

    Both stay on the device: to read each at once would wait for the device at every tensor.
    """
    if raw.storage_offset() % 8 != 0:  # no view of 8-byte words
        raw = raw.clone()
    whole = len(raw) // 8 * 8
    words = torch.hash_tensor(raw[:whole].view(torch.int64)) if whole > 0 else torch.zeros((), dtype=torch.uint64)
    return words, raw[whole:].clone()


def pack_buckets(
    tensors: Iterable[tuple[str, Tensor]], max_bytes: int, device: torch.device | None = None
) -> Iterator[Bucket]:
    """Buckets of ``grouped`` tensors. ``device``: the memory of the buckets, by default the host's."""
    return (fill(group, torch.device("cpu") if device is None else device) for group in grouped(tensors, max_bytes))


Group = list[tuple[TensorSpec, Tensor]]


def grouped(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[Group]:
    """Group tensors, in order, into groups of at most ``max_bytes`` (a larger tensor gets one of its own)."""
    group: Group = []
    size = 0
    for name, tensor in tensors:
        spec = TensorSpec.of(name, tensor)
        if group and size + spec.nbytes > max_bytes:
            yield group
            group, size = [], 0
        group.append((spec, tensor))
        size += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    if group:
        yield group


def fill(group: Group, device: torch.device) -> Bucket:
    """A bucket in the memory of ``device`` with copies of these tensors."""
    # each tensor starts at a multiple of ALIGNMENT, so that a view of any dtype is aligned
    offsets, end = [], 0
    for spec, _ in group:
        offsets.append(end)
        end += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    raw = torch.empty(end, dtype=torch.uint8, device=device)
    for (spec, tensor), offset in zip(group, offsets, strict=True):
        raw[offset : offset + spec.nbytes].copy_(_bytes_of(tensor.to(device)))
    return Bucket.of(tuple(spec for spec, _ in group), tuple(offsets), raw)


def differences(expected: Iterable[TensorSpec], offered: Iterable[TensorSpec], limit: int = 5) -> list[str]:
    """Say how two sets of tensors differ, for at most ``limit`` tensors. Returns an empty list if they agree."""
    want = {spec.name: spec for spec in expected}
    have = {spec.name: spec for spec in offered}
    lines = [f"{name} is missing" for name in want if name not in have]
    lines += [f"{name} is not expected" for name in have if name not in want]
    for name in want.keys() & have.keys():
        a, b = want[name], have[name]
        if a != b:
            lines.append(f"{name} is {b.dtype}{list(b.shape)}, expected {a.dtype}{list(a.shape)}")
    lines.sort()
    return lines if len(lines) <= limit else [*lines[:limit], f"and {len(lines) - limit} more"]
