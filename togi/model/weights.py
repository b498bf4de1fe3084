"""Weights on their way from a trainer to a generation engine: what will be sent (manifest) and how (buckets).

The manifest is agreed before a byte moves, so a wrong name, shape or dtype is an error that names it, never a hang or a
half-updated model. Buckets are flat byte arrays: a few large transfers instead of one for each parameter.
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
    """Everything that one weight update will send: all weights, or a LoRA adapter alone (``togi.model.adapter_update``).

    ``adapter_scale``: alpha / rank of an adapter; None where whole weights are sent.
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
        """A bucket that nobody else can write into: itself if nobody can at all, else a copy."""
        if isinstance(self.data, np.ndarray) and not self.data.flags.writeable:
            return self
        copied = self.data.clone() if isinstance(self.data, Tensor) else self.data.copy()
        return Bucket(self.tensors, self.offsets, copied)

    def unpack(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors, as read-only views of ``data``: clone what outlives the bucket."""
        raw = self.as_tensor()
        for spec, offset in zip(self.tensors, self.offsets, strict=True):
            view = raw[offset : offset + spec.nbytes].view(getattr(torch, spec.dtype))
            yield spec.name, view.view(spec.shape)


class Checksum:
    """Of all tensors of an update by name and content, whatever buckets they came in: finds what is lost, old or damaged.

    Of each tensor's content it is the exclusive or of its 8-byte words, which runs at the speed of memory.
    """

    def __init__(self) -> None:
        self._marks: dict[str, int] = {}

    def add(self, bucket: Bucket) -> None:
        """Take in the tensors of a bucket."""
        raw = bucket.as_tensor()
        for spec, offset in zip(bucket.tensors, bucket.offsets, strict=True):
            self._marks[spec.name] = _mark(raw[offset : offset + spec.nbytes])

    def digest(self) -> str:
        """The same text on every process that has had the same tensors."""
        return hashlib.blake2b(repr(sorted(self._marks.items())).encode(), digest_size=16).hexdigest()


def _mark(raw: Tensor) -> int:
    """The exclusive or of the 8-byte words of ``raw``, which begins at a multiple of 8; the last word is filled with zeros."""
    whole = len(raw) // 8 * 8
    words = int(torch.hash_tensor(raw[:whole].view(torch.int64)).item()) if whole > 0 else 0
    return words ^ int.from_bytes(bytes(raw[whole:].tolist()), "little")


def pack_buckets(
    tensors: Iterable[tuple[str, Tensor]], max_bytes: int, device: torch.device | None = None
) -> Iterator[Bucket]:
    """Group tensors, in order, into buckets of at most ``max_bytes`` (a larger tensor gets a bucket of its own).

    ``device``: where the buckets are made, by default in host memory.
    """
    place = torch.device("cpu") if device is None else device
    group: list[tuple[TensorSpec, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        spec = TensorSpec.of(name, tensor)
        if group and size + spec.nbytes > max_bytes:
            yield _fill(group, place)
            group, size = [], 0
        group.append((spec, tensor))
        size += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    if group:
        yield _fill(group, place)


def _fill(group: list[tuple[TensorSpec, Tensor]], device: torch.device) -> Bucket:
    offsets, end = [], 0
    for spec, _ in group:
        offsets.append(end)
        end += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    raw = torch.empty(end, dtype=torch.uint8, device=device)
    for (spec, tensor), offset in zip(group, offsets, strict=True):
        raw[offset : offset + spec.nbytes].copy_(tensor.detach().to(device).contiguous().view(-1).view(torch.uint8))
    return Bucket.of(tuple(spec for spec, _ in group), tuple(offsets), raw)


def differences(expected: Iterable[TensorSpec], offered: Iterable[TensorSpec], limit: int = 5) -> list[str]:
    """In words, what differs between two sets of tensors; empty when they agree. Names at most ``limit`` tensors."""
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
