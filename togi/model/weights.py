"""Weights on their way from a trainer to a generation engine: what will be sent (manifest) and how (buckets).

The manifest is agreed before a byte moves, so a wrong name, shape or dtype is an error that names it, never a hang or a
half-updated model. Buckets are flat byte arrays: a few large transfers instead of one for each parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

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
    """Everything that one weight update will send."""

    version: int
    tensors: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors)


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Consecutive tensors of a manifest in one flat array of bytes; ``offsets`` are in bytes."""

    tensors: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    data: NDArray[np.uint8]

    def unpack(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors, as read-only views of ``data``: clone what outlives the bucket."""
        raw = torch.from_numpy(self.data)
        for spec, offset in zip(self.tensors, self.offsets, strict=True):
            view = raw[offset : offset + spec.nbytes].view(getattr(torch, spec.dtype))
            yield spec.name, view.view(spec.shape)


def pack_buckets(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[Bucket]:
    """Group tensors, in order, into buckets of at most ``max_bytes`` (a larger tensor gets a bucket of its own)."""
    group: list[tuple[TensorSpec, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        spec = TensorSpec.of(name, tensor)
        if group and size + spec.nbytes > max_bytes:
            yield _fill(group)
            group, size = [], 0
        group.append((spec, tensor))
        size += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    if group:
        yield _fill(group)


def _fill(group: list[tuple[TensorSpec, Tensor]]) -> Bucket:
    offsets, end = [], 0
    for spec, _ in group:
        offsets.append(end)
        end += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    data = np.empty(end, dtype=np.uint8)
    raw = torch.from_numpy(data)
    for (spec, tensor), offset in zip(group, offsets, strict=True):
        raw[offset : offset + spec.nbytes].copy_(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8))
    return Bucket(tuple(spec for spec, _ in group), tuple(offsets), data)


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
