"""Liger's Triton kernels for norms, rotary embeddings and MLPs, put into a model after it is built.

Liger's losses are not used: the log-prob head (``logprob_head``) does not materialise the logits either, and packs have no labels.
"""

from __future__ import annotations

import importlib.util

from transformers import PreTrainedModel

from togi.errors import ModelError

# Tested equal to Transformers' own layers, in outputs and gradients. The package supports more model types, and silently skips
# those that it does not support.
TESTED = ("llama", "mistral", "qwen2", "qwen3")


def check_liger(kind: str) -> None:
    """Raise ModelError if Liger cannot be used for models of this type. Call it before weights are read."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModelError("--use_liger_kernel needs the package liger-kernel: pip install 'togi[liger]'.")
    if kind not in TESTED:
        raise ModelError(
            f"--use_liger_kernel is tested with {', '.join(TESTED)} models, and this is a {kind} model: leave the flag out."
        )


def apply_liger(hf: PreTrainedModel) -> None:
    """Replace the forward of norms and MLPs, and the rotary function, in place. Weights and their names stay."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(hf, cross_entropy=False, fused_linear_cross_entropy=False)
