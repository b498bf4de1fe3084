"""Activation checkpointing: which layers keep their activations for the backward, and which recompute them.

Transformers' ``GradientCheckpointingLayer`` does the work. This module turns it on, and chooses for each pack how many layers
recompute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from togi.config.shared import Recompute
from togi.cpu import keeping_outputs
from togi.errors import ModelError


def recomputed_layers(layers: int, tokens: int, above: int) -> int:
    """How many of ``layers`` must recompute, so that the others keep no more than all layers would for ``above`` tokens."""
    return max(0, -(-layers * (tokens - above) // max(tokens, 1)))


def use_recompute(hf: PreTrainedModel, how: Recompute) -> None:
    """Let layers recompute in the backward: all of them, or for each pack as many as its tokens on this rank require.

    The first layers recompute. The last layers keep their activations for the shortest time, and free them before recomputing
    begins. Raises ModelError if the architecture cannot choose single layers.
    """
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": how.use_reentrant})
    layers: list[Any] = [layer for layer in hf.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if how.above > 0 and not layers:
        raise ModelError(
            f"--gradient_checkpointing_above: layers of a {hf.config.model_type} model recompute all or none: leave it out."
        )
    if not how.use_reentrant:
        # the re-entrant kind runs its first forward without gradients and keeps nothing
        for module in hf.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = _checkpoint

    def choose(body: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        again = recomputed_layers(len(layers), named["input_ids"].numel(), how.above)
        for place, layer in enumerate(layers):
            layer.gradient_checkpointing = place < again

    if how.above > 0:
        hf.base_model.register_forward_pre_hook(choose, with_kwargs=True)


def _checkpoint(layer: Callable[..., Any], *inputs: Any) -> Any:
    """Both forwards of a layer must save the same tensors for the backward (``keeping_outputs``)."""
    return checkpoint(partial(_keeping, layer), *inputs, use_reentrant=False)


def _keeping(layer: Callable[..., Any], *inputs: Any) -> Any:
    with keeping_outputs():
        return layer(*inputs)
