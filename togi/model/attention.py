"""Attention over a pack: one function per back end, registered with Transformers' attention interface.

Shape letters: T packed tokens, H query heads, G key/value heads, D head size; n segments of equal length L, whose keys
are a context of C tokens followed by their own L: M = C + L.

The functions receive the ``Segments`` table as the keyword ``segments`` of the model's forward. A token sees the chain
of prefixes of its segment, and its own segment up to itself, and nothing else.

* ``togi_segments``: one SDPA call for each run of equal segments, any device (on a CPU by ``togi.cpu``).
* ``togi_varlen``: FlashAttention's variable-length kernels where they compute it (CUDA, half precision): one call, and one more
  for each level of shared prefixes (below); elsewhere as ``togi_segments``. The name avoids the word "flash", which makes
  Transformers look for a kernel of that name and lets models replace it by another.

The layers compute a shared prefix once. Where a back end gathers the prefix's keys again for every continuation, attention costs
as much as in the plain layout, less the prompt's own part: each response must read the prompt's keys anyway.

An attention feature that a back end does not support raises ModelError. It is never ignored.

FlashAttention over a pack with shared prefixes keeps no second copy of any key. In one call R of the tokens are queries and U
are keys. Each token attends causally to its own segment: one variable-length call for the whole pack. It attends to all tokens
of its prefixes: a second call for the outermost prefixes, where all continuations of a prompt are one long row of queries; one
more call for each deeper level of a tree of turns. The partial results are joined by their log-sum-exps. Given the joined
output and log-sum-exp, the kernel's backward of a part is that part of the whole gradient (``partial_attention``). So the
backward keeps only the layer's own tensors. Gathered keys would be kept once for every continuation. A prefix of few tokens
(``_short_prefixes``) has no call: its keys stand before those of each continuation in the first call, for the time of the call.

A window that cuts hides other keys from each continuation, so there each one gets its own copy of the keys within the window, for
the time of the call; it is one call for the whole pack.

The kernels come with PyTorch, for CUDA and half precision only. Scores that a model caps need the flash-attn package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from togi.algo.partial_attention import Pieces, Run, flash_takes, join, visible_keys, window_of
from togi.algo.precision import Context, full_precision
from togi.batch import NO_PREFIX, Segments, moved
from togi.cpu import host_attention
from togi.errors import ModelError

QUERIES_PER_COPY = 16
"""A prefix is a call of its own if it has at most so many queries for each copy of a key that this saves."""


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """One kernel call. ``queries_R`` and ``keys_U``: packed indices of the tokens; None for all tokens in their order."""

    queries_R: Tensor | None
    keys_U: Tensor | None
    pieces: Pieces


def _rows(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x[index]


@lru_cache(maxsize=8)
def levels_of(segments: Segments, window: int | None, device: torch.device) -> tuple[Level, ...]:
    """The calls for a pack: first every segment on itself, then on its prefixes, outermost first.

    A prefix that is short for what continues it is no call of its own: each continuation gets a copy of its keys in the first
    call. With a ``window`` that cuts: one call, of every segment on itself and what its first token sees of its prefixes.
    """
    if window_of(window, _longest(segments)) is not None:
        return (gathered(segments, window, device),)
    tokens = [segments.tokens(s) for s in range(len(segments))]
    short = _short_prefixes(segments)
    chains = [[link for link in segments.chain(s)[:-1] if link not in short] for s in range(len(segments))]
    near = [
        torch.cat([*(tokens[link] for link in segments.chain(s) if link in short and link != s), own])
        for s, own in enumerate(tokens)
    ]
    pieces = _pieces(tokens, near, causal=True, window=None, device=device)
    levels = [Level(None, moved(torch.cat(near), device) if short else None, pieces)]
    for depth in range(max(map(len, chains))):
        # one piece for each prefix at this depth: all segments below it are its queries
        asking: dict[int, list[Tensor]] = {}
        for own, chain in zip(tokens, chains, strict=True):
            if depth < len(chain):
                asking.setdefault(chain[depth], []).append(own)
        queries, keys = [torch.cat(below) for below in asking.values()], [tokens[prefix] for prefix in asking]
        pieces = _pieces(queries, keys, causal=False, window=None, device=device)
        levels.append(Level(moved(torch.cat(queries), device), moved(torch.cat(keys), device), pieces))
    return tuple(levels)


@lru_cache(maxsize=8)
def gathered(segments: Segments, window: int | None, device: torch.device) -> Level:
    """One call for a pack: every segment on itself and on what its first token sees of its prefixes, gathered again for each."""
    cut = window_of(window, _longest(segments))
    tokens = [segments.tokens(s) for s in range(len(segments))]
    keys: list[Tensor] = []
    for s, own in enumerate(tokens):
        context = torch.cat([own[:0], *(tokens[link] for link in segments.chain(s)[:-1])])
        near = context if cut is None else context[max(0, len(context) - cut + 1) :]
        keys.append(torch.cat([near, own]))
    pieces = _pieces(tokens, keys, causal=True, window=cut, device=device)
    return Level(None, None if segments.is_plain else moved(torch.cat(keys), device), pieces)


def _short_prefixes(segments: Segments) -> set[int]:
    """Prefixes whose keys are copied for every continuation.

    A call of its own reads the queries of all that continues a prefix, and joins their results. Where rows begin alike for a few
    tokens more than others, as answers to one prompt do, that would be many times the work of a few copied keys.
    """
    # of all that continues a segment, which comes after it: tokens and segments
    tokens_S, segments_S = [0] * len(segments), [0] * len(segments)
    for s in reversed(range(len(segments))):
        if (prefix := segments.prefixes_S[s]) != NO_PREFIX:
            tokens_S[prefix] += tokens_S[s] + segments.lengths_S[s]
            segments_S[prefix] += segments_S[s] + 1
    copies_S = [length * number for length, number in zip(segments.lengths_S, segments_S, strict=True)]
    return {s for s, copies in enumerate(copies_S) if 0 < QUERIES_PER_COPY * copies < tokens_S[s]}


def _longest(segments: Segments) -> int:
    """Tokens of the longest segment with its prefixes."""
    return max(segments.context_length(s) + length for s, length in enumerate(segments.lengths_S))


def _pieces(
    queries: list[Tensor], keys: list[Tensor], *, causal: bool, window: int | None, device: torch.device
) -> Pieces:
    """``queries`` and ``keys``: the tokens of each piece."""

    def bounds(pieces: list[Tensor]) -> Tensor:
        return moved(torch.tensor([0, *accumulate(map(len, pieces))], dtype=torch.int32), device)

    longest = max(map(len, queries)), max(map(len, keys))
    return Pieces(bounds(queries), bounds(keys), longest, causal, window)


def attend_to_prefixes(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, segments: Segments, scale: float, window: int | None = None
) -> Tensor:
    """Attention of every token to its segment up to itself and to all prefixes of that segment. Returns [T, H, D]."""
    levels = levels_of(segments, window, q_THD.device)
    out_THD: Tensor = _FlashPrefixes.apply(q_THD, k_TGD, v_TGD, levels, scale)  # type: ignore[no-untyped-call]
    return out_THD


class _FlashPrefixes(torch.autograd.Function):
    """All tokens are the queries of the first of ``levels``, in their order; some of them are those of the others."""

    @staticmethod
    def forward(
        ctx: Context[tuple[tuple[Level, ...], float]],
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        levels: tuple[Level, ...],
        scale: float,
    ) -> Tensor:
        own, *others = levels
        # each token on its own segment, then the result of each level of prefixes joined in
        part_THD, lse_HT = own.pieces.attend(q_THD, _rows(k_TGD, own.keys_U), _rows(v_TGD, own.keys_U), scale)
        narrow_THD = part_THD
        if others:
            out_THD, lse_TH = full_precision(part_THD), lse_HT.t().contiguous()
            for level in others:
                rows, keys = level.queries_R, level.keys_U
                assert rows is not None and keys is not None
                part_RHD, part_HR = level.pieces.attend(q_THD[rows], k_TGD[keys], v_TGD[keys], scale)
                out_THD[rows], lse_TH[rows] = join(out_THD[rows], lse_TH[rows], full_precision(part_RHD), part_HR.t())
            # joined in float32, rounded once
            narrow_THD, lse_HT = out_THD.to(q_THD.dtype), lse_TH.t().contiguous()
        ctx.save_for_backward(q_THD, k_TGD, v_TGD, narrow_THD, lse_HT)
        ctx.fixed = levels, scale
        return narrow_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[tuple[tuple[Level, ...], float]], grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_TGD, v_TGD, out_THD, lse_HT = ctx.saved_tensors
        levels, scale = ctx.fixed
        if len(levels) == 1 and levels[0].keys_U is None:
            alone = levels[0].pieces.backward(grad_THD, (q_THD, k_TGD, v_TGD), out_THD, lse_HT, scale)
            return *alone, None, None
        # sum over levels in float32: a token is a query and a key in several of them
        d_q, d_k, d_v = (torch.zeros_like(full_precision(x)) for x in (q_THD, k_TGD, v_TGD))
        for level in levels:
            rows, keys = level.queries_R, level.keys_U
            inputs = (_rows(q_THD, rows), _rows(k_TGD, keys), _rows(v_TGD, keys))
            lse_HR = lse_HT if rows is None else lse_HT[:, rows]
            grads = level.pieces.backward(_rows(grad_THD, rows), inputs, _rows(out_THD, rows), lse_HR, scale)
            for total, index, grad in zip((d_q, d_k, d_v), (rows, keys, keys), grads, strict=True):
                wide = full_precision(grad)
                _ = total.add_(wide) if index is None else total.index_add_(0, index, wide)
        return d_q.to(q_THD.dtype), d_k.to(k_TGD.dtype), d_v.to(v_TGD.dtype), None, None


SEGMENTS = "togi_segments"
VARLEN = "togi_varlen"

Table = TypeVar("Table")

# hooks outside of attention record the router logits
_HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "output_router_logits"})


@dataclass(frozen=True, slots=True)
class Asked:
    """What a layer asks beside its inputs. ``name``: its class; ``scale`` and ``softcap`` of scores; ``window`` in keys."""

    name: str
    scale: float
    window: int | None
    softcap: float | None


def packed_attention(
    attend: Callable[[Tensor, Tensor, Tensor, Table, Asked], Tensor],
) -> Callable[..., tuple[Tensor, None]]:
    """``attend`` as Transformers calls it. ``query`` is [1, H, T, D], ``key`` and ``value`` [1, G, T, D]; the result [1, T, H, D].

    ``attend`` gets them without the first dimension. The function raises ModelError for a missing table, attention dropout,
    attention that is not causal, or any other argument that would be ignored.
    """

    @wraps(attend)
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        segments: Table | None = None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **others: object,
    ) -> tuple[Tensor, None]:
        name = type(module).__name__
        if segments is None:
            raise ModelError(
                f"{name} was called without its segment table: this architecture cannot be trained packed."
            )
        if dropout > 0:
            raise ModelError(
                f"{name} drops out attention weights, at a rate that is not in the model's config.json: use another model."
            )
        if is_causal is False:
            raise ModelError(f"{name} asks for attention that is not causal: use a decoder model.")
        for argument, given in others.items():
            if argument not in _HARMLESS and given is not None and given is not False:
                raise ModelError(f"{name} passes {argument} to attention, which Togi cannot honour: use another model.")
        assert attention_mask is None and query.shape[0] == 1, "packed attention takes no mask and one row"
        asked = Asked(name, query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
        return attend(query[0], key[0], value[0], segments, asked)[None], None

    return forward


@lru_cache(maxsize=8)
def plan_runs(segments: Segments) -> tuple[Run, ...]:
    """Group neighbouring segments that fit one SDPA call. A segment that is the prefix of others is a run of its own."""
    runs: list[Run] = []
    run_of: dict[int, int] = {}
    prefixes = set(segments.prefixes_S)
    for s, length in enumerate(segments.lengths_S):
        chain = tuple(run_of[link] for link in segments.chain(s)[:-1])
        last = runs[-1] if runs else None
        alone = s in prefixes or s - 1 in prefixes
        if last is not None and not alone and (last.length, last.chain) == (length, chain):
            runs[-1] = Run(last.count + 1, length, chain)
        else:
            runs.append(Run(1, length, chain))
        run_of[s] = len(runs) - 1
    return tuple(runs)


def _segments(q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, table: Segments, asked: Asked) -> Tensor:
    """SDPA run by run. Raises ModelError for capped attention scores, which SDPA does not support."""
    if asked.softcap is not None:
        raise ModelError(
            f"{asked.name} caps its attention scores (attn_logit_softcapping), which SDPA cannot do: "
            "it takes a CUDA device, --bf16 and the package flash-attn."
        )
    runs = plan_runs(table)
    sizes = [run.tokens for run in runs]
    assert q_HTD.shape[1] == sum(sizes), "query and segment table differ in length"
    # on a CPU: one C kernel for all runs, with masks only where the window cuts
    if q_HTD.device.type == "cpu" and q_HTD.shape[-1] == v_GTD.shape[-1]:
        return host_attention(q_HTD, k_GTD, v_GTD, runs, asked.window, asked.scale).transpose(0, 1)
    # elsewhere: one SDPA call a run, each with the keys of its prefixes in front
    # split, not slices: the backward of a split is one concatenation, that of a slice a full-size tensor of zeros
    queries, keys, values = (torch.split(x.transpose(0, 1), sizes) for x in (q_HTD, k_GTD, v_GTD))
    parts: list[Tensor] = []
    for run, own_q, own_k, own_v in zip(runs, queries, keys, values, strict=True):
        q_nLHD = own_q.view(run.count, run.length, *own_q.shape[1:])
        k_nMGD = _with_context(own_k, [keys[link] for link in run.chain], run)
        v_nMGD = _with_context(own_v, [values[link] for link in run.chain], run)
        parts.append(_attend(q_nLHD, k_nMGD, v_nMGD, asked.scale, asked.window).flatten(0, 1))
    return torch.cat(parts)


segment_attention = packed_attention(_segments)


def _with_context(own: Tensor, context: list[Tensor], run: Run) -> Tensor:
    own_nLGD = own.view(run.count, run.length, *own.shape[1:])
    if not context:
        return own_nLGD
    shared_CGD = torch.cat(context) if len(context) > 1 else context[0]
    return torch.cat([shared_CGD.expand(run.count, *shared_CGD.shape), own_nLGD], dim=1)


def _attend(q_nLHD: Tensor, k_nMGD: Tensor, v_nMGD: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal attention, aligned so that the last query sees the last key. Returns [n, L, H, Dv]."""
    length, total = q_nLHD.shape[1], k_nMGD.shape[1]
    mask_LM = visible_keys(length, total, window, q_nLHD.device)
    grouped = q_nLHD.shape[2] != k_nMGD.shape[2]
    if grouped and mask_LM is not None and q_nLHD.device.type != "cpu":
        # with a mask the fused CUDA kernels do not take grouped heads, and the fallback materialises the scores
        k_nMGD, v_nMGD = (x.repeat_interleave(q_nLHD.shape[2] // k_nMGD.shape[2], dim=2) for x in (k_nMGD, v_nMGD))
        grouped = False
    out_nHLD = scaled_dot_product_attention(
        q_nLHD.transpose(1, 2),
        k_nMGD.transpose(1, 2),
        v_nMGD.transpose(1, 2),
        attn_mask=mask_LM,
        is_causal=mask_LM is None,
        scale=scale,
        enable_gqa=grouped,
    )
    return out_nHLD.transpose(1, 2)


@packed_attention
def varlen_attention(q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, table: Segments, asked: Asked) -> Tensor:
    """FlashAttention where it computes this, else SDPA. Capped scores take the flash-attn package (2.6 or newer)."""
    if not flash_takes(q_HTD, v_GTD):
        return _segments(q_HTD, k_GTD, v_GTD, table, asked)
    q_THD, k_TGD, v_TGD = (x.transpose(0, 1) for x in (q_HTD, k_GTD, v_GTD))
    assert len(q_THD) == sum(table.lengths_S), "query and segment table differ in length"
    if asked.softcap is None:
        return attend_to_prefixes(q_THD, k_TGD, v_TGD, table, asked.scale, asked.window)
    from flash_attn import flash_attn_varlen_func

    level = gathered(table, asked.window, q_THD.device)
    pieces = level.pieces
    out_THD: Tensor = flash_attn_varlen_func(
        q_THD,
        _rows(k_TGD, level.keys_U),
        _rows(v_TGD, level.keys_U),
        cu_seqlens_q=pieces.starts_q,
        cu_seqlens_k=pieces.starts_k,
        max_seqlen_q=pieces.longest[0],
        max_seqlen_k=pieces.longest[1],
        softmax_scale=asked.scale,
        causal=True,
        window_size=(-1, -1) if pieces.window is None else (pieces.window - 1, 0),
        softcap=asked.softcap,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out_THD


def register(name: str, function: Callable[..., tuple[Tensor, None]]) -> None:
    """Let models choose ``function`` as their attention by this name.

    No mask is made, as there is none of this name: the segment table says what is seen. To make one, Transformers would also
    look for packed sequences in every forward, which waits for the device.
    """
    AttentionInterface.register(name, function)


register(SEGMENTS, segment_attention)
register(VARLEN, varlen_attention)
