"""Writing model folders in plain Hugging Face form: safetensors, config, generation config and tokenizer.

Also how large one will be, from config.json alone: a skeleton without weights has all shapes.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from togi.config.shared import ADAPTER_CONFIG, LoRA
from togi.errors import RunError
from togi.model.loading import auto_class, read_config, skeleton
from togi.model.policy import PolicyModel, ScalarModel, checkpoint_tensors
from togi.obs.way_out import writing
from togi.weights.adapters import base_files
from togi.weights.buckets import TensorSpec
from togi.weights.files import in_parts

SHARD_BYTES = 5 * 10**9
UNFINISHED = ".unfinished"
RUN_FILE = "togi_run.json"
"""In a final model's folder: the id of the run that wrote it."""
WEIGHT_FILES = (
    *("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", ADAPTER_CONFIG),
    RUN_FILE,
)


FullParameters = Callable[..., Iterator[tuple[str, Tensor]]]
"""``Backend.full_parameters``."""


@cache
def expected_manifest(path: str, dtype: str, trust_remote_code: bool = False) -> tuple[TensorSpec, ...]:
    """The tensors of a weight update of this folder's language model, from its config alone. ``dtype`` as in "bfloat16"."""
    kind: torch.dtype = getattr(torch, dtype)
    config = read_config(path, trust_remote_code)
    model = PolicyModel(skeleton(auto_class(scalar=False), config, kind, trust_remote_code))
    tensors = checkpoint_tensors(model, model.state_dict().items())
    return tuple(TensorSpec(name, tuple(tensor.shape), dtype) for name, tensor in tensors)


def check_base_files(model: str, dtype: str, trust_remote_code: bool) -> None:
    """Raise ModelError if the files lack a weight that engines merge an adapter into."""
    base_files(model, expected_manifest(model, dtype, trust_remote_code))


def save_hf(
    directory: Path,
    model: PolicyModel | ScalarModel,
    named_tensors: Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that plain Transformers loads. Not atomic: see ``written_aside``.

    ``named_tensors`` are the full parameters by the names of ``model``. The model itself may be sharded: only its configuration
    is read. At most ``shard_bytes`` of tensors are held at a time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write_shards(directory, checkpoint_tensors(model, named_tensors), dtype, shard_bytes)
    config = copy.deepcopy(model.hf.config)
    config.dtype = dtype
    # FSDP2 puts "FSDP" before the class name of a sharded model
    config.architectures = [type(model.hf).__name__.removeprefix("FSDP")]
    config.save_pretrained(directory)
    if isinstance(model, PolicyModel) and model.hf.can_generate():
        # to_json_file does not validate: some published generation configs would be refused
        model.hf.generation_config.to_json_file(directory / "generation_config.json")
    tokenizer.save_pretrained(directory)
    source = Path(model.hf.config.name_or_path)
    # a model with code of its own needs its Python files beside the weights
    if getattr(config, "auto_map", None) and source.is_dir():
        for module in source.glob("*.py"):
            shutil.copy(module, directory)


def save_trained(
    directory: Path | None,
    model: PolicyModel | ScalarModel,
    full_parameters: FullParameters,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> None:
    """Write the trained model, or with LoRA only the adapter (``adapters.save_adapter``).

    Collective: all ranks call it to gather the parameters. The rank that writes passes ``directory``, the others None. Raises
    RunError for weights that are not finite, on all ranks.
    """
    adapter = model.is_adapted
    tensors = _finite(full_parameters(None if adapter else dtype, trained_only=adapter))
    if directory is None:
        # the gather is collective: ranks that do not write must take part in it
        for _ in tensors:
            pass
    elif adapter:
        from togi.model.adapters import save_adapter

        save_adapter(directory, model, tensors, tokenizer)
    else:
        save_hf(directory, model, tensors, tokenizer, dtype)


def _finite(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in named_tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise RunError(
                f"Training has diverged: the weights of {name} are not finite (NaN or infinite), so this model is not saved. "
                "Lower the learning rate or --max_norm, or look for extreme values in the data, and start again, or from an "
                "earlier checkpoint."
            )
        yield name, tensor


def whole_tensors(
    model: PolicyModel | ScalarModel, full_parameters: FullParameters, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield all full parameters by checkpoint name, with adapters merged into the weights."""
    if not model.is_adapted:
        return checkpoint_tensors(model, full_parameters(dtype))
    from togi.model.adapters import merged

    return checkpoint_tensors(model, merged(model, full_parameters(), dtype))


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Yield a folder to write a model into, and move its files to ``target`` when the block ends without an error.

    The folder is inside the target, so it is on the same disk. Weights of an earlier model in the target are removed: Transformers
    would read a single old file before a new model in several files. Raises WriteError and then leaves no new file.
    """
    aside = target.absolute() / UNFINISHED
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with writing(target):
            aside.mkdir(parents=True)
            yield aside
            # the new model is complete: remove the old weights, then move the new files in
            for pattern in WEIGHT_FILES:
                for stale in target.glob(pattern):
                    stale.unlink()
            for file in aside.iterdir():
                if (target / file.name).is_dir():
                    shutil.rmtree(target / file.name)
                file.replace(target / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, shard_bytes: int) -> None:
    files, total = list[list[str]](), 0
    for held in in_parts(tensors, shard_bytes, dtype):
        save_file(held, directory / f"part-{len(files):05d}.safetensors", metadata={"format": "pt"})
        files.append(list(held))
        total += sum(tensor.nbytes for tensor in held.values())
    # the final names contain the number of files, which is known only now
    single, count, places = directory / "model.safetensors", len(files), {}
    for i, names in enumerate(files):
        final = single if count == 1 else directory / f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        (directory / f"part-{i:05d}.safetensors").rename(final)
        places.update(dict.fromkeys(names, final.name))
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


FLOAT32 = 4
BFLOAT16 = 2
# Bytes for each trainable weight: the float32 master and Adam's two moments.
STATE = 3 * FLOAT32


@dataclass(frozen=True, slots=True)
class Sizes:
    """Counts of a model: all ``weights``, the ``trained`` ones (with LoRA only the adapter's), rows of the ``embedding``.

    ``layers`` and ``hidden``: the number of layers and the hidden size.
    """

    weights: int
    trained: int
    embedding: int
    layers: int
    hidden: int
    adapter: bool

    @property
    def state_bytes(self) -> int:
        """Bytes of the training state in a checkpoint."""
        return STATE * self.trained

    def folder_bytes(self, *, bf16: bool) -> int:
        """Bytes of the model folder that a run writes: the model in the dtype of training, or the adapter in float32."""
        if self.adapter:
            return FLOAT32 * self.trained
        return (BFLOAT16 if bf16 else FLOAT32) * self.weights


def sizes(path: str, *, scalar: bool = False, lora: LoRA | None = None, trust_remote_code: bool = False) -> Sizes:
    """The sizes of a folder's language model, or with ``scalar`` of the reward model or critic made from it."""
    config = read_config(path, trust_remote_code)
    if scalar:
        config.num_labels = 1
    hf = skeleton(auto_class(scalar=scalar), config, torch.float32, trust_remote_code)
    weights = sum(parameter.numel() for parameter in hf.parameters())
    trained = weights
    if lora is not None:
        from togi.model.adapters import add_lora  # PEFT takes more than half a second to import

        with torch.device("meta"):
            add_lora(ScalarModel(hf, "score") if scalar else PolicyModel(hf), lora)
        trained = sum(parameter.numel() for parameter in hf.parameters() if parameter.requires_grad)
    text = config.get_text_config()
    rows = int(hf.get_input_embeddings().weight.shape[0])
    return Sizes(weights, trained, rows, text.num_hidden_layers, text.hidden_size, lora is not None)
