"""A LoRA adapter merged into its base model, written as a plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch

from togi.config.merge import MergeConfig
from togi.data.chat import load_tokenizer
from togi.model.checkpoint import save_hf, written_aside
from togi.model.merge import load_merged


def merge(config: MergeConfig) -> None:
    """Write the merged model, with the tokenizer that lies beside the adapter or else the base model's.

    Raises ModelError for an adapter that does not fit.
    """
    trust = config.trust_remote_code
    model = load_merged(config.lora_path, config.model_path, scalar=config.is_rm, trust_remote_code=trust)
    beside = (Path(config.lora_path) / "tokenizer_config.json").is_file()
    source = config.lora_path if beside else model.hf.config.name_or_path
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=trust)
    with written_aside(Path(config.output_path)) as aside:
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        save_hf(aside, model, model.named_parameters(), tokenizer, dtype)
