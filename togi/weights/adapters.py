"""Weight updates that carry a LoRA adapter alone: the engine's side, which needs no PEFT.

An engine starts from the same files as the trainer's frozen base. So the trainer sends only A and B of each adapted layer, in
float32 and by the layer's checkpoint name. The engine builds the full update itself: each tensor of the files in the engine's
dtype, an adapted one as ``W + scale B A``, added in float32. W is always that of the files, so no update depends on the one before
and no weight is rounded twice. Beside a GPU it is read once and stays in host memory, in the engine's dtype, as far as there is
room. Without one the models are in that memory themselves, and the mapped files are read again, mostly from the system's cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from torch import Tensor

from togi.errors import ModelError
from togi.weights.buckets import TensorSpec, differences
from togi.weights.files import files_of

A, B = "lora_A.weight", "lora_B.weight"
WEIGHT = "weight"
FREE_SHARE = 0.25
"""The share of the host's memory that a kept base leaves free: the trainer and other engines grow too."""
DTYPE = torch.float32
"""The dtype of A and B, in training and in a weight update."""


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``weight + scale b a`` in float32."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)


def problems(base: Iterable[TensorSpec], offered: Iterable[TensorSpec]) -> list[str]:
    """Say why the ``offered`` tensors are not an adapter of weights like ``base``. Returns an empty list if they are one."""
    weights = {spec.name: spec for spec in base}
    have = tuple(offered)
    stems = {spec.name.removesuffix(end) for spec in have for end in (A, B) if spec.name.endswith(end)}
    # each adapted layer must have A and B that fit its weight
    expected: list[TensorSpec] = []
    ranks = {spec.name: spec.shape[0] for spec in have if spec.name.endswith(A)}
    for stem in sorted(stems):
        weight, rank = weights.get(stem + WEIGHT), ranks.get(stem + A, 0)
        if weight is None or len(weight.shape) != 2:
            return [f"{stem}{WEIGHT} is no matrix of the model, but has an adapter"]
        rows, columns = weight.shape
        expected += [TensorSpec(stem + A, (rank, columns), "float32"), TensorSpec(stem + B, (rows, rank), "float32")]
    return differences(expected, have)


def base_files(model: str, expected: Iterable[TensorSpec]) -> dict[str, Path]:
    """The file of each tensor of the base model, which both the engine and the trainer loaded, by checkpoint name.

    ``model``: a folder or hub name. Raises ModelError if its files lack one of the ``expected`` tensors.
    """
    found: dict[str, Path] = {}
    for file in files_of(model):
        with safe_open(file, framework="pt") as handle:
            found |= dict.fromkeys(handle.keys(), file)
    missing = [spec.name for spec in expected if spec.name not in found]
    if missing:
        raise ModelError(
            f"--lora_rank sends the adapter alone, which engines merge into the files of --pretrain {model}, but they have no "
            f"tensor called {missing[0]}: add --lora_sync merged."
        )
    return found


class Base:
    """The weights of an engine's own model files. Raises ModelError if they lack one of the ``expected`` tensors."""

    def __init__(self, model: str, expected: Iterable[TensorSpec]) -> None:
        self._expected = tuple(expected)
        self._files = base_files(model, self._expected)
        self._kept: dict[str, Tensor] = {}

    def with_adapter(self, adapter: Mapping[str, Tensor], scale: float) -> Iterator[tuple[str, Tensor]]:
        """Yield the expected tensors with the adapter merged in, computed on the device of A and B. Do not write to them."""
        device = next(iter(adapter.values())).device
        with ExitStack() as stack:
            # each file is opened once, if one of its tensors is not in memory
            opened = cache(lambda file: stack.enter_context(safe_open(file, framework="pt")))
            for spec in self._expected:
                weight = self._kept.get(spec.name)
                if weight is None:
                    weight = self._keep(spec, opened(self._files[spec.name]).get_tensor(spec.name))
                weight = weight.to(device)
                stem = spec.name.removesuffix(WEIGHT)
                # most tensors have no adapter: embeddings, norms, the head
                if stem + A in adapter:
                    weight = merge(weight, adapter[stem + A], adapter[stem + B], scale).to(weight.dtype)
                yield spec.name, weight

    def _keep(self, spec: TensorSpec, weight: Tensor) -> Tensor:
        """The tensor in the engine's dtype; kept beside a GPU if there is room. It maps the file, and a kept one is a copy."""
        dtype: torch.dtype = getattr(torch, spec.dtype)
        memory = psutil.virtual_memory()
        if not torch.accelerator.is_available() or memory.available - spec.nbytes < FREE_SHARE * memory.total:
            return weight.to(dtype)
        self._kept[spec.name] = weight.to(dtype, copy=True)
        return self._kept[spec.name]
