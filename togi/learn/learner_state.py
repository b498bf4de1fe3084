"""A learner's state on disk: masters and moments as whole tensors in safetensors files, the step, and the random generators.

Whole tensors can be loaded by any number of ranks and any backend. No file is a pickle. Rank 0 writes, and every rank loads its
own part. Loading checks that the model and its parameters are the same, and raises CheckpointError with the differences otherwise.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from togi.config.shared import ModelSettings
from togi.device import default_device
from togi.errors import CheckpointError
from togi.learn.checkpoint import Checkpoint
from togi.learn.learner import Learner
from togi.parallel.backend import Backend
from togi.parallel.process import World
from togi.weights.buckets import TensorSpec, differences
from togi.weights.files import in_parts

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 2 * 10**9
LEARNER = "learner.json"
ADAPTER_A = ".lora_A."
GENERATORS = "generators.json"


def expected_bytes(learner: Learner) -> int:
    """The size of the state on disk: a float32 master and two moments for each trainable parameter."""
    return sum(3 * spec.nbytes for spec in _specs(learner.backend.shapes()))


def save_learner(learner: Learner, folder: Path, identity: Mapping[str, str]) -> None:
    """Write the learner's state into ``folder``, which rank 0 makes. All ranks call it.

    ``identity`` names what must be the same to resume (model, hash of its configuration, ...).
    """
    world = learner.backend.world
    _write_tensors(world, folder, learner.backend.state())
    # each rank has its own random streams; rank 0 writes them all
    generators = world.gather("random generators", _generators())
    if world.is_first:
        record = _Record(
            steps=learner.steps,
            identity=dict(identity),
            parameters=learner.backend.shapes(),
            learning_rate=learner.schedule.state(),
        )
        (folder / LEARNER).write_text(json.dumps(record), encoding="utf-8")
        (folder / GENERATORS).write_text(json.dumps(generators), encoding="utf-8")
    # all ranks wait until the checkpoint is complete
    world.barrier("checkpoint written")


def load_learner(learner: Learner, folder: Path, identity: Mapping[str, str]) -> None:
    """Load the state that ``save_learner`` wrote, on any number of ranks. Raises CheckpointError for a different model.

    Random generators are restored on the ranks that existed when saving. Other ranks keep theirs.
    """
    record = _record(folder)
    _check_identity(record, learner, identity, folder)
    learner.backend.load_state(_reader(folder), record["steps"])
    learner.steps = record["steps"]
    learner.schedule.load_state(record.get("learning_rate", {}))
    generators = json.loads((folder / GENERATORS).read_text(encoding="utf-8"))
    world = learner.backend.world
    if len(generators) != world.size:
        logger.warning("checkpoint of %d ranks loaded into %d: random streams will differ", len(generators), world.size)
    if world.rank < len(generators):
        _restore_generators(generators[world.rank])


def check_adapter(found: Checkpoint, folder: str, settings: ModelSettings) -> None:
    """Raise CheckpointError if the state in ``folder`` of a checkpoint has an adapter of another rank or scale.

    The scale, alpha / rank, is no parameter: another one would change the model that the parameters are loaded into.
    """
    path = found.path / folder
    if not (path / LEARNER).is_file():  # the loader reports what is missing
        return
    ranks = {shape[0] for name, shape in _record(path)["parameters"].items() if ADAPTER_A in name}
    rank, saved = settings.lora_rank, ranks.pop() if len(ranks) == 1 else 0
    if saved != rank:
        has = f"an adapter of rank {saved}" if saved > 0 else "no adapter"
        raise CheckpointError(
            f"The checkpoint {path} has {has}, but --lora_rank is {rank} here: go on with --lora_rank {saved}, or choose "
            "another --ckpt_path."
        )
    alpha = found.state.get("lora_alpha", settings.lora_alpha)  # earlier versions do not name it
    if rank > 0 and alpha != settings.lora_alpha:
        raise CheckpointError(
            f"The checkpoint {path} has an adapter of alpha {alpha}, but --lora_alpha is {settings.lora_alpha} here: go on with "
            f"--lora_alpha {alpha}, or choose another --ckpt_path."
        )


def read_masters(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the trained parameters that ``save_learner`` wrote, in full and in float32, by the model's own names.

    ``expected``: names and shapes of the parameters to load. Raises CheckpointError if other parameters were saved.
    """
    if lines := differences(_specs(expected), _specs(_record(folder)["parameters"])):
        raise CheckpointError(f"The checkpoint {folder} is of another model ({'; '.join(lines)}): give its --pretrain.")
    read = _reader(folder)
    for name in expected:
        yield name, read(f"master/{name}")


class _Record(TypedDict):
    """The file ``LEARNER``. ``parameters``: names and shapes; ``learning_rate``: the state of the schedule."""

    steps: int
    identity: dict[str, str]
    parameters: Mapping[str, Sequence[int]]
    learning_rate: NotRequired[dict[str, object]]


def _record(folder: Path) -> _Record:
    record: _Record = json.loads((folder / LEARNER).read_text(encoding="utf-8"))
    return record


def _write_tensors(world: World, folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Stream tensors into numbered files of at most about ``MAX_FILE_BYTES``.

    Gathering ``tensors`` is collective: every rank runs the loop, rank 0 makes the folder and writes.
    """
    if not world.is_first:
        for _ in tensors:
            pass
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number, held in enumerate(in_parts(tensors, MAX_FILE_BYTES), start=1):
        file = folder / f"tensors_{number:05d}.safetensors"
        try:
            save_file(held, file)
        except SafetensorError as error:
            raise CheckpointError(f"{file} could not be written: {error}") from error


def _reader(folder: Path) -> Callable[[str], Tensor]:
    """Reads tensors by name from the files of a folder. Only the requested tensor is in memory."""
    handles = [safe_open(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]
    where = {name: handle for handle in handles for name in handle.keys()}  # type: ignore[no-untyped-call] # noqa: SIM118
    return lambda name: where[name].get_tensor(name)  # type: ignore[no-untyped-call]


def _specs(shapes: Mapping[str, Sequence[int]]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(shape), "float32") for name, shape in shapes.items()]


def _check_identity(record: _Record, learner: Learner, identity: Mapping[str, str], folder: Path) -> None:
    # what identifies the run, then names and shapes of the parameters
    lines = [
        f"{key} is {identity.get(key, 'not set')}, the checkpoint has {record['identity'].get(key, 'none')}"
        for key in sorted(identity.keys() | record["identity"].keys())
        if identity.get(key) != record["identity"].get(key)
    ]
    lines += differences(_specs(record["parameters"]), _specs(learner.backend.shapes()))
    if lines:
        raise CheckpointError(
            f"checkpoint {folder} belongs to another run ({'; '.join(lines)}): "
            "start it with the same model, or choose another --ckpt_path"
        )


class _Generators(TypedDict):
    """The state of every random generator of a process, as JSON."""

    torch: list[int]
    device: list[int]
    numpy: tuple[str, list[int], int, int, float]
    python: tuple[int, list[int], float | None]


def _generators() -> _Generators:
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)
    kind, keys, position, has_gauss, cached = state
    version, internal, gauss = random.getstate()
    device = default_device()
    return {
        "torch": torch.get_rng_state().tolist(),
        "device": [] if device.type == "cpu" else torch.get_device_module(device).get_rng_state().tolist(),
        "numpy": (kind, np.asarray(keys).tolist(), position, has_gauss, cached),
        "python": (version, list(internal), gauss),
    }


def _restore_generators(states: _Generators) -> None:
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    device = default_device()
    if device.type != "cpu" and states["device"]:
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
        world, shapes = self.backend.world, self.backend.shapes()
        _write_tensors(world, folder, ((name, self._whole(name, shape)) for name, shape in shapes.items()))
        world.barrier("averages written")

    def load(self, folder: Path) -> None:
        """Load the averages that ``save`` wrote, on any number of ranks."""
        read = _reader(folder)
        for name, kept in self._kept.items():
            kept.copy_(read(name))

    def _whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Broadcast one average to every rank, as a sum: ranks that do not keep it add zeros."""
        world = self.backend.world
        kept = self._kept.get(name)
        whole = torch.zeros(shape, device=world.device) if kept is None else kept.to(world.device, copy=True)
        world.add_up(f"average of {name}", whole)
        return whole
