"""A LoRA adapter merged into its base model, written as a plain Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from togi.config.merge import MergeConfig
from togi.data.chat import Tokenizer, load_tokenizer
from togi.errors import ConfigError, DataError, ModelError
from togi.model.checkpoint import written_aside
from togi.model.loading import dtype_of
from togi.model.merge import load_merged
from togi.model.policy import PolicyModel, ScalarModel
from togi.model.proof import save_proven


def check_target(output: str, sources: Mapping[str, str]) -> None:
    """Raise ConfigError if what is written would take the place of what it is made of, or of a folder around it."""
    target = Path(output).resolve()
    for flag, source in sources.items():
        if source and Path(source).exists() and Path(source).resolve().is_relative_to(target):
            raise ConfigError(f"--output_path {output} would replace --{flag} {source}: give another folder.")


def _check_rows(config: MergeConfig, model: PolicyModel | ScalarModel, tokenizer: Tokenizer) -> None:
    """The tokens that were added beside the adapter have rows in it. Raises ModelError.

    A tokenizer that is larger than its model is only a fault where that of the base is not.
    """
    base, largest = str(model.hf.config.name_or_path), max(tokenizer.get_vocab().values())
    rows = int(model.hf.get_input_embeddings().weight.shape[0])
    if largest < rows:
        return
    try:
        known = max(
            load_tokenizer(base, chat_template=None, trust_remote_code=config.trust_remote_code).get_vocab().values()
        )
    except DataError:  # a base without a tokenizer: nothing says that tokens were added
        known = largest
    if known < rows:
        raise ModelError(
            f"the tokenizer of the adapter {config.lora_path} has {largest + 1} tokens and the model {base} has {rows} rows in "
            "its embedding, and the adapter does not hold the others: give the model with the added tokens as --model_path."
        )


def merge(config: MergeConfig) -> None:
    """Write the merged model, with the tokenizer that lies beside the adapter or else the base model's.

    Raises ModelError for an adapter that does not fit.
    """
    check_target(config.output_path, {"lora_path": config.lora_path, "model_path": config.model_path})
    trust = config.trust_remote_code
    model = load_merged(config.lora_path, config.model_path, scalar=config.is_rm, trust_remote_code=trust)
    beside = (Path(config.lora_path) / "tokenizer_config.json").is_file()
    source = config.lora_path if beside else model.hf.config.name_or_path
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=trust)
    if beside:
        _check_rows(config, model, tokenizer)
    with written_aside(Path(config.output_path)) as aside:
        dtype = dtype_of(config.bf16)
        save_proven(aside, model, tokenizer, dtype, trust_remote_code=trust)
