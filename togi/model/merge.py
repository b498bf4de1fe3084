"""Reading an adapter of any PEFT kind into its base model. The sum is PEFT's, in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from togi.config.shared import ADAPTER_CONFIG
from togi.errors import ModelError
from togi.model.adapters import ADAPTER_WEIGHTS, HEAD_RECORD, adapter_name
from togi.model.loading import HEAD, read_config
from togi.model.policy import PolicyModel, ScalarModel

SCALAR_TASK = "SEQ_CLS"


def load_merged(adapter: str, base: str, *, scalar: bool, trust_remote_code: bool = False) -> PolicyModel | ScalarModel:
    """The base model with the adapter in its weights, in float32. ``base`` "" is the one that the adapter names.

    Raises ModelError for a folder without an adapter, one of another kind than ``scalar`` says, one without the scalar head,
    and one whose layers the base does not have.
    """
    record = _record(adapter)
    is_scalar = record.get("task_type") == SCALAR_TASK
    if is_scalar != scalar:
        advice = "add --is_rm" if is_scalar else "leave --is_rm out"
        raise ModelError(f"the adapter {adapter} is of a {'scalar' if is_scalar else 'language'} model: {advice}.")
    names = _names(adapter)
    if scalar and adapter_name(f"{HEAD}.weight") not in names:
        raise ModelError(f"the adapter {adapter} has no {HEAD} head, and a new one would be random: train it again.")
    path = base or record["base_model_name_or_path"]
    config = read_config(path, trust_remote_code)
    kind: Any = AutoModelForCausalLM
    if scalar:
        kind, config.num_labels = AutoModelForSequenceClassification, 1
    model = kind.from_pretrained(path, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    try:
        hf: PreTrainedModel = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"the adapter {adapter} does not fit the model {path}: {str(error).splitlines()[0]}"
        ) from error
    if not scalar:
        return PolicyModel(hf)
    file = Path(adapter) / HEAD_RECORD
    # one that PEFT has written has no such file
    head: dict[str, Any] = {"value_head_prefix": HEAD}
    if file.is_file():
        head = json.loads(file.read_text(encoding="utf-8"))
    merged = ScalarModel(hf, head["value_head_prefix"])
    merged.hf.config.value_head_prefix = head["value_head_prefix"]
    if "mean" in head:
        merged.set_reward_statistics(head["mean"], head["std"])
    return merged


def _record(adapter: str) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((Path(adapter) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"--lora_path {adapter} is not an adapter: its {ADAPTER_CONFIG} cannot be read.") from error
    return record


def _names(adapter: str) -> set[str]:
    path = Path(adapter) / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ModelError(f"--lora_path {adapter} has no {ADAPTER_WEIGHTS}: save the adapter in safetensors.")
    with safe_open(path, framework="pt") as file:
        return set(file.keys())
