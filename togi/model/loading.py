"""Load model folders into the two model roles, ``PolicyModel`` and ``ScalarModel``.

Not here: writing folders and checkpoint names (``checkpoint``), which architectures are supported (``support``), loading a part
at a time (``deferred``), sharding.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import BitsAndBytesConfig

from togi.algo.partial_attention import has_flash, use_newest_flash
from togi.config.architectures import ARCHITECTURES
from togi.config.choices import Layers
from togi.config.model_facts import check_length
from togi.config.shared import ADAPTER_CONFIG, LoRA, ModelSettings, Recompute, check_mixture
from togi.cpu import use_host_layers
from togi.errors import ModelError
from togi.model import layers
from togi.model.attention import SEGMENTS, VARLEN
from togi.model.deferred import Deferred, quiet
from togi.model.policy import HEAD, PolicyModel, ScalarModel
from togi.model.support import logit_transform, refuse_other_parts, refuse_unsupported, verify_packing
from togi.weights.files import Reader, files_of, nothing_left

logger = logging.getLogger(__name__)

Model = TypeVar("Model", PolicyModel, ScalarModel)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's folder or hub id, and how to load it.

    ``dtype``: of the weights. ``layers``: the implementation of the layers. ``lora``: add new adapters and freeze the base, which
    computes in ``dtype`` and is in NF4 if ``lora.load_in_4bit``. ``recompute``: with activation checkpointing. ``in_4bit``: for a
    model that is not trained, its body in NF4. ``defer``: leave the weights on disk for ``model.read``, where that is possible.
    """

    path: str
    dtype: torch.dtype
    flash_attn: bool = False
    trust_remote_code: bool = False
    layers: Layers = Layers.STANDARD
    lora: LoRA | None = None
    recompute: Recompute | None = None
    in_4bit: bool = False
    defer: bool = False

    @classmethod
    def of(
        cls, config: ModelSettings, path: str, device: torch.device, *, in_ring: bool, trained: bool, defer: bool
    ) -> ModelSource:
        """The source that the flags describe, for this kind of device. ``in_ring``: ring attention replaces FlashAttention."""
        on_cuda = device.type == "cuda"
        return cls(
            path,
            # full training needs float32 masters; frozen weights under an adapter do not
            dtype_of(config.bf16 and (not trained or config.lora is not None)),
            flash_attn=config.flash_attn and has_flash(device) and not in_ring,
            trust_remote_code=config.trust_remote_code,
            layers=config.layers(on_cuda=on_cuda),
            lora=config.lora if trained else None,
            recompute=config.recompute if trained else None,
            defer=defer,
        )

    @property
    def quantised(self) -> bool:
        return self.in_4bit or (self.lora is not None and self.lora.load_in_4bit)


def dtype_of(bf16: bool) -> torch.dtype:
    """The dtype that ``--bf16`` selects."""
    return torch.bfloat16 if bf16 else torch.float32


def load_causal_lm(source: ModelSource) -> PolicyModel:
    """Load a causal language model on the CPU, in training mode, with its dropout off.

    Raises ModelError if the folder cannot be read, lacks weights, or has an architecture that cannot be trained packed.
    """
    config = _fit_config(source)
    hf, reader = _load(AutoModelForCausalLM, source, config, {})
    model = PolicyModel(hf, logit_transform(config))
    model.read = reader
    return _ready(model, source)


def load_scalar_model(source: ModelSource, *, init_head: bool = False, value_head_prefix: str = HEAD) -> ScalarModel:
    """Load a critic or reward model, like ``load_causal_lm``. With ``lora`` the whole head is trained too.

    ``value_head_prefix`` names the head in the checkpoint; a name in config.json takes precedence. A missing head is an error
    unless ``init_head`` is set, which always draws a new head from a normal distribution with standard deviation 1/(hidden + 1).
    The draw depends on torch's seed alone.
    """
    config = _fit_config(source)
    prefix = getattr(config, "value_head_prefix", value_head_prefix)
    config.num_labels = 1
    config.value_head_prefix = prefix
    optional = frozenset({f"{HEAD}.weight"}) if init_head else frozenset[str]()
    hf, reader = _load(AutoModelForSequenceClassification, source, config, head_renames(prefix), optional)
    # a deferred model draws its head last: the weights do not exist yet
    if init_head and isinstance(reader, Deferred):
        reader.finish = partial(_init_head, hf)
    elif init_head:
        _init_head(hf)
    model = ScalarModel(hf, prefix)
    model.read = reader
    return _ready(model, source)


def _fit_config(source: ModelSource) -> PreTrainedConfig:
    """The model's config with dropout off. Raises ModelError if its layers do not support ``source.layers``."""
    config = read_config(source.path, source.trust_remote_code)
    layers.switch_off(config)
    if source.layers is Layers.LIGER:
        layers.check_liger(config.model_type)
    elif source.layers is Layers.COMPILED:
        layers.check_compiled(config.model_type)
    return config


def read_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the model's config.json. Raises ModelError if it cannot be read."""
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
    """Raise ModelError if config.json alone shows that the model cannot be trained. Loads no weights.

    ``longest``: the longest sequence that the flags named in ``asked`` allow. ``balanced``: with a load-balancing loss. Both raise
    ConfigError if the model does not support them. Logs which dropout is switched off.
    """
    config = read_config(path, trust_remote_code)
    check_length(asked, longest, path, config.to_dict())
    rates = layers.switch_off(config)
    if balanced:
        check_mixture(path, config.model_type)
    source = ModelSource(path, torch.float32, flash_attn, trust_remote_code)
    # the architecture, on a skeleton without weights
    model = _refuse(AutoModelForCausalLM, source, config)
    if lora is not None:
        # the adapter: its packages, its target layers, its quantisation
        check_package("lora_rank", "peft")
        if lora.load_in_4bit:
            check_package("load_in_4bit", "bitsandbytes")
        from togi.model.adapters import target_layers

        target_layers(model, lora.target_modules)
        if lora.load_in_4bit and any(isinstance(part, Conv1D) for part in model.modules()):
            raise ModelError(
                f"--load_in_4bit: {type(model).__name__} keeps its weights as [in, out], which cannot be quantised and merged: "
                "leave it out."
            )
    if rates:
        logger.warning(layers.dropout_notice(path, rates))


def known_tokens(path: str, trust_remote_code: bool = False) -> int:
    """The number of rows of a model's embedding. For an adapter: that of the base model that it names."""
    record = Path(path) / ADAPTER_CONFIG
    if record.is_file() and not (Path(path) / "config.json").is_file():
        path = str(json.loads(record.read_text(encoding="utf-8"))["base_model_name_or_path"])
    return int(read_config(path, trust_remote_code).get_text_config().vocab_size)


def check_package(flag: str, package: str) -> None:
    """Raise ModelError if the package that ``--flag`` needs is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ModelError(f"--{flag} needs the package {package}: pip install '.[lora]'.")


def auto_class(*, scalar: bool) -> type[_BaseAutoModelClass]:
    """Transformers' class that makes language models, or models with a scalar head."""
    kind: type[_BaseAutoModelClass] = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    return kind


def head_renames(prefix: str) -> dict[str, str]:
    """From checkpoint names to ours: Transformers calls the head "score"."""
    return {} if prefix == HEAD else {rf"^{prefix}\.": f"{HEAD}."}


def skeleton(
    kind: type[_BaseAutoModelClass], config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model


def _refuse(kind: type[_BaseAutoModelClass], source: ModelSource, config: PreTrainedConfig) -> PreTrainedModel:
    """The model's skeleton. Raises ModelError if the architecture is not supported."""
    refuse_other_parts(config)
    try:
        model = skeleton(kind, config, source.dtype, source.trust_remote_code)
        refuse_unsupported(model, VARLEN if source.flash_attn else SEGMENTS)
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        reason = str(error).splitlines()[0]
        raise ModelError(f"{source.path!r} cannot be loaded as this kind of model: {reason}") from error
    return model


def _load(
    kind: type[_BaseAutoModelClass],
    source: ModelSource,
    config: PreTrainedConfig,
    renames: Mapping[str, str],
    optional: frozenset[str] = frozenset(),
) -> tuple[PreTrainedModel, Reader]:
    """The model, and the reader of its weights, which has nothing to do unless they were left on disk.

    ``renames`` maps patterns of checkpoint names to ours. ``optional`` names the weights that may be missing.
    """
    attention = VARLEN if source.flash_attn else SEGMENTS
    if source.flash_attn:
        logger.info("attention: FlashAttention (%s)", use_newest_flash())
    # refuse an unsupported architecture before any weight is read
    empty = _refuse(kind, source, config)
    # only proven architectures: the packing check of the others runs the model at once
    defer = source.defer and source.lora is None and not source.in_4bit and config.model_type in ARCHITECTURES
    files = files_of(source.path) if defer else []
    if files:
        empty.set_attn_implementation(attention)
        reader = Deferred(empty, source.path, files, renames)
        check_complete(source.path, reader.missing, optional)
        return empty, reader
    # load all weights now
    with quiet():
        model, info = kind.from_pretrained(
            source.path,
            config=config,
            dtype=source.dtype,
            attn_implementation=attention,
            trust_remote_code=source.trust_remote_code,
            key_mapping=dict(renames) or None,
            quantization_config=nf4(source.dtype) if source.quantised else None,
            output_loading_info=True,
        )
    check_complete(source.path, info["missing_keys"], optional)
    if source.quantised:
        keep_layout(model)
    return model, nothing_left


def check_complete(path: str, missing: Iterable[str], optional: Set[str] = frozenset()) -> None:
    """Raise ModelError if parameters are ``missing`` in a checkpoint and not ``optional``."""
    lacks = sorted(set(missing) - optional)
    if lacks:
        only_head = lacks == [f"{HEAD}.weight"]
        advice = "give one with a head, or ask for a new head" if only_head else "use a complete checkpoint"
        names = ", ".join(lacks[:5])
        raise ModelError(f"the checkpoint {path!r} has no {names}, which would be random: {advice}.")


def nf4(compute: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's format (arXiv 2305.14314): 4-bit normal floats with quantised scales. ``compute``: the dtype of matrix products."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=["lm_head", HEAD],
    )


def keep_layout(hf: nn.Module) -> None:
    """Keep quantised weights in the layout that training and merging read.

    On CPUs with bfloat16 instructions bitsandbytes repacks them in the first evaluation. That fails for layers whose input size is
    not a multiple of its blocks, and leaves the scales in another order.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in hf.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def _init_head(hf: PreTrainedModel) -> None:
    """Draw a new head. The generator is its own, because earlier draws depend on how the model was loaded."""
    head = hf.score
    if head.weight.is_meta:
        head.weight = nn.Parameter(torch.empty_like(head.weight, device="cpu"))
    draws = torch.Generator().manual_seed(torch.initial_seed())
    nn.init.normal_(head.weight, mean=0.0, std=1.0 / (head.in_features + 1), generator=draws)


def _ready(model: Model, source: ModelSource) -> Model:
    recompute, lora = source.recompute, source.lora
    layers.remove_fixed(model)
    # before kernels and adapters change the layers: the proof compares with the plain model
    if model.hf.config.model_type not in ARCHITECTURES:
        verify_packing(model)
    # replace layers first, since adapters wrap the layers that they find
    if source.layers is Layers.LIGER:
        layers.apply_liger(model.hf)
    elif source.layers is Layers.STANDARD:
        use_host_layers(model.hf)
    if lora is not None:
        from togi.model.adapters import add_lora  # PEFT takes more than half a second to import

        add_lora(model, lora)
        if recompute is not None and recompute.use_reentrant:
            # the re-entrant kind drops the gradients of a block whose input needs none, and the embedding is frozen
            model.hf.enable_input_require_grads()
    if recompute is not None:
        layers.use_recompute(model.hf, recompute)
    # last: it compiles the forward that all of the above left
    if source.layers is Layers.COMPILED:
        layers.compile_layers(model.hf)
    model.train()
    return model
