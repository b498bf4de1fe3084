"""LoRA: a frozen model with small trained matrices beside its linear layers (Hu et al. 2021, arXiv 2106.09685).

A layer computes ``W x + (alpha / rank) B A x``. Only A and B are trained, and a scalar head, which has no useful frozen value.
The layers are PEFT's. The model keeps its class, so the rest of the code treats it like any other model. QLoRA (Dettmers et al.
2023, arXiv 2305.14314) is LoRA over a base in NF4 (``loading``).

Adapted layers: the ``nn.Linear`` of the decoder, and GPT-2's ``Conv1D``, a linear layer whose weight is stored as [in, out]. Not
adapted: the language-model head and the embedding, because the fused head reads their weights directly; experts, because
Transformers keeps all experts of a layer in one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from togi.config.shared import ADAPTER_CONFIG, ALL_LINEAR, LoRA
from togi.errors import ModelError
from togi.model.policy import HEAD, PolicyModel, ScalarModel, checkpoint_tensors
from togi.weights import adapters
from togi.weights.buckets import TensorSpec

ADAPTER = "default"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HEAD_RECORD = "value_head.json"
_PREFIX = "hf."
_BASE, _A, _B = ".base_layer.", f".lora_A.{ADAPTER}.", f".lora_B.{ADAPTER}."


def add_lora(model: PolicyModel | ScalarModel, lora: LoRA) -> None:
    """Freeze ``model`` and put adapters beside its layers, in place. A starts random from torch's generator, B at zero.

    Raises ModelError for a target that the model does not have.
    """
    kind = TaskType.SEQ_CLS if isinstance(model, ScalarModel) else TaskType.CAUSAL_LM
    targets = target_layers(model.hf, lora.target_modules)
    base, path = model.hf.base_model, Path(model.hf.config.name_or_path)
    ends = tuple(f".{target}" for target in targets)
    config = LoraConfig(
        task_type=kind,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(p, Conv1D) for name, p in base.named_modules() if f".{name}".endswith(ends)),
        # a folder by its absolute path, so that it is found from any directory
        base_model_name_or_path=str(path.resolve() if path.is_dir() else model.hf.config.name_or_path),
    )
    inject_adapter_in_model(config, model.hf, ADAPTER)
    model.is_adapted = True
    # Not among the modules that PEFT saves whole: then it would keep a frozen copy of the head beside the trained one.
    if isinstance(model, ScalarModel):
        model.hf.score.requires_grad_(True)


def target_layers(hf: PreTrainedModel, wanted: Iterable[str]) -> list[str]:
    """The last parts of the names of the layers that get an adapter. Raises ModelError for a name without such a layer."""
    linear = [name for name, part in hf.base_model.named_modules() if isinstance(part, nn.Linear | Conv1D)]
    every = sorted({name.rpartition(".")[2] for name in linear})
    targets = list(wanted)
    if targets == [ALL_LINEAR]:
        return every
    for target in targets:
        if "," in target:
            names = " ".join(part.strip() for part in target.split(",") if part.strip())
            raise ModelError(
                f"--target_modules {target}: separate the names by spaces, as in --target_modules {names}."
            )
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise ModelError(
                f"--target_modules {target}: {type(hf).__name__} has no such linear layer in its decoder: choose from "
                f"{', '.join(every)}, or {ALL_LINEAR} alone."
            )
    return targets


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Disable the adapter inside the block. The frozen base is the reference model of a policy trained with LoRA."""
    layers = _layers(model)
    # PEFT's own switch also turns requires_grad off and on, and FSDP2 remembers the first value that it sees.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged(
    model: PolicyModel | ScalarModel, named_tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of ``model`` as a plain model has them: ``W + (alpha / rank) B A``, added in float32, in ``dtype``.

    ``named_tensors`` are all full parameters in the order of ``named_parameters``, where W, A and B of a layer follow each
    other. Quantised weights are dequantised. Without adapters the tensors are only cast.
    """
    # W and A wait here until B of the same layer arrives: only one layer is held at a time
    held: dict[str, Tensor] = {}
    for name, tensor in named_tensors:
        layer, separator, rest = name.partition(_BASE)
        if separator and rest == "weight":
            held[layer] = full_weight(model.get_parameter(name), tensor)
        elif separator:
            yield f"{layer}.{rest}", tensor.to(dtype)
        elif _A in name:
            layer = name.partition(_A)[0]
            held[f"{layer}{_A}"] = tensor
        elif _B in name:
            layer = name.partition(_B)[0]
            part: LoraLayer = model.get_submodule(layer)
            a, b = _as_it_lies(part, held.pop(f"{layer}{_A}"), tensor)
            scale = float(part.scaling[ADAPTER])
            yield f"{layer}.weight", adapters.merge(held.pop(layer), a, b, scale).to(dtype)
        else:
            yield name, tensor.to(dtype)
    assert not held, f"no adapter followed {sorted(held)}"


def _sent(model: PolicyModel, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """The name under which an engine receives each of the trainable parameters ``names``, and whether it is sent transposed.

    A name is the checkpoint name of the layer and A or B. A layer that stores its weight as [in, out] sends A^T as B and B^T as A.
    """
    parts = {name: name.partition(_A if _A in name else _B) for name in names}
    layers = list(dict.fromkeys(layer for layer, _, _ in parts.values()))
    # checkpoint_tensors renames and sorts: a number in place of each weight shows which layer got which name
    numbered = ((f"{layer}.weight", torch.tensor(number)) for number, layer in enumerate(layers))
    stems = {
        layers[int(number)]: name.removesuffix(adapters.WEIGHT) for name, number in checkpoint_tensors(model, numbered)
    }
    across = {layer: bool(model.get_submodule(layer).fan_in_fan_out) for layer in layers}
    return {
        name: (stems[layer] + (adapters.A if (kind == _A) != across[layer] else adapters.B), across[layer])
        for name, (layer, kind, _) in parts.items()
    }


def _as_it_lies(layer: LoraLayer, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B in the layout of the stored weight. For a weight stored as [in, out]: (B A)^T = A^T B^T."""
    # contiguous, as engines receive them: a product of another memory layout is rounded in another order
    return (b.T.contiguous(), a.T.contiguous()) if layer.fan_in_fan_out else (a, b)


def as_sent(
    model: PolicyModel, names: Iterable[str], named_tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the trainable parameters ``names`` as they are sent to an engine. ``named_tensors`` yields them in full."""
    sent = _sent(model, names)
    for name, tensor in named_tensors:
        engine_name, across = sent[name]
        yield engine_name, tensor.T.contiguous() if across else tensor


def sent_specs(model: PolicyModel, shapes: Mapping[str, tuple[int, ...]]) -> tuple[TensorSpec, ...]:
    """Names, shapes and dtype of the tensors that ``as_sent`` yields."""
    kind = str(adapters.DTYPE).removeprefix("torch.")
    return tuple(
        TensorSpec(name, shapes[ours][::-1] if across else shapes[ours], kind)
        for ours, (name, across) in _sent(model, shapes).items()
    )


def adapter_scale(model: PolicyModel) -> float:
    """The factor of B A, the same in every layer: alpha / rank."""
    (scale,) = {float(part.scaling[ADAPTER]) for part in _layers(model)}
    return scale


def _layers(model: nn.Module) -> list[LoraLayer]:
    return [part for part in model.modules() if isinstance(part, LoraLayer)]


def full_weight(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """``tensor`` itself, or its dequantised value if ``parameter`` is quantised."""
    state = getattr(parameter, "quant_state", None)  # only bitsandbytes' parameters have one
    if state is None:
        return tensor
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(tensor.data, state)
    return weight


def save_adapter(
    directory: Path,
    model: PolicyModel | ScalarModel,
    named_tensors: Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write a folder that PEFT loads: the adapter (and a scalar head) in float32, its configuration, the tokenizer.

    ``named_tensors`` are the trainable parameters in full, by the names of ``model``. No ``config.json`` is written, because
    Transformers would then look for a whole model. The values that training puts into that file, the name of the head and the
    reward statistics, are in ``value_head.json``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # a copy on the CPU: safetensors refuses tensors that share memory
    kept = {
        adapter_name(name): tensor.to("cpu", torch.float32, copy=True).contiguous() for name, tensor in named_tensors
    }
    save_file(kept, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    # the record of peft.PeftModel.save_pretrained, which is not called since the model keeps its class
    config: LoraConfig = model.hf.peft_config[ADAPTER]
    record = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()} | {
        "inference_mode": True,
        "modules_to_save": [HEAD] if isinstance(model, ScalarModel) else None,
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if isinstance(model, ScalarModel):
        head = {"value_head_prefix": model.value_head_prefix, "mean": model.reward_mean, "std": model.reward_std}
        (directory / HEAD_RECORD).write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")
    elif model.hf.can_generate():
        # the tokens that end an answer, which the tokenizer may not name
        model.hf.generation_config.to_json_file(directory / "generation_config.json")
    tokenizer.save_pretrained(directory)


def adapter_name(name: str) -> str:
    """The name in PEFT's files of a parameter of our model."""
    return "base_model.model." + name.removeprefix(_PREFIX).replace(f".{ADAPTER}.", ".")
