"""Partial attention: attention of some queries to some of their keys, and the exact join of such parts.

Shape letters: n independent attentions of one shape, L queries, M keys, H query heads, G key/value heads, D head size.

Each part gives its output and the logarithm of the sum of its exponentials (log-sum-exp). ``join`` weighs the outputs of the
parts with them, which gives the softmax over all keys (Milakov & Gimelshein 2018, arXiv 1805.02867; Liu et al. 2023, arXiv
2310.01889). The backward needs no join: given the joined output and log-sum-exp, each part computes its own share of the gradient.

On the CPU this calls PyTorch's fused kernel, which returns the log-sum-exp and whose backward takes it. On CUDA, in half
precision, this calls PyTorch's FlashAttention, which does the same. What neither takes is a plain implementation in tiles of
bounded size. Results and sums are float32 (float64 from float64) for any input dtype.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from togi.algo.precision import full_precision

TILE_BYTES = 64 * 2**20

# Up to this many queries the half-precision kernels of the CPU are slower than float32, backward by up to three times (torch 2.13,
# AVX512-BF16: at 150 queries 5.0 ms against 2.6, at 300 11.5 against 9.4, at 1,024 equal), and float32 is more exact.
SHORT = 512
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# FlashAttention over pieces of any length (Dao 2023, arXiv 2307.08691), as torch.nn.attention.varlen calls it. Its public function
# has a backward that takes no joined output and log-sum-exp, so the operators are called here.
_FLASH = torch.ops.aten._flash_attention_forward
_FLASH_BACKWARD = torch.ops.aten._flash_attention_backward
FLASH_DEVICES = {"cuda"}
"""Where the two operators exist. A test adds the CPU, for which it has registered its own."""
FLASH_TYPES = frozenset({torch.bfloat16, torch.float16})
LARGEST_HEAD, HEAD_MULTIPLE = 256, 8
# What torch.nn.attention calls it, the package that brings it, and the GPUs (compute capability, before the dot) that it is for.
NEWER_FLASH = (("FA3", "flash_attn_interface", (9,)), ("FA4", "flash_attn.cute", (9, 10)))

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Attention of pieces of queries, each to the piece of keys at the same place, in one call of FlashAttention.

    ``starts_q`` and ``starts_k``: bounds of the pieces (int32), [pieces + 1]. ``longest``: upper bounds on the tokens in a piece
    of queries and in a piece of keys. With ``causal`` or a ``window`` (in keys, the token itself included) the last query is at
    the position of the last key.
    """

    starts_q: Tensor
    starts_k: Tensor
    longest: tuple[int, int]
    causal: bool
    window: int | None = None

    @classmethod
    def equal(cls, count: int, queries: int, keys: int, causal: bool, device: torch.device) -> Pieces:
        """``count`` pieces of one shape."""
        bounds_q, bounds_k = (torch.arange(count + 1, device=device, dtype=torch.int32) * n for n in (queries, keys))
        return cls(bounds_q, bounds_k, (queries, keys), causal)

    def attend(self, q_RHD: Tensor, k_UGD: Tensor, v_UGD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Returns the output [R, H, D of values] and the log-sum-exp [H, R] (float32)."""
        q, k, v = _padded(q_RHD, k_UGD, v_UGD)
        out, lse_HR, *_ = _FLASH(q, k, v, *self._bounds, 0.0, *self._mask, False, scale=scale, **self._window)
        assert lse_HR.shape == (q.shape[1], q.shape[0])
        return out[..., : v_UGD.shape[-1]], lse_HR

    def backward(
        self, grad_RHD: Tensor, inputs: tuple[Tensor, Tensor, Tensor], out_RHD: Tensor, lse_HR: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``inputs`` (q, k, v). ``out_RHD`` and ``lse_HR`` are those over all keys of the queries."""
        q, k, v, grad, out = _padded(*inputs, grad_RHD, out_RHD)
        random = torch.zeros(2, dtype=torch.uint64, device=q.device)  # no dropout: the seed is not used
        unused = torch.empty(0, device=q.device)
        grads = _FLASH_BACKWARD(
            grad, q, k, v, out, lse_HR, *self._bounds, 0.0, *self._mask, random, unused, scale=scale, **self._window
        )
        d_q, d_k, d_v = (found[..., : given.shape[-1]] for found, given in zip(grads, inputs, strict=True))
        return d_q, d_k, d_v

    @property
    def _bounds(self) -> tuple[Tensor, Tensor, int, int]:
        # at least 2: with one query a piece the kernel takes its path for decoding, which orders heads differently
        return self.starts_q, self.starts_k, max(2, self.longest[0]), self.longest[1]

    @property
    def _mask(self) -> tuple[bool]:
        return (self.causal and self.window is None,)  # a window has the causal edge on its right

    @property
    def _window(self) -> dict[str, int]:
        if self.window is None:
            return {}
        return {"window_size_left": self.window - 1, "window_size_right": 0}


def _is_installed(package: str) -> bool:
    parent = package.partition(".")[0]
    return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(package) is not None


@cache
def use_newest_flash() -> str:
    """Let PyTorch's operators run FlashAttention 3 or 4 where this GPU and an installed package have it. Returns which one runs.

    PyTorch's own kernels are FlashAttention 2. Those of the packages are made for one generation of GPUs each.
    """
    if torch.cuda.is_available() and "activate_flash_attention_impl" in vars(torch.nn.attention):
        generation = _generation(torch.device("cuda"))
        for name, package, generations in NEWER_FLASH:
            if generation in generations and _is_installed(package):
                try:
                    torch.nn.attention.activate_flash_attention_impl(name)
                except (ImportError, RuntimeError) as error:
                    logger.warning("%s cannot be used, FlashAttention 2 runs (%s)", package, error)
                else:
                    return name
    return "FA2"


def has_flash(device: torch.device) -> bool:
    """Whether FlashAttention's operators run on this device: a GPU of the Ampere generation or newer."""
    return device.type in FLASH_DEVICES and (device.type != "cuda" or _generation(device) >= 8)


@cache
def _generation(device: torch.device) -> int:
    """The compute capability of a GPU, before the dot."""
    return torch.cuda.get_device_capability(device)[0]


def flash_takes(q: Tensor, v: Tensor) -> bool:
    """Whether FlashAttention computes these queries [..., D] and values: on CUDA, in half precision, heads of up to 256."""
    return has_flash(q.device) and q.dtype in FLASH_TYPES and max(q.shape[-1], v.shape[-1]) <= LARGEST_HEAD


def _padded(*tensors: Tensor) -> list[Tensor]:
    """With heads of one size, a multiple of eight: zeros change no score and no output."""
    widest = max(x.shape[-1] for x in tensors)
    wanted = -(-widest // HEAD_MULTIPLE) * HEAD_MULTIPLE
    return [x if x.shape[-1] == wanted else pad(x, (0, wanted - x.shape[-1])) for x in tensors]


def attend(q_nHLD: Tensor, k_nGMD: Tensor, v_nGMD: Tensor, scale: float, visible: Visibility) -> tuple[Tensor, Tensor]:
    """Returns the output [n, H, L, D] and the log-sum-exp [n, H, L]. Every query must see at least one key."""
    if visible.seen_LM is None and flash_takes(q_nHLD, v_nGMD):
        count, heads, queries, _ = q_nHLD.shape
        pieces = Pieces.equal(count, queries, k_nGMD.shape[2], visible.causal, q_nHLD.device)
        out_RHD, lse_HR = pieces.attend(_in_rows(q_nHLD), _in_rows(k_nGMD), _in_rows(v_nGMD), scale)
        return full_precision(_in_pieces(out_RHD, count)), lse_HR.view(heads, count, queries).transpose(0, 1)
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
    if visible.seen_LM is None and flash_takes(inputs[0], inputs[2]):
        (count, heads, queries, _), keys = inputs[0].shape, inputs[1].shape[2]
        pieces = Pieces.equal(count, queries, keys, visible.causal, grad_nHLD.device)
        q, k, v, grad, out = (_in_rows(x.to(inputs[0].dtype)) for x in (*inputs, grad_nHLD, out_nHLD))
        lse_HR = lse_nHL.transpose(0, 1).reshape(heads, count * queries)
        d_q, d_k, d_v = (
            full_precision(_in_pieces(x, count)) for x in pieces.backward(grad, (q, k, v), out, lse_HR, scale)
        )
        return d_q, d_k, d_v
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
    share = torch.sigmoid(more_lse - lse)  # of all exponentials, those of the second part
    return torch.lerp(out, more, share[..., None]), torch.logaddexp(lse, more_lse)


def _in_rows(x_nHLD: Tensor) -> Tensor:
    """[n x L, H, D]: the pieces one after another."""
    return x_nHLD.transpose(1, 2).flatten(0, 1)


def _in_pieces(x_RHD: Tensor, count: int) -> Tensor:
    return x_RHD.view(count, -1, *x_RHD.shape[1:]).transpose(1, 2)


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
