"""A language model whose next token depends on the last one only, by probabilities that are written down.

The embedding is one-hot, attention and MLP add nothing, and the head holds the logarithms. So what it samples, and how often,
can be said by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from tests.tiny import VOCAB, tiny_model, tiny_tokenizer

HIDDEN = 320
NEVER = -60.0


def save_chain_model(folder: Path, chain: Mapping[str, Mapping[str, float]], *, chat_template: str | None) -> Path:
    """Write a model folder. ``chain``: by token, the probabilities of the next ones; after all others comes the end token."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    model = tiny_model(hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=10, intermediate_size=32)
    log_probs = torch.full((VOCAB, VOCAB), NEVER)
    log_probs[:, tokenizer.eos_token_id] = 0.0
    for token, nexts in chain.items():
        row = log_probs[_id(tokenizer, token)]
        row.fill_(NEVER)
        for following, probability in nexts.items():
            row[_id(tokenizer, following)] = math.log(probability)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB, HIDDEN))
        model.lm_head.weight.zero_()
        # the last norm makes a one-hot vector sqrt(HIDDEN) long
        model.lm_head.weight[:, :VOCAB] = log_probs.T / math.sqrt(HIDDEN)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _id(tokenizer: object, token: str) -> int:
    (found,) = tokenizer(token, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    return int(found)
