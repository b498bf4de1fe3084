"""Deferred loading: weights stay on disk until a part of the model is needed.

A model that will be sharded is built without weights. Then ``togi.parallel`` loads one part, shards it and frees the rest before
it loads the next part. So a process never holds more than its shards and one part: a decoder block, or all that is outside of
blocks. Transformers' own loader (5.19) is called for each part, since it knows the names and layouts of checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

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

from togi.weights.files import local_folder


class Deferred:
    """The reader of ``hf``, which was built on the meta device. Call it for each part, and last for the whole model.

    ``renames``: patterns of checkpoint names and their replacements. ``finish`` runs at the end and makes the weights that the
    checkpoint may lack, such as a new head.
    """

    def __init__(self, hf: PreTrainedModel, path: str, files: list[Path], renames: Mapping[str, str]) -> None:
        self._hf, self._files = hf, files
        self.finish: Callable[[], None] = lambda: None
        self._mapping = get_model_conversion_mapping(hf, dict(renames) or None)
        self._names = {module: name for name, module in hf.named_modules()}
        self._targets = dict(self._places())
        self._left = set(self._targets)
        # meta tensors have no values, and buffers and the generation config are not in the weight files
        _make_buffers(hf)
        if hf.can_generate() and (Path(local_folder(path)) / "generation_config.json").is_file():
            hf.generation_config = GenerationConfig.from_pretrained(local_folder(path))

    @property
    def missing(self) -> set[str]:
        """Names of the parameters that are not in the files."""
        there = {target for target, _ in self._targets.values()}
        return {name for name, _ in self._hf.named_parameters()} - there - set(self._hf.all_tied_weights_keys)

    def __call__(self, part: nn.Module) -> None:
        """Load the weights of ``part``: a module of the model, or a module that contains the whole model."""
        prefix = f"{self._names[part]}." if part in self._names else ""
        # each tensor is loaded once: the last call, for the whole model, takes what no part took
        wanted = [key for key in sorted(self._left) if self._targets[key][0].startswith(prefix)]
        self._left -= set(wanted)
        trained = {name: parameter.requires_grad for name, parameter in part.named_parameters()}
        with quiet(), ExitStack() as stack:
            handles = {file: stack.enter_context(safe_open(file, framework="pt")) for file in self._files}
            slices = {key: handles[self._targets[key][1]].get_slice(key) for key in wanted}
            convert_and_load_state_dict_in_model(self._hf, slices, LoadStateDictConfig(weight_mapping=self._mapping))
        # the whole model: everything is loaded now, so tied weights can be tied again
        if not prefix:
            self.finish()
            self._hf.tie_weights()
        # the loader puts in new parameters: keep which of them are trainable
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(trained[name])

    def _places(self) -> Iterator[tuple[str, tuple[str, Path]]]:
        """Yield for each tensor of the files: its key, the parameter that it becomes (or is merged into), and its file."""
        parameters: dict[str, torch.Tensor] = dict(self._hf.state_dict())
        renamings = [each for each in self._mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in self._mapping if isinstance(each, WeightConverter)]
        for file in self._files:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118
                    target, _ = rename_source_key(key, renamings, converters, self._hf.base_model_prefix, parameters)
                    yield key, (target, file)


def _make_buffers(hf: PreTrainedModel) -> None:
    """Make the buffers that no checkpoint has, such as the frequencies of rotary embeddings, on the CPU."""
    for module in hf.modules():
        names = [name for name, _ in module.named_buffers(recurse=False)]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if names:
            hf._init_weights(module)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and the report of missing weights: for Togi that is an error, not a warning (``check_complete``)."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
