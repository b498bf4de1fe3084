"""Model folders by path or hub name, and the files of their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import Tensor, nn

from togi.errors import ModelError

Reader = Callable[[nn.Module], None]
"""Loads the weights of a part of a model that are still on disk (``togi.model.deferred``)."""
WEIGHTS = ("*.safetensors", "*.bin")
# Training changes weights everywhere: to tell two models apart, blocks spread over a file are enough.
BLOCK, SAMPLES = 4096, 256
# Weights in pickle form are left out: Togi reads safetensors only.
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]


def local_folder(model: str) -> str:
    """``model`` itself if it is a folder, or else the folder of the hub's files in the cache, downloaded if they are missing.

    Raises ModelError when the name is unknown or the hub cannot be reached.
    """
    if Path(model).is_dir():
        return model
    try:
        return snapshot_download(model, allow_patterns=FILES)
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"the model {model!r} is no folder and cannot be had from the hub ({reason}): check the name."
        ) from None


def nothing_left(part: nn.Module) -> None:
    """The reader of a model whose weights are already loaded."""


def files_of(path: str) -> list[Path]:
    """The safetensors files of a model folder or hub name. Empty if the folder has no such files, so nothing can be deferred."""
    folder = Path(local_folder(path))
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))


def stamp(model: str) -> str:
    """A short text that stands for the weights of a model, wherever it lies: of each file the size and ``SAMPLES`` blocks."""
    found = hashlib.blake2b(digest_size=16)
    folder = Path(local_folder(model))
    for path in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        size = path.stat().st_size
        found.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(BLOCK, size // SAMPLES)):
                file.seek(start)
                found.update(file.read(BLOCK))
    return found.hexdigest()


def in_parts(
    tensors: Iterable[tuple[str, Tensor]], max_bytes: int, dtype: torch.dtype | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yield copies of the tensors on the CPU for one file after the other, of at most ``max_bytes`` or a single larger tensor.

    ``dtype``: that of floating-point numbers in the files, if it is another one. Write a part before you ask for the next.
    """
    held, size = dict[str, Tensor](), 0
    for name, tensor in tensors:
        # a copy of its own: safetensors refuses views, and a part must not keep memory that the caller frees
        ready = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True).contiguous()
        if held and size + ready.nbytes > max_bytes:
            yield held
            held.clear()
            size = 0
        held[name] = ready
        size += ready.nbytes
    yield held
