"""The layers of a model by ``torch.compile``: one region a layer, compiled once for all layers that are alike.

Attention is left out, and runs between the parts: what it does depends on the segment table, of which every pack has its own.
Only the forward itself is compiled, not the call around it, where sharding and recomputing hook in.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from togi.config.shared import COMPILABLE
from togi.cpu import own_folder, processor_mark
from togi.errors import ModelError
from togi.model.attention import SEGMENTS, VARLEN, segment_attention, varlen_attention
from togi.model.ring_attention import RING, ring_attention
from togi.plan.machine import check_compiler

RECOMPILE_LIMIT = 64
"""Ways to call a layer that are compiled, such as without gradients; beyond it the layer would run as it is, without a word."""


def check_compiled(kind: str) -> None:
    """Raise ModelError or ConfigError where layers of this type cannot be compiled: before weights are read."""
    if kind not in COMPILABLE:
        raise ModelError(
            f"--torch_compile is tested with {', '.join(COMPILABLE)} models, and this is a {kind} model: leave the flag out."
        )
    check_compiler()


def compile_layers(hf: PreTrainedModel) -> None:
    """Let every layer's forward be compiled when it is first called, for any number of tokens; what is built stays on disk."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own_folder("inductor") / processor_mark()))
    for name, function in ((SEGMENTS, segment_attention), (VARLEN, varlen_attention), (RING, ring_attention)):
        AttentionInterface.register(name, torch.compiler.disable(function))  # type: ignore[no-untyped-call]
    clock.start()
    build: Any = torch.compile  # its types lack the limit
    for layer in hf.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = build(layer.forward, dynamic=True, recompile_limit=RECOMPILE_LIMIT)


class CompileClock:
    """``parts``: how many were compiled in this process, or read from disk."""

    def __init__(self) -> None:
        self.parts = 0
        self._seconds = 0.0
        self._begun = 0.0

    def start(self) -> None:
        """From now on; a second call changes nothing."""
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
        """How long that took since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


clock = CompileClock()
