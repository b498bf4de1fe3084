"""What is changed about the layers of a loaded model: activation checkpointing, compilation, Liger's kernels, dropout."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from togi.config.architectures import COMPILABLE, WITH_LIGER
from togi.config.shared import Recompute
from togi.cpu import keeping_outputs, own_folder, processor_mark
from togi.errors import ModelError
from togi.model.attention import SEGMENTS, VARLEN, segment_attention, varlen_attention
from togi.model.ring_attention import RING, ring_attention
from togi.plan.machine import check_compiler

RECOMPILE_LIMIT = 64
"""The most variants of a layer that are compiled, such as one without gradients. Beyond it torch silently runs eagerly."""


def check_compiled(kind: str) -> None:
    """Raise ModelError or ConfigError if layers of this model type cannot be compiled. Call it before weights are read."""
    _check_tested("--torch_compile", kind, COMPILABLE)
    check_compiler()


def _check_tested(flag: str, kind: str, tested: Collection[str]) -> None:
    if kind not in tested:
        raise ModelError(
            f"{flag} is tested with {', '.join(tested)} models, and this is a {kind} model: leave the flag out."
        )


def compile_layers(hf: PreTrainedModel) -> None:
    """Compile every layer's forward at its first call, for any number of tokens. The result is cached on disk."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own_folder("inductor") / processor_mark()))
    # a graph break around attention, whose Python code reads the segment table
    for name, function in ((SEGMENTS, segment_attention), (VARLEN, varlen_attention), (RING, ring_attention)):
        AttentionInterface.register(name, torch.compiler.disable(function))  # type: ignore[no-untyped-call]
    clock.start()
    build: Any = torch.compile  # its types lack the limit
    for layer in hf.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = build(layer.forward, dynamic=True, recompile_limit=RECOMPILE_LIMIT)


class CompileClock:
    """Measures the time that compiling takes. ``parts``: regions compiled in this process or loaded from the disk cache."""

    def __init__(self) -> None:
        self.parts = 0
        self._seconds = 0.0
        self._begun = 0.0

    def start(self) -> None:
        """Start measuring. A second call has no effect."""
        from torch._dynamo.callback import callback_handler  # takes a second to import

        if self._begin not in callback_handler.start_callbacks:
            callback_handler.register_start_callback(self._begin)
            callback_handler.register_end_callback(self._end)

    def _begin(self, _: object) -> None:
        self._begun = time.perf_counter()

    def _end(self, _: object) -> None:
        self.parts += 1
        self._seconds += time.perf_counter() - self._begun

    def take_seconds(self) -> float:
        """Seconds spent compiling since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


clock = CompileClock()


def check_liger(kind: str) -> None:
    """Raise ModelError if Liger cannot be used for models of this type. Call it before weights are read.

    The package supports more model types than were tested equal, and silently skips those that it does not support.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModelError("--use_liger_kernel needs the package liger-kernel: pip install '.[liger]'.")
    _check_tested("--use_liger_kernel", kind, WITH_LIGER)


def apply_liger(hf: PreTrainedModel) -> None:
    """Replace the forward of norms and MLPs, and the rotary function, in place. Weights and their names stay."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(hf, cross_entropy=False, fused_linear_cross_entropy=False)


def recomputed_layers(layers: int, tokens: int, above: int) -> int:
    """How many of ``layers`` must recompute, so that the others keep no more than all layers would for ``above`` tokens."""
    return max(0, -(-layers * (tokens - above) // max(tokens, 1)))


def use_recompute(hf: PreTrainedModel, how: Recompute) -> None:
    """Let layers recompute in the backward: all of them, or for each pack as many as its tokens on this rank require.

    The first layers recompute. The last layers keep their activations for the shortest time, and free them before recomputing
    begins. Raises ModelError if the architecture cannot choose single layers.
    """
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": how.use_reentrant})
    layers = [layer for layer in hf.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if how.above > 0 and not layers:
        raise ModelError(
            f"--gradient_checkpointing_above: layers of a {hf.config.model_type} model recompute all or none: leave it out."
        )
    if not how.use_reentrant:
        # the re-entrant kind runs its first forward without gradients and keeps nothing
        for module in hf.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = _checkpoint

    def choose(body: nn.Module, inputs: tuple[object, ...], named: dict[str, torch.Tensor]) -> None:
        again = recomputed_layers(len(layers), named["input_ids"].numel(), how.above)
        for place, layer in enumerate(layers):
            layer.gradient_checkpointing = place < again

    if how.above > 0:
        hf.base_model.register_forward_pre_hook(choose, with_kwargs=True)


def _checkpoint(layer: Callable[..., object], *inputs: object) -> object:
    """Both forwards of a layer must save the same tensors for the backward (``keeping_outputs``)."""

    def keeping(*again: object) -> object:
        with keeping_outputs():
            return layer(*again)

    return checkpoint(keeping, *inputs, use_reentrant=False)


# "jitter" is the noise by which routers of experts multiply their inputs in training.
NOISE = ("drop", "jitter")
# Rates of heads for other tasks, which Togi does not load.
OTHER_HEADS = ("classifier", "summary")


def switch_off(config: PreTrainedConfig | dict[str, object], prefix: str = "") -> dict[str, float]:
    """Set every rate to 0, in place. Returns the rates that were not 0, by the configuration's own keys after ``prefix``."""
    settings = config if isinstance(config, dict) else vars(config)
    found: dict[str, float] = {}
    for key, value in list(settings.items()):
        name = str(key)  # of a label's number too
        is_noise = any(word in name for word in NOISE) and not name.startswith(OTHER_HEADS)
        if isinstance(value, PreTrainedConfig | dict):
            found |= switch_off(value, f"{prefix}{key}.")
        elif is_noise and isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
            found[prefix + name] = float(value)
            settings[key] = 0.0
    return found


def remove_fixed(model: nn.Module) -> None:
    """Switch off dropout modules whose rate is not in the configuration."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def dropout_notice(path: str, rates: Mapping[str, float]) -> str:
    """The warning for the user about the ``rates`` that were switched off."""
    told = ", ".join(f"{key} {rate:g}" for key, rate in sorted(rates.items()))
    return f"{path}: dropout is off in training ({told} in its config.json, 0 in that of the trained model)"
