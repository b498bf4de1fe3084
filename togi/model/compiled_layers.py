"""The layers of a model by ``torch.compile``: one region a layer, compiled once for all layers that are alike.

Attention is left out, and runs between the parts: what it does depends on the segment table, of which every pack has its own.
Only the forward itself is compiled, not the call around it, where sharding and recomputing hook in.
"""

from __future__ import annotations

import os
import time

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from togi.errors import ModelError
from togi.model.attention import SEGMENTS, VARLEN, segment_attention, varlen_attention
from togi.model.ring_attention import RING, ring_attention
from togi.plan.machine import cache_folder

# Shown equal to the layers as they are, in outputs and gradients. A mixture's experts get other numbers of tokens each time.
TESTED = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")


def check_compiled(kind: str) -> None:
    """Raise ModelError where layers of this type were not tested compiled: before weights are read."""
    if kind not in TESTED:
        raise ModelError(
            f"--torch_compile is tested with {', '.join(TESTED)} models, and this is a {kind} model: leave the flag out."
        )


def compile_layers(hf: PreTrainedModel) -> None:
    """Let every layer's forward be compiled when it is first called, for any number of tokens; what is built stays on disk."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / f"inductor-{os.getuid()}"))
    for name, function in ((SEGMENTS, segment_attention), (VARLEN, varlen_attention), (RING, ring_attention)):
        AttentionInterface.register(name, torch.compiler.disable(function))  # type: ignore[no-untyped-call]
    clock.start()
    for layer in hf.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = torch.compile(layer.forward, dynamic=True)


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
