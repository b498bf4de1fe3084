"""A key/value cache with a row for every running sequence, filled from position 0 without left padding.

Shape letters: N rows in use, H key/value heads, G query heads, C capacity in tokens, Q new tokens, L keys, D head size.

The last row replaces a finished one. So the rows in use are always the first ones, and a decode step is one plain batch. The
layers plug into Transformers' ``Cache``. The caller makes masks and positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

ATTENTION = "togi_slots"
ROW_STEP = 16
TOKEN_STEP = 64
KEY_STEP = 32
"""Attention is over a multiple of this many keys. On a CPU, float32 sums round differently with another number of masked keys, and
the results of a sequence would depend on the other sequences.
"""


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, [N, H, C, D] each. Allocated and grown when tokens arrive."""

    is_sliding = False

    def __init__(self, slots: SlotCache) -> None:
        super().__init__()
        self._slots = slots
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values ([n, H, Q, D] each) in their rows. Returns the keys and values for attention to read."""
        slots, new = self._slots, (key_states, value_states)
        self._fit(new)
        if slots.prefilling:
            # prompts attend only to themselves: the cache is written, not read
            for buffer, states in zip(self.buffers, new, strict=True):
                buffer[slots.rows, :, : states.shape[2]] = states[slots.sources]
            return key_states, value_states
        # decode: one new token for each row, then attention over the rows and keys in use
        count, length = len(slots.rows), slots.length
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[slots.rows, :, slots.positions] = states[:, :, 0]
        keys, values = self.buffers
        return keys[:count, :, :length], values[:count, :, :length]

    def _fit(self, new: tuple[Tensor, Tensor]) -> None:
        rows, capacity = self._slots.size
        if self.buffers and (self.buffers[0].shape[0], self.buffers[0].shape[2]) == (rows, capacity):
            return
        old, self.buffers = self.buffers, []
        for i, states in enumerate(new):
            # zeros, not empty: masked values are multiplied by a softmax weight of 0, and 0 x NaN is NaN
            buffer = states.new_zeros(rows, states.shape[1], capacity, states.shape[3])
            if old:
                kept_rows, kept = min(rows, old[i].shape[0]), min(capacity, old[i].shape[2])
                buffer[:kept_rows, :, :kept] = old[i][:kept_rows, :, :kept]
            self.buffers.append(buffer)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length, 0) if self._slots.prefilling else (self._slots.length, 0)

    def get_seq_length(self) -> int:
        return 0 if self._slots.prefilling else self._slots.length - 1

    def get_max_length(self) -> int:
        return -1


class SlotCache:
    """The cache layers of a model, and the rows and positions of the tokens of the next forward."""

    def __init__(self, num_layers: int) -> None:
        self._layers = [SlotLayer(self) for _ in range(num_layers)]
        self.cache = Cache(layers=self._layers)
        self.clear()

    def clear(self) -> None:
        """Free all memory."""
        for layer in self._layers:
            layer.buffers = []
        self.size = (0, 0)
        self.prefilling = True
        self.length = 0
        self.rows = self.sources = self.positions = torch.empty(0, dtype=torch.int64)

    def prefill(self, first_row: int, sources: list[int], width: int, device: torch.device) -> None:
        """Prepare a forward that reads prompts from their start, padded on the right to ``width`` tokens.

        Row ``first_row + i`` gets the states of prompt ``sources[i]``, so rows may share a prompt.
        """
        self.prefilling = True
        self.rows = torch.arange(first_row, first_row + len(sources), device=device)
        self.sources = torch.tensor(sources, device=device)
        self.length = max(width, self.length if first_row > 0 else 0)
        self._reserve(first_row + len(sources))

    def decode(self, positions_N: Tensor) -> None:
        """Prepare a forward that reads one token for each row in use, at these positions (0-based)."""
        self.prefilling = False
        self.rows = torch.arange(len(positions_N), device=positions_N.device)
        self.positions = positions_N
        self.length = _round_up(int(positions_N.max()) + 1, KEY_STEP)
        self._reserve(len(positions_N))

    def move(self, source: int, target: int) -> None:
        """Copy row ``source`` over row ``target``."""
        for layer in self._layers:
            for buffer in layer.buffers:
                buffer[target] = buffer[source]

    def _reserve(self, rows: int) -> None:
        if rows > self.size[0] or self.length > self.size[1]:
            self.size = (_round_up(rows, ROW_STEP), _round_up(self.length, TOKEN_STEP))


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _grouped_attention(
    module: nn.Module,
    query_NGQD: Tensor,
    key_NHLD: Tensor,
    value_NHLD: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """SDPA in which G query heads share H key heads. With a mask Transformers' own function would copy the cache G/H times.

    In a decode step (Q = 1) the query heads that share a key head become query positions.
    """
    heads = query_NGQD.shape[1]
    if query_NGQD.shape[2] == 1:
        query_NHgD = query_NGQD.view(len(query_NGQD), key_NHLD.shape[1], -1, query_NGQD.shape[3])
        out_NHgD = scaled_dot_product_attention(
            query_NHgD, key_NHLD, value_NHLD, attn_mask=attention_mask, scale=scaling
        )
        return out_NHgD.reshape(len(query_NGQD), 1, heads, -1), None
    # prefill: pad queries and keys to multiples of KEY_STEP, masked
    queries, keys = query_NGQD.shape[2], key_NHLD.shape[2]
    more_queries, more_keys = (_round_up(tokens, KEY_STEP) - tokens for tokens in (queries, keys))
    out_NGQD = scaled_dot_product_attention(
        pad(query_NGQD, (0, 0, 0, more_queries)),
        pad(key_NHLD, (0, 0, 0, more_keys)),
        pad(value_NHLD, (0, 0, 0, more_keys)),
        attn_mask=pad(attention_mask, (0, more_keys, 0, more_queries), value=False),
        scale=scaling,
        enable_gqa=True,
    )
    return out_NGQD[:, :, :queries].transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _grouped_attention)
