"""Partial attention: attention of some queries to some of their keys, and the exact join of such parts.

Shape letters: n independent attentions of one shape, L queries, M keys, H query heads, G key/value heads, D head size.

Each part gives its output and the logarithm of the sum of its exponentials (log-sum-exp). ``join`` weighs the outputs of the
parts with them, which gives the softmax over all keys (Milakov & Gimelshein 2018, arXiv 1805.02867; Liu et al. 2023, arXiv
2310.01889). The backward needs no join: given the joined output and log-sum-exp, each part computes its own share of the gradient.

On the CPU this calls PyTorch's fused kernel, which returns the log-sum-exp and whose backward takes it. Elsewhere it is a plain
implementation in tiles of bounded size. Results and sums are float32 (float64 from float64) for any input dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from togi.algo.precision import full_precision

TILE_BYTES = 64 * 2**20

# Up to this many queries the half-precision kernels of the CPU are slower than float32, backward by up to three times (torch 2.13,
# AVX512-BF16: at 150 queries 5.0 ms against 2.6, at 300 11.5 against 9.4, at 1,024 equal), and float32 is more exact.
SHORT = 512
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` consecutive segments of ``length`` tokens each, which share the same ``chain`` of prefix runs, outermost first."""

    count: int
    length: int
    chain: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.count * self.length


def visible_keys(length: int, total: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which of ``total`` keys each of the last ``length`` tokens sees (bool, [L, M]). None where ``is_causal`` is enough.

    ``window`` counts keys, the token itself included, as Transformers does.
    """
    cut = window_of(window, total)
    if total == length and cut is None:
        return None
    mask_LM = torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)
    return mask_LM if cut is None else mask_LM.triu(total - length - cut + 1)


def window_of(window: int | None, total: int) -> int | None:
    """The window if it hides any of ``total`` keys, else None."""
    return window if window is not None and window < total else None


@dataclass(frozen=True, slots=True, eq=False)
class Visibility:
    """Which keys a query sees: those in ``seen_LM`` if it is set, else with ``causal`` the keys up to its own position.

    The last query is at the position of the last key.
    """

    causal: bool = False
    seen_LM: Tensor | None = None

    def rows(self, rows: slice, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """The mask of some queries, [l, M]. None if they see all keys."""
        if self.seen_LM is not None:
            return self.seen_LM[rows]
        if not self.causal:
            return None
        places_L = torch.arange(keys - queries, keys, device=device)[rows]
        return torch.arange(keys, device=device)[None] <= places_L[:, None]


def attend(q_nHLD: Tensor, k_nGMD: Tensor, v_nGMD: Tensor, scale: float, visible: Visibility) -> tuple[Tensor, Tensor]:
    """Returns the output [n, H, L, D] and the log-sum-exp [n, H, L]. Every query must see at least one key."""
    if q_nHLD.device.type == "cpu":
        q, k, v = _widened(q_nHLD, k_nGMD, v_nGMD)
        mask_LM = _additive(visible, q, k)
        causal = visible.causal and mask_LM is None
        out, lse = _FUSED(q, k, v, 0.0, causal, attn_mask=mask_LM, scale=scale)
        return full_precision(out), lse
    return attend_in_tiles(q_nHLD, k_nGMD, v_nGMD, scale, visible)


def attend_backward(
    grad_nHLD: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out_nHLD: Tensor,
    lse_nHL: Tensor,
    scale: float,
    visible: Visibility,
) -> tuple[Tensor, Tensor, Tensor]:
    """This part's gradients of ``inputs`` (q, k, v). ``out`` and ``lse`` are over all keys; ``grad`` is that of ``out``."""
    if inputs[0].device.type == "cpu":
        q, k, v = _widened(*inputs)
        mask_LM = _additive(visible, q, k)
        causal = visible.causal and mask_LM is None
        grad, out = grad_nHLD.to(q.dtype), out_nHLD.to(q.dtype)
        grads = _FUSED_BACKWARD(grad, q, k, v, out, lse_nHL, 0.0, causal, attn_mask=mask_LM, scale=scale)
        return full_precision(grads[0]), full_precision(grads[1]), full_precision(grads[2])
    return attend_in_tiles_backward(grad_nHLD, inputs, out_nHLD, lse_nHL, scale, visible)


def join(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join two parts of the same queries over different keys. ``out`` and ``more`` are [..., D], their log-sum-exps [...]."""
    whole = torch.logaddexp(lse, more_lse)
    return out * (lse - whole).exp()[..., None] + more * (more_lse - whole).exp()[..., None], whole


def _widened(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    short = q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] <= SHORT
    return (q.float(), k.float(), v.float()) if short else (q, k, v)


def _additive(visible: Visibility, q_nHLD: Tensor, k_nGMD: Tensor) -> Tensor | None:
    """The additive mask for the fused kernel. None if the kernel needs none or makes the causal mask itself."""
    queries, keys = q_nHLD.shape[2], k_nGMD.shape[2]
    if visible.seen_LM is None and (not visible.causal or queries == keys):
        return None
    seen_LM = visible.rows(slice(None), queries, keys, q_nHLD.device)
    assert seen_LM is not None
    return torch.zeros_like(seen_LM, dtype=q_nHLD.dtype).masked_fill_(~seen_LM, -torch.inf)


# ---- any device


def attend_in_tiles(
    q_nHLD: Tensor, k_nGMD: Tensor, v_nGMD: Tensor, scale: float, visible: Visibility
) -> tuple[Tensor, Tensor]:
    """``attend`` in plain operations, with at most ``TILE_BYTES`` of scores at a time."""
    repeats = q_nHLD.shape[1] // k_nGMD.shape[1]
    k_nHMD, v_nHMD = (x.repeat_interleave(repeats, dim=1) for x in (k_nGMD, v_nGMD))
    out = full_precision(q_nHLD.new_empty(*q_nHLD.shape[:3], v_nGMD.shape[3]))
    lse = out.new_empty(q_nHLD.shape[:3])
    for rows, scores_nHlM in _tiles(q_nHLD, k_nHMD, scale, visible):
        lse[:, :, rows] = scores_nHlM.logsumexp(-1)
        weights = scores_nHlM.sub_(lse[:, :, rows, None]).exp_()
        out[:, :, rows] = full_precision(weights.to(v_nHMD.dtype) @ v_nHMD)
    return out, lse


def attend_in_tiles_backward(
    grad_nHLD: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out_nHLD: Tensor,
    lse_nHL: Tensor,
    scale: float,
    visible: Visibility,
) -> tuple[Tensor, Tensor, Tensor]:
    """``attend_backward`` in plain operations. With P the weights and dP = dO V': dS = P (dP - sum_D dO O)."""
    q, k_nGMD, v_nGMD = inputs
    repeats = q.shape[1] // k_nGMD.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k_nGMD, v_nGMD))
    grad_q, grad_k, grad_v = (torch.zeros_like(full_precision(x)) for x in (q, k, v))
    delta_nHL = (full_precision(grad_nHLD) * full_precision(out_nHLD)).sum(-1)
    for rows, scores_nHlM in _tiles(q, k, scale, visible):
        # the weights again, from the log-sum-exp over all keys
        weights = scores_nHlM.sub_(lse_nHL[:, :, rows, None]).exp_()
        grad = grad_nHLD[:, :, rows].to(v.dtype)
        grad_v += full_precision(weights.to(v.dtype).transpose(-1, -2) @ grad)
        inner = full_precision(grad @ v.transpose(-1, -2)).sub_(delta_nHL[:, :, rows, None])
        slope = (weights * inner * scale).to(q.dtype)
        grad_q[:, :, rows] = full_precision(slope @ k)
        grad_k += full_precision(slope.transpose(-1, -2) @ q[:, :, rows])
    # sum over the query heads that share a key/value head
    shape = (k.shape[0], k_nGMD.shape[1], repeats, k.shape[2], -1)
    return grad_q, grad_k.view(shape).sum(2), grad_v.view(shape).sum(2)


def _tiles(q_nHLD: Tensor, k_nHMD: Tensor, scale: float, visible: Visibility) -> Iterator[tuple[slice, Tensor]]:
    """Yield some queries at a time with their scores, -inf for a key that is not seen."""
    count, heads, queries, _ = q_nHLD.shape
    keys = k_nHMD.shape[2]
    step = max(1, TILE_BYTES // (4 * count * heads * keys))
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        scores = full_precision(q_nHLD[:, :, rows] @ k_nHMD.transpose(-1, -2)) * scale
        seen_lM = visible.rows(rows, queries, keys, q_nHLD.device)
        yield rows, scores if seen_lM is None else scores.masked_fill_(~seen_lM, -torch.inf)
