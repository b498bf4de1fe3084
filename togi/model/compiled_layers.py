"""``torch.compile`` for the layers of a model: one region a layer, compiled once for all layers that are alike.

Attention is not compiled and runs between the compiled parts, because it depends on the segment table, which differs for every
pack. Only ``forward`` is compiled, not ``__call__``, where the hooks of sharding and recomputing are.
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
"""The most variants of a layer that are compiled, such as one without gradients. Beyond it torch silently runs eagerly."""


def check_compiled(kind: str) -> None:
    """Raise ModelError or ConfigError if layers of this model type cannot be compiled. Call it before weights are read."""
    if kind not in COMPILABLE:
        raise ModelError(
            f"--torch_compile is tested with {', '.join(COMPILABLE)} models, and this is a {kind} model: leave the flag out."
        )
    check_compiler()


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
