"""Check that two forms of a model are equal, by their outputs for a few tokens.

The adapter beside its base is compared with the merged model, and the merged model with the files written. So a loss on the way,
such as a head that is taken for the embedding, raises an error and does not yield a bad model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from togi.config.model_facts import position_limit
from togi.errors import ModelError
from togi.model.checkpoint import save_hf
from togi.model.deferred import quiet
from togi.model.loading import check_complete
from togi.model.policy import HEAD, PolicyModel, ScalarModel

PROBE_TOKENS = 32
# Both models have the same rounded weights.
READ_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
# One model has float32 weights, the other the same weights rounded.
ROUNDED_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def probe(hf: PreTrainedModel) -> Tensor:
    """Token ids [1, length] spread over the vocabulary. Its last ids are among them, since added tokens are at its end."""
    rows = int(hf.get_input_embeddings().weight.shape[0])
    length = min(PROBE_TOKENS, position_limit(hf.config.to_dict()) or PROBE_TOKENS)
    spread = (torch.arange(length) * 7919 + 13) % rows
    last = min(length, rows) // 4
    return torch.cat([spread[: length - last], torch.arange(rows - last, rows)])[None]


def outputs(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits in float32, or the score of a model with a scalar head."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()


def check_equal(one: Tensor, other: Tensor, tolerance: float, this: str, that: str) -> None:
    """Raise ModelError if the norm of the difference exceeds ``tolerance`` times the norm of ``one``."""
    same = one.shape == other.shape
    gap = float((one - other).norm() / one.norm()) if same else float("inf")
    if not gap <= tolerance:
        raise ModelError(
            f"{this} and {that} give other outputs (difference {gap:.2g}, at most {tolerance:g} is rounding): this adapter "
            "cannot be merged, and nothing was written."
        )


def save_proven(
    directory: Path,
    model: PolicyModel | ScalarModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool,
) -> None:
    """Write a plain model (``save_hf``) and check the files against it. The model is unusable afterwards. Raises ModelError."""
    save_hf(directory, model, model.named_parameters(), tokenizer, dtype)
    tokens = probe(model.hf)
    # round the weights as the files have them
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    expected = outputs(model.hf.eval(), tokens)
    prefix = model.value_head_prefix if isinstance(model, ScalarModel) else None
    model.to("meta")  # free its weights: two large models need not be in memory at once
    check_written(directory, tokens, expected, dtype, READ_TOLERANCE[dtype], prefix, trust_remote_code)


def save_adapted(
    directory: Path,
    model: PolicyModel | ScalarModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool,
) -> None:
    """Write a trained model with its adapter merged in, and check the files. The model is unusable after. Raises ModelError."""
    from togi.model.adapters import merged  # PEFT takes more than half a second to import

    save_hf(directory, model, merged(model, model.named_parameters(), dtype), tokenizer, dtype)
    # plain Transformers calls follow, which pass no segment table to Togi's attention
    model.hf.set_attn_implementation("sdpa" if model.hf._supports_sdpa else "eager")
    tokens = probe(model.hf)
    expected = outputs(model.hf.eval(), tokens)
    prefix = model.value_head_prefix if isinstance(model, ScalarModel) else None
    model.to("meta")
    check_written(directory, tokens, expected, dtype, ROUNDED_TOLERANCE[dtype], prefix, trust_remote_code)


def check_written(
    directory: Path,
    tokens: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    tolerance: float,
    head_prefix: str | None,
    trust_remote_code: bool,
) -> None:
    """Raise ModelError if the files give other outputs than ``expected``. ``head_prefix``: the name of a scalar head."""
    kind: Any = AutoModelForCausalLM
    more: dict[str, Any] = {}
    if head_prefix is not None:
        kind, more = AutoModelForSequenceClassification, {"num_labels": 1}
        more["key_mapping"] = {} if head_prefix == HEAD else {rf"^{head_prefix}\.": f"{HEAD}."}
    with quiet():
        hf, info = kind.from_pretrained(
            directory, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **more
        )
    check_complete(str(directory), info["missing_keys"])
    check_equal(expected, outputs(hf.eval(), tokens), tolerance, "the merged model", "its files")
