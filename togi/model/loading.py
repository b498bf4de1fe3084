"""Reading model folders into the two model roles.

Not here: writing folders and checkpoint names (``checkpoint``), which architectures are fit (``support``), reading a part at a
time (``deferred``), sharding.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from togi.config.checks import check_mixture
from togi.config.choices import Layers
from togi.config.model_facts import check_length
from togi.config.shared import ADAPTER_CONFIG, LoRA, Recompute
from togi.errors import ModelError
from togi.model import dropout
from togi.model.attention import SEGMENTS, VARLEN
from togi.model.compiled_layers import check_compiled, compile_layers
from togi.model.deferred import Deferred, Reader, files_of, nothing_left, quiet
from togi.model.host_layers import use_host_layers
from togi.model.liger import apply_liger, check_liger
from togi.model.policy import HEAD, PolicyModel, ScalarModel
from togi.model.recompute import use_recompute
from togi.model.support import PROVEN, logit_transform, refuse_other_parts, refuse_unsupported, verify_packing

logger = logging.getLogger(__name__)

Model = TypeVar("Model", PolicyModel, ScalarModel)


def load_causal_lm(
    path: str,
    dtype: torch.dtype,
    *,
    flash_attn: bool,
    trust_remote_code: bool = False,
    recompute: Recompute | None = None,
    lora: LoRA | None = None,
    defer: bool = False,
    layers: Layers = Layers.STANDARD,
) -> PolicyModel:
    """A causal language model from a folder or hub id, on CPU, in ``dtype``, in training mode.

    With ``lora`` it is frozen (in NF4 if so asked, computing in ``dtype``) and has new adapters. ``defer``: leave the weights on
    disk for ``model.read``, where that can be done. ``recompute``: with activation checkpointing. ``layers``: who computes them.
    Its dropout is off. Raises ModelError if the folder cannot be read or lacks weights, or if it cannot be trained packed.
    """
    config = read_config(path, trust_remote_code)
    dropout.switch_off(config)
    _check_layers(layers, config.model_type)
    in_4bit = lora is not None and lora.load_in_4bit
    read = _Reading(path, config, dtype, flash_attn, trust_remote_code, in_4bit=in_4bit)
    hf, reader = _load(AutoModelForCausalLM, read, defer=defer and lora is None)
    model = PolicyModel(hf, logit_transform(config))
    model.read = reader
    return _ready(model, recompute, lora, layers)


def load_scalar_model(
    path: str,
    dtype: torch.dtype,
    *,
    flash_attn: bool,
    init_head: bool = False,
    value_head_prefix: str = HEAD,
    trust_remote_code: bool = False,
    recompute: Recompute | None = None,
    lora: LoRA | None = None,
    in_4bit: bool = False,
    defer: bool = False,
    layers: Layers = Layers.STANDARD,
) -> ScalarModel:
    """A critic or reward model from a folder or hub id.

    ``value_head_prefix`` names the head in the checkpoint; one in config.json wins. A missing head is an error unless
    ``init_head``, which always draws a new head from a normal distribution with standard deviation 1/(hidden + 1), from
    torch's seed alone. With ``lora`` the body is as for a language model and the head is trained whole. ``in_4bit``: a model
    that is only read, its body in NF4. ``defer`` and ``layers`` as there.
    """
    config = read_config(path, trust_remote_code)
    dropout.switch_off(config)
    _check_layers(layers, config.model_type)
    prefix = getattr(config, "value_head_prefix", value_head_prefix)
    config.num_labels = 1
    config.value_head_prefix = prefix
    # Transformers calls the head "score"; a head of another name is renamed when it is read and when it is written
    renames = {} if prefix == HEAD else {rf"^{prefix}\.": f"{HEAD}."}
    optional = frozenset({f"{HEAD}.weight"}) if init_head else frozenset[str]()
    in_4bit = in_4bit or (lora is not None and lora.load_in_4bit)
    read = _Reading(path, config, dtype, flash_attn, trust_remote_code, renames, optional, in_4bit)
    hf, reader = _load(AutoModelForSequenceClassification, read, defer=defer and lora is None and not in_4bit)
    if init_head and isinstance(reader, Deferred):
        reader.finish = partial(_init_head, hf)
    elif init_head:
        _init_head(hf)
    model = ScalarModel(hf, prefix)
    model.read = reader
    return _ready(model, recompute, lora, layers)


def _check_layers(layers: Layers, kind: str) -> None:
    """Raise ModelError where they cannot be computed so for models of this type."""
    if layers is Layers.LIGER:
        check_liger(kind)
    elif layers is Layers.COMPILED:
        check_compiled(kind)


def read_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's config.json. Raises ModelError if there is none."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if (Path(path) / ADAPTER_CONFIG).is_file():
            raise ModelError(
                f"{path!r} is a LoRA adapter, not a model: merge it into one with togi merge-lora."
            ) from error
        raise ModelError(f"cannot read a model config from {path!r}: {str(error).splitlines()[0]}") from error


def check_causal_lm(
    path: str,
    *,
    flash_attn: bool,
    trust_remote_code: bool = False,
    lora: LoRA | None = None,
    balanced: bool = False,
    asked: str = "",
    longest: int = 0,
) -> None:
    """Raise ModelError for what config.json alone tells about a model that cannot be trained. Loads no weights.

    ``longest`` is the longest sequence, which the flags ``asked`` allow. ``balanced``: with a load-balancing loss. Both raise
    ConfigError. Says which dropout is switched off.
    """
    config = read_config(path, trust_remote_code)
    check_length(asked, longest, path, config.to_dict())
    rates = dropout.switch_off(config)
    if balanced:
        check_mixture(path, config.model_type)
    model = _refuse(AutoModelForCausalLM, _Reading(path, config, torch.float32, flash_attn, trust_remote_code))
    if lora is not None:
        _check_package("lora_rank", "peft")
        if lora.load_in_4bit:
            check_4bit()
        from togi.model.adapters import target_layers

        target_layers(model, lora.target_modules)
        if lora.load_in_4bit and any(isinstance(part, Conv1D) for part in model.modules()):
            raise ModelError(
                f"--load_in_4bit: {type(model).__name__} keeps its weights as [in, out], which cannot be quantised and merged: "
                "leave it out."
            )
    if rates:
        logger.warning(dropout.notice(path, rates))


def known_tokens(path: str, trust_remote_code: bool = False) -> int:
    """How many tokens the embedding of a model has a row for; of an adapter, that of the base that it names."""
    record = Path(path) / ADAPTER_CONFIG
    if record.is_file() and not (Path(path) / "config.json").is_file():
        path = str(json.loads(record.read_text(encoding="utf-8"))["base_model_name_or_path"])
    return int(read_config(path, trust_remote_code).get_text_config().vocab_size)


def check_4bit() -> None:
    """Raise ModelError if ``--load_in_4bit`` lacks its package."""
    _check_package("load_in_4bit", "bitsandbytes")


def _check_package(flag: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModelError(f"--{flag} needs the package {package}: pip install 'togi[lora]'.")


def skeleton(
    auto_class: Any, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = auto_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model


@dataclass(frozen=True)
class _Reading:
    """What to read: ``renames`` maps patterns of checkpoint names to ours, ``optional`` weights may be missing.

    ``in_4bit``: linear layers but the heads are quantised and compute in ``dtype``.
    """

    path: str
    config: PreTrainedConfig
    dtype: torch.dtype
    flash_attn: bool
    trust_remote_code: bool
    renames: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    in_4bit: bool = False


def _refuse(auto_class: Any, read: _Reading) -> PreTrainedModel:
    """The model's skeleton, if it is fit."""
    attention = VARLEN if read.flash_attn else SEGMENTS
    refuse_other_parts(read.config)
    try:
        model = skeleton(auto_class, read.config, read.dtype, read.trust_remote_code)
        refuse_unsupported(model, attention)
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        reason = str(error).splitlines()[0]
        raise ModelError(f"{read.path!r} cannot be loaded as this kind of model: {reason}") from error
    return model


def _load(auto_class: Any, read: _Reading, *, defer: bool) -> tuple[PreTrainedModel, Reader]:
    """The model, and what reads it if its weights could be left on disk."""
    attention = _attention(read.flash_attn)
    empty = _refuse(auto_class, read)
    files = files_of(read.path) if defer and read.config.model_type in PROVEN else []
    if files:
        empty.set_attn_implementation(attention)
        reader = Deferred(empty, read.path, files, read.renames)
        check_complete(read.path, reader.missing, read.optional)
        return empty, reader
    with quiet():
        model, info = auto_class.from_pretrained(
            read.path,
            config=read.config,
            dtype=read.dtype,
            attn_implementation=attention,
            trust_remote_code=read.trust_remote_code,
            key_mapping=dict(read.renames) or None,
            quantization_config=nf4(read.dtype) if read.in_4bit else None,
            output_loading_info=True,
        )
    check_complete(read.path, info["missing_keys"], read.optional)
    if read.in_4bit:
        keep_layout(model)
    return model, nothing_left


def check_complete(path: str, missing: Iterable[str], optional: Set[str] = frozenset()) -> None:
    """Raise ModelError for parameters that a checkpoint should have."""
    lacks = sorted(set(missing) - optional)
    if lacks:
        only_head = lacks == [f"{HEAD}.weight"]
        advice = "give one with a head, or ask for a new head" if only_head else "use a complete checkpoint"
        names = ", ".join(lacks[:5])
        raise ModelError(f"the checkpoint {path!r} has no {names}, which would be random: {advice}.")


def _attention(flash_attn: bool) -> str:
    if not flash_attn:
        return SEGMENTS
    if not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None:
        raise ModelError(
            "--flash_attn needs a CUDA device and the flash-attn package: install them or leave the flag out."
        )
    return VARLEN


def nf4(compute: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's format: 4-bit normal floats with quantised scales."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=["lm_head", HEAD],
    )


def keep_layout(hf: nn.Module) -> None:
    """Keep quantised weights in the one layout that training and merging read.

    On CPUs with bfloat16 instructions bitsandbytes repacks them in the first evaluation, which fails for layers whose inputs are
    no multiple of its blocks and leaves scales of another order behind.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in hf.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def _init_head(hf: PreTrainedModel) -> None:
    """From a generator of its own: what else was drawn before depends on how the model was loaded."""
    head: Any = hf.score
    if head.weight.is_meta:
        head.weight = nn.Parameter(torch.empty_like(head.weight, device="cpu"))
    draws = torch.Generator().manual_seed(torch.initial_seed())
    nn.init.normal_(head.weight, mean=0.0, std=1.0 / (head.in_features + 1), generator=draws)


def _ready(model: Model, recompute: Recompute | None, lora: LoRA | None, layers: Layers) -> Model:
    dropout.remove_fixed(model)
    if model.hf.config.model_type not in PROVEN:
        verify_packing(model)
    if layers is Layers.LIGER:
        apply_liger(model.hf)
    elif layers is Layers.STANDARD:
        use_host_layers(model.hf)
    if lora is not None:
        from togi.model.adapters import add_lora  # PEFT takes more than half a second to import

        add_lora(model, lora)
        if recompute is not None and recompute.use_reentrant:
            # the re-entrant kind drops the gradients of a block whose input needs none, and the embedding is frozen
            model.hf.enable_input_require_grads()
    if recompute is not None:
        use_recompute(model.hf, recompute)
    if layers is Layers.COMPILED:
        compile_layers(model.hf)
    model.train()
    return model
