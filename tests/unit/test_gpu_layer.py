"""One layer of a 7B model as a GPU runs it, on tensors without data: how many operations, and how much memory is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2Model

from tests.packs import make_segments
from togi.algo import partial_attention
from togi.batch import NO_PREFIX, segment_positions
from togi.model.attention import VARLEN

META = torch.device("meta")
PROMPT, RESPONSE, WAYS = 256, 224, 8
# 8 prompts of 256 tokens with 8 responses of 224 each: 16,384 tokens
PACK = make_segments(
    ([PROMPT] + [RESPONSE] * WAYS) * WAYS,
    [link for first in range(0, WAYS * (WAYS + 1), WAYS + 1) for link in (NO_PREFIX, *[first] * WAYS)],
)
TOKENS = sum(PACK.lengths_S)


NO_KERNEL = (torch.ops.aten._unsafe_view, torch.ops.aten.promote_types)


class Operations(TorchDispatchMode):
    """Every operation that starts a kernel, by name, and the rows of keys that FlashAttention gets."""

    def __init__(self) -> None:
        super().__init__()
        self.names = Counter[str]()
        self.key_rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.overloadpacket not in NO_KERNEL:
            self.names[str(func.overloadpacket)] += 1
        if func.overloadpacket is torch.ops.aten._flash_attention_forward:
            self.key_rows.append(len(args[1]))
        return func(*args, **(kwargs or {}))


@contextmanager
def on_a_gpu() -> Iterator[None]:
    """Tensors without data stand for those of a GPU."""
    with patch.object(partial_attention, "FLASH_DEVICES", {"meta"}):
        yield


def layer_of(attention: str) -> tuple[nn.Module, nn.Module]:
    config = Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_attention_heads=28,
        num_key_value_heads=4,
        num_hidden_layers=1,
        vocab_size=300,
    )
    with META:
        model = Qwen2Model._from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return model.layers[0], model.rotary_emb


def test_a_layer_is_few_operations_and_copies_no_prompt() -> None:
    layer, rotary = layer_of(VARLEN)
    hidden_1TH = torch.empty(1, TOKENS, 3584, dtype=torch.bfloat16, device=META, requires_grad=True)
    positions, seen = rotary(hidden_1TH, segment_positions(PACK).to(META)[None]), Operations()
    with on_a_gpu():
        layer(
            hidden_1TH, position_embeddings=positions, segments=PACK
        )  # makes the table of the pack, which all layers share
        with seen:
            out = layer(hidden_1TH, position_embeddings=positions, segments=PACK)
            forwards = seen.names.total()
            out.sum().backward()
    assert seen.names["aten._flash_attention_forward"] == seen.names["aten._flash_attention_backward"] == 2
    assert seen.key_rows == [TOKENS, WAYS * PROMPT], "the prompts' keys once, not once a response"
    assert forwards <= 60
    assert seen.names.total() <= 180
