"""An exponential moving average of trained weights: a smoother policy than the last one.

Each rank keeps some of the parameters whole, in float32, so that the average is spread over ranks like everything else,
whichever backend holds the weights. It is updated from gathered parameters, which costs as much as a weight sync in each
optimizer step. With LoRA it is that of the adapter's matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from togi.learn.learner_state import TensorReader, TensorWriter
from togi.parallel.backend import Backend


class Ema:
    """``average <- beta average + (1 - beta) weights`` after each optimizer step, from the weights at the start.

    ``home``: where the average is kept. Every method is called by all ranks together.
    """

    def __init__(self, backend: Backend, beta: float, home: torch.device) -> None:
        assert 0 < beta < 1
        self.backend = backend
        self.beta = beta
        self._kept = {
            name: tensor.to(home, torch.float32, copy=True)
            for place, (name, tensor) in enumerate(backend.full_parameters(trained_only=True))
            if place % backend.world.size == backend.world.rank
        }

    def update(self) -> None:
        """Take in the present weights."""
        for name, tensor in self.backend.full_parameters(trained_only=True):
            if name in self._kept:
                kept = self._kept[name]
                kept.lerp_(tensor.to(kept.device, kept.dtype), 1 - self.beta)

    def full_parameters(
        self, dtype: torch.dtype | None = None, *, trained_only: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """As ``Backend.full_parameters``, with the averages in place of what is trained."""
        shapes = self.backend.shapes()
        for name, tensor in self.backend.full_parameters(dtype, trained_only=trained_only):
            yield name, self._whole(name, shapes[name]).to(tensor.dtype) if name in shapes else tensor

    def save(self, folder: Path) -> None:
        """Write the averages into ``folder``, which rank 0 makes."""
        world, writer = self.backend.world, TensorWriter(folder)
        if world.is_first:
            folder.mkdir(parents=True, exist_ok=True)
        for name, shape in self.backend.shapes().items():
            tensor = self._whole(name, shape)
            if world.is_first:
                writer.add(name, tensor)
        if world.is_first:
            writer.finish()
        world.barrier("averages written")

    def load(self, folder: Path) -> None:
        """Take back what ``save`` wrote, on any number of ranks."""
        reader = TensorReader(sorted(folder.glob("*.safetensors")))
        for name, kept in self._kept.items():
            kept.copy_(reader.read(name))

    def _whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One average on every rank: those that do not keep it add zeros."""
        world = self.backend.world
        if name in self._kept:
            whole = self._kept[name].to(world.device, copy=True)
        else:
            whole = torch.zeros(shape, dtype=torch.float32, device=world.device)
        world.add_up(f"average of {name}", whole)
        return whole
