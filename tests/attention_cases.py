"""Segment tables, random queries, attention over the whole [T, T] mask, and a stand-in for FlashAttention's kernel."""

import torch
from torch import Tensor

from tests.packs import make_segments
from togi.batch import NO_PREFIX, Segments, segment_positions
from togi.model.attention import Asked, packed_attention, register

DENSE = "togi_dense"
MODULE = torch.nn.Identity()
# prompt 3 with responses 2, 2, 4; a plain 5; a prompt 2 continued by 3, itself continued by 1 and 1
TREE = make_segments([3, 2, 2, 4, 5, 2, 3, 1, 1], [NO_PREFIX, 0, 0, 0, NO_PREFIX, NO_PREFIX, 5, 6, 6])


def random_qkv(tokens: int, heads: int = 4, groups: int = 2, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    return [torch.randn(1, tokens, h, 8, dtype=dtype).transpose(1, 2).requires_grad_() for h in (heads, groups, groups)]


def run(function, segments, dtype=torch.float64, **keywords):
    """Output and gradients of q, k, v."""
    inputs = random_qkv(sum(segments.lengths_S), dtype=dtype)
    out, _ = function(MODULE, *inputs, None, segments=segments, **keywords)
    (out.double() * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
    return [out, *(x.grad for x in inputs)]


def varlen_stand_in(q, k, v, **given):
    """What flash-attn documents for ``flash_attn_varlen_func``, causal and aligned bottom-right, in plain torch."""
    assert given["causal"]
    assert given["max_seqlen_q"] == max(given["cu_seqlens_q"].diff())
    assert given["max_seqlen_k"] == max(given["cu_seqlens_k"].diff())
    outputs = []
    for s in range(len(given["cu_seqlens_q"]) - 1):
        own = q[given["cu_seqlens_q"][s] : given["cu_seqlens_q"][s + 1]]
        part = slice(given["cu_seqlens_k"][s], given["cu_seqlens_k"][s + 1])
        keys, values = (x[part].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("lhd,mhd->hlm", own, keys) * (given["softmax_scale"] or q.shape[-1] ** -0.5)
        if given["softcap"] > 0:
            scores = given["softcap"] * torch.tanh(scores / given["softcap"])
        distance = torch.arange(len(own))[:, None] + len(keys) - len(own) - torch.arange(len(keys))[None]
        left = given["window_size"][0]
        seen = (distance >= 0) & ((distance <= left) if left >= 0 else True)
        outputs.append(torch.einsum("hlm,mhd->lhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
    return torch.cat(outputs)


@packed_attention
def dense_attention(q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, table: Segments, asked: Asked) -> Tensor:
    """The reference definition: softmax of the masked scores in the input dtype. Slow, O(T^2) memory."""
    k_HTD, v_HTD = (x.repeat_interleave(len(q_HTD) // len(x), dim=0) for x in (k_GTD, v_GTD))
    scores = q_HTD @ k_HTD.transpose(-1, -2) * asked.scale
    if asked.softcap is not None:
        scores = asked.softcap * torch.tanh(scores / asked.softcap)
    weights = scores.masked_fill(~dense_mask(table, asked.window), float("-inf")).softmax(-1)
    return (weights @ v_HTD).transpose(0, 1).contiguous()


def dense_mask(segments: Segments, window: int | None = None) -> Tensor:
    """Bool [T, T]: row i may attend to column j."""
    positions = segment_positions(segments)
    mask_TT = torch.zeros(len(positions), len(positions), dtype=torch.bool)
    spans = [slice(a, a + n) for a, n in zip(segments.starts_S, segments.lengths_S, strict=True)]
    for s, rows in enumerate(spans):
        for link in segments.chain(s)[:-1]:
            mask_TT[rows, spans[link]] = True
        length = segments.lengths_S[s]
        mask_TT[rows, rows] = torch.ones(length, length, dtype=torch.bool).tril()
    return mask_TT if window is None else mask_TT & (positions[:, None] - positions[None, :] < window)


register(DENSE, dense_attention)
