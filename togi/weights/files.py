"""Model folders by path or hub name, and the files of their weights."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from togi.errors import ModelError

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


def files_of(path: str) -> list[Path]:
    """The safetensors files of a model folder or hub name. Empty if the folder has no such files, so nothing can be deferred."""
    folder = Path(local_folder(path))
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
