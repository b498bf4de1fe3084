"""Tiny random models and a working tokenizer, made from a config: no download, a fraction of a second.

``head_dim`` is 32, the smallest that vLLM's CPU attention takes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>")
BYTES = 256
VOCAB = 300
END, START, STOP, PAD = range(BYTES, BYTES + len(SPECIAL))
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_EXTRA: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "gemma2": {
        "sliding_window": 4,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
}


def tiny_config(arch: str = "llama", **overrides: object) -> PreTrainedConfig:
    """The configuration of a two-layer model; ``arch`` is a Transformers model type (llama, qwen3, mixtral, ...)."""
    settings: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": START,
        "eos_token_id": STOP,
        "pad_token_id": PAD,
        **_EXTRA.get(arch, {}),
        **overrides,
    }
    return CONFIG_MAPPING[arch](**settings)


def tiny_model(
    arch: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: object
) -> PreTrainedModel:
    """A random causal language model. Weights are larger than HF's default so that differences show."""
    config = tiny_config(arch, initializer_range=0.1, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: token ids 0..255 are bytes (in the byte-level alphabet's order), then the special tokens."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny_model(
    directory: Path, arch: str = "llama", vocab: int = VOCAB, seed: int = 0, **overrides: object
) -> Path:
    """Write a Hugging Face model folder (weights, config, tokenizer with a chat template) and return its path.

    ``vocab`` must be at least 260 (256 bytes and four special tokens).
    """
    assert vocab >= BYTES + len(SPECIAL)
    tiny_model(arch, seed=seed, vocab_size=vocab, **overrides).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return Path(directory)
