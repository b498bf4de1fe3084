"""Weights that stay on disk until a part of the model is wanted.

A model that will be sharded is built without weights; then ``togi.parallel`` has a part read, shards it and lets go of the rest
before it has the next one read. So a process never holds more than its shards and one part: a decoder block, or what is
outside of blocks. Names and layouts of checkpoints are Transformers' business, whose own loader (5.19) is called for each part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as hf_logging

from togi.model.hub import local_folder

Reader = Callable[[nn.Module], None]
"""Reads the weights of a part of a model that are still on disk."""


def nothing_left(part: nn.Module) -> None:
    """The reader of a model that was read at once."""


def files_of(path: str) -> list[Path]:
    """The safetensors files of a model folder or hub name, from which a part alone can be read; none if it has others."""
    folder = Path(local_folder(path))
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))


def _already_whole() -> None:
    pass


class Deferred:
    """The reader of ``hf``, which was built on the meta device. Part by part, and in the end the whole model.

    ``renames``: patterns of checkpoint names, to be replaced. ``finish`` makes in the end what the checkpoint need not have.
    """

    def __init__(self, hf: PreTrainedModel, path: str, files: list[Path], renames: Mapping[str, str]) -> None:
        self._hf, self._files = hf, files
        self.finish: Callable[[], None] = _already_whole
        self._mapping = get_model_conversion_mapping(hf, dict(renames) or None)
        self._names = {module: name for name, module in hf.named_modules()}
        self._targets = dict(self._places())
        self._left = set(self._targets)
        _make_buffers(hf)
        if hf.can_generate() and (Path(local_folder(path)) / "generation_config.json").is_file():
            hf.generation_config = GenerationConfig.from_pretrained(local_folder(path))

    @property
    def missing(self) -> set[str]:
        """Parameters that the files do not have."""
        there = {target for target, _ in self._targets.values()}
        return {name for name, _ in self._hf.named_parameters()} - there - set(self._hf.all_tied_weights_keys)

    def __call__(self, part: nn.Module) -> None:
        """``part`` is a module of the model, or one that holds it."""
        prefix = f"{self._names[part]}." if part in self._names else ""
        wanted = [key for key in sorted(self._left) if self._targets[key][0].startswith(prefix)]
        self._left -= set(wanted)
        trained = {name: parameter.requires_grad for name, parameter in part.named_parameters()}
        with quiet(), _opened(self._files) as handles:
            slices = {key: handles[self._targets[key][1]].get_slice(key) for key in wanted}
            convert_and_load_state_dict_in_model(self._hf, slices, LoadStateDictConfig(weight_mapping=self._mapping))
        if not prefix:
            self.finish()
            self._hf.tie_weights()
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(trained[name])

    def _places(self) -> Iterator[tuple[str, tuple[str, Path]]]:
        """For each tensor of the files the parameter that it becomes, or a part of, and its file."""
        parameters: dict[str, Any] = dict(self._hf.state_dict())
        renamings = [each for each in self._mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in self._mapping if isinstance(each, WeightConverter)]
        for file in self._files:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118
                    target, _ = rename_source_key(key, renamings, converters, self._hf.base_model_prefix, parameters)
                    yield key, (target, file)


@contextmanager
def _opened(files: list[Path]) -> Iterator[dict[Path, Any]]:
    with ExitStack() as stack:
        yield {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}


def _make_buffers(hf: PreTrainedModel) -> None:
    """Buffers that no checkpoint has, such as the frequencies of rotary embeddings."""
    for module in hf.modules():
        names = [name for name, _ in module.named_buffers(recurse=False)]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if names:
            hf._init_weights(module)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, and no report of missing weights: that is an error of ours, not a warning."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
