"""The size of a model on disk, from its config.json alone: a skeleton without weights has all shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from togi.config.shared import LoRA
from togi.model.loading import read_config, skeleton
from togi.model.policy import PolicyModel, ScalarModel

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
    config: Any = read_config(path, trust_remote_code)
    if scalar:
        config.num_labels = 1
    kind: Any = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    hf = skeleton(kind, config, torch.float32, trust_remote_code)
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
