"""A learner's state on disk: masters and moments as whole tensors in safetensors files, the step, and the random generators.

Whole tensors can be loaded by any number of ranks and any backend. No file is a pickle. Rank 0 writes, and every rank loads its
own part. Loading checks that the model and its parameters are the same, and raises CheckpointError with the differences otherwise.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from togi.errors import CheckpointError
from togi.learn.learner import Learner
from togi.parallel.backend import Backend
from togi.weights.buckets import TensorSpec, differences

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 2 * 10**9
LEARNER = "learner.json"
ADAPTER_A = ".lora_A."
GENERATORS = "generators.json"


def expected_bytes(learner: Learner) -> int:
    """The size of the state on disk: a float32 master and two moments for each trainable parameter."""
    return sum(3 * spec.nbytes for spec in _specs(learner))


def save_learner(learner: Learner, folder: Path, identity: Mapping[str, str]) -> None:
    """Write the learner's state into ``folder``, which rank 0 makes. All ranks call it.

    ``identity`` names what must be the same to resume (model, hash of its configuration, ...).
    """
    world = learner.backend.world
    writer = TensorWriter(folder)
    if world.is_first:
        folder.mkdir(parents=True, exist_ok=True)
    # gathering is collective: every rank runs the loop, rank 0 writes
    for name, tensor in learner.backend.state():
        if world.is_first:
            writer.add(name, tensor)
    # each rank has its own random streams; rank 0 writes them all
    generators = world.gather("random generators", _generators())
    if world.is_first:
        writer.finish()
        shapes = {name: list(shape) for name, shape in learner.backend.shapes().items()}
        record = {"steps": learner.steps, "identity": dict(identity), "parameters": shapes}
        record["learning_rate"] = learner.schedule.state()
        (folder / LEARNER).write_text(json.dumps(record), encoding="utf-8")
        (folder / GENERATORS).write_text(json.dumps(generators), encoding="utf-8")
    # all ranks wait until the checkpoint is complete
    world.barrier("checkpoint written")


def load_learner(learner: Learner, folder: Path, identity: Mapping[str, str]) -> None:
    """Load the state that ``save_learner`` wrote, on any number of ranks. Raises CheckpointError for a different model.

    Random generators are restored on the ranks that existed when saving. Other ranks keep theirs.
    """
    record = json.loads((folder / LEARNER).read_text(encoding="utf-8"))
    _check_identity(record, learner, identity, folder)
    reader = TensorReader(sorted(folder.glob("*.safetensors")))
    learner.backend.load_state(reader.read, record["steps"])
    learner.steps = record["steps"]
    learner.schedule.load_state(record.get("learning_rate", {}))
    generators = json.loads((folder / GENERATORS).read_text(encoding="utf-8"))
    world = learner.backend.world
    if len(generators) != world.size:
        logger.warning("checkpoint of %d ranks loaded into %d: random streams will differ", len(generators), world.size)
    if world.rank < len(generators):
        _restore_generators(generators[world.rank])


def check_rank(folder: Path, rank: int) -> None:
    """Raise CheckpointError if the state in ``folder`` has an adapter of another LoRA rank. ``rank`` 0 means no adapter."""
    if not (folder / LEARNER).is_file():  # the loader reports what is missing
        return
    record = json.loads((folder / LEARNER).read_text(encoding="utf-8"))
    ranks = {shape[0] for name, shape in record["parameters"].items() if ADAPTER_A in name}
    saved = ranks.pop() if len(ranks) == 1 else 0
    if saved != rank:
        has = f"an adapter of rank {saved}" if saved > 0 else "no adapter"
        raise CheckpointError(
            f"The checkpoint {folder} has {has}, but --lora_rank is {rank} here: go on with --lora_rank {saved}, or choose "
            "another --ckpt_path."
        )


def read_masters(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the trained parameters that ``save_learner`` wrote, in full and in float32, by the model's own names.

    ``expected``: names and shapes of the parameters to load. Raises CheckpointError if other parameters were saved.
    """
    saved = json.loads((folder / LEARNER).read_text(encoding="utf-8"))["parameters"]
    lines = differences(
        [TensorSpec(name, shape, "float32") for name, shape in expected.items()],
        [TensorSpec(name, tuple(shape), "float32") for name, shape in saved.items()],
    )
    if lines:
        raise CheckpointError(f"The checkpoint {folder} is of another model ({'; '.join(lines)}): give its --pretrain.")
    reader = TensorReader(sorted(folder.glob("*.safetensors")))
    for name in expected:
        yield name, reader.read(f"master/{name}")


class TensorWriter:
    """Streams tensors into numbered files of at most about ``MAX_FILE_BYTES``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: dict[str, Tensor] = {}
        self.held_bytes = 0
        self.files = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self.held and self.held_bytes + tensor.nbytes > MAX_FILE_BYTES:
            self.finish()
        # A copy even on the CPU: tied storage and views cannot be written.
        self.held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self.held_bytes += tensor.nbytes

    def finish(self) -> None:
        self.files += 1
        file = self.folder / f"tensors_{self.files:05d}.safetensors"
        try:
            save_file(self.held, file)
        except SafetensorError as error:
            raise CheckpointError(f"{file} could not be written: {error}") from error
        self.held, self.held_bytes = {}, 0


class TensorReader:
    """Reads tensors by name from several files. Only the requested tensor is in memory."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.handles = [safe_open(file, framework="pt") for file in files]
        self.where = {name: handle for handle in self.handles for name in handle.keys()}  # type: ignore[no-untyped-call] # noqa: SIM118

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self.where[name].get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor


def _specs(learner: Learner) -> list[TensorSpec]:
    return [TensorSpec(name, shape, "float32") for name, shape in learner.backend.shapes().items()]


def _check_identity(record: Mapping[str, Any], learner: Learner, identity: Mapping[str, str], folder: Path) -> None:
    saved = [TensorSpec(name, tuple(shape), "float32") for name, shape in record["parameters"].items()]
    # what identifies the run, then names and shapes of the parameters
    lines = [
        f"{key} is {identity.get(key, 'not set')}, the checkpoint has {record['identity'].get(key, 'none')}"
        for key in sorted(identity.keys() | record["identity"].keys())
        if identity.get(key) != record["identity"].get(key)
    ]
    lines += differences(saved, _specs(learner))
    if lines:
        raise CheckpointError(
            f"checkpoint {folder} belongs to another run ({'; '.join(lines)}): "
            "start it with the same model, or choose another --ckpt_path"
        )


def _generators() -> dict[str, Any]:
    """The state of every random generator of this process, as JSON."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    device = torch.accelerator.current_accelerator()
    return {
        "torch": torch.get_rng_state().tolist(),
        "device": [] if device is None else torch.get_device_module(device).get_rng_state().tolist(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def _restore_generators(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    device = torch.accelerator.current_accelerator()
    if device is not None and states["device"]:
        torch.get_device_module(device).set_rng_state(torch.tensor(states["device"], dtype=torch.uint8))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


# An exponential moving average (EMA) of the trained weights.
#
# Each rank keeps some of the parameters whole, in float32. So the average is spread over ranks under any backend. It is updated
# from gathered parameters, which costs as much as a weight update of an engine in each optimizer step. With LoRA it averages the
# adapter's matrices.


class Ema:
    """``average <- beta average + (1 - beta) weights`` after each optimizer step, starting from the initial weights.

    ``home``: the device of the average. All methods are collective: all ranks call them together.
    """

    def __init__(self, backend: Backend, beta: float, home: torch.device) -> None:
        assert 0 < beta < 1
        self.backend = backend
        self.beta = beta
        # round robin over ranks
        self._kept = {
            name: tensor.to(home, torch.float32, copy=True)
            for place, (name, tensor) in enumerate(backend.full_parameters(trained_only=True))
            if place % backend.world.size == backend.world.rank
        }

    def update(self) -> None:
        """Update the average with the current weights."""
        for name, tensor in self.backend.full_parameters(trained_only=True):
            if name in self._kept:
                kept = self._kept[name]
                kept.lerp_(tensor.to(kept.device, kept.dtype), 1 - self.beta)

    def full_parameters(
        self, dtype: torch.dtype | None = None, *, trained_only: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Like ``Backend.full_parameters``, with the averages in place of the trainable parameters."""
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
        """Load the averages that ``save`` wrote, on any number of ranks."""
        reader = TensorReader(sorted(folder.glob("*.safetensors")))
        for name, kept in self._kept.items():
            kept.copy_(reader.read(name))

    def _whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Broadcast one average to every rank, as a sum: ranks that do not keep it add zeros."""
        world = self.backend.world
        if name in self._kept:
            whole = self._kept[name].to(world.device, copy=True)
        else:
            whole = torch.zeros(shape, dtype=torch.float32, device=world.device)
        world.add_up(f"average of {name}", whole)
        return whole
