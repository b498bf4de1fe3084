"""Liger's Triton kernels for norms, rotary embeddings and MLPs, in a model that is built already.

Its losses are not used: the log-prob head (``logprob_head``) never makes the logits either, and packs know no labels.
"""

from __future__ import annotations

import importlib.util

from transformers import PreTrainedModel

from togi.errors import ModelError

# Shown equal to Transformers' own layers, in outputs and gradients. The package knows more, and leaves those it does not know
# as they are without a word.
TESTED = ("llama", "mistral", "qwen2", "qwen3")


def check_liger(kind: str) -> None:
    """Raise ModelError where Liger cannot be used for models of this type: before weights are read."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModelError("--use_liger_kernel needs the package liger-kernel: pip install 'togi[liger]'.")
    if kind not in TESTED:
        raise ModelError(
            f"--use_liger_kernel is tested with {', '.join(TESTED)} models, and this is a {kind} model: leave the flag out."
        )


def apply_liger(hf: PreTrainedModel) -> None:
    """Replace the forward of norms and MLPs, and the rotary function; weights and their names stay."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(hf, cross_entropy=False, fused_linear_cross_entropy=False)
