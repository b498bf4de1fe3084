"""Activation checkpointing: which layers keep what their backward needs, and which compute it again.

The layers do the work (Transformers' ``GradientCheckpointingLayer``); here it is turned on, and chosen for each pack how many of
them take part.
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
    """How many of ``layers`` must recompute, so that the others keep no more than all keep of ``above`` tokens."""
    return max(0, -(-layers * (tokens - above) // max(tokens, 1)))


def use_recompute(hf: PreTrainedModel, how: Recompute) -> None:
    """Let layers recompute in the backward: all of them, or of each pack as many as its tokens on this rank ask for.

    The first ones: the last keep theirs for the shortest time, so that recomputing begins when that memory is free again.
    Raises ModelError if layers cannot be chosen.
    """
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": how.use_reentrant})
    layers: list[Any] = [layer for layer in hf.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if how.above > 0 and not layers:
        raise ModelError(
            f"--gradient_checkpointing_above: layers of a {hf.config.model_type} model recompute all or none: leave it out."
        )
    if not how.use_reentrant:
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
    """What is kept in a layer's second forward must be what its first would have kept."""
    return checkpoint(partial(_keeping, layer), *inputs, use_reentrant=False)


def _keeping(layer: Callable[..., Any], *inputs: Any) -> Any:
    with keeping_outputs():
        return layer(*inputs)
