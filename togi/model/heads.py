"""The fused head: log-probabilities and entropies straight from hidden states, without logits for all tokens.

Shape letters: K tokens in the loss, H hidden size, V vocabulary, R a few chosen tokens of it; k and v are tiles of K and V.

``[K, V]`` is never materialised. The forward walks over blocks of tokens and keeps only the log-normaliser of each
token. The backward recomputes logits tile by tile, vocabulary in the outer loop, so that a slice of the weight's
gradient is complete before the next one starts: no ``[V, H]`` accumulator is needed, and sums are float32.
Matrix products run in the dtype of the weight, everything after them in float32 (float64 stays float64).

Not here: the choice of tokens (``policy``).

The fused head with a teacher: log-probs of the tokens and the divergence from the teacher, both in chunks.

J is the teacher's hidden size. Only one block of tokens has its student and teacher logits
in memory at a time. The backward recomputes both tile by tile. The formulas are in ``togi.algo.kl``. Not here: running the
teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from togi.algo.kl import divergence, divergence_gradient
from togi.algo.precision import Context, Fixed, full_precision, wide_dtype
from togi.batch import moved
from togi.config.choices import Divergence
from togi.cpu import HostKernels, kernels_for

TILE_ROWS_V = 4096


def chunk_bytes_on(device: torch.device) -> int:
    """The largest float32 tile of logits. Every tile reads the whole weight of the head: on a CPU a tile should stay in the
    cache, on an accelerator there should be few of them (tens for 16,384 tokens and 152,000 words).
    """
    return 32 * 2**20 if device.type == "cpu" else 512 * 2**20


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """The function that a model applies to its logits after the head's matrix product: ``cap * tanh(scale * x / cap)``.

    ``softcap`` 0 means no capping: ``scale * x``. Gemma 2 caps; Granite and Cohere scale.
    """

    scale: float = 1.0
    softcap: float = 0.0

    def __call__(self, raw: Tensor, temperature: float) -> Tensor:
        """Final logits / temperature, computed in place of ``raw`` (float32 or float64)."""
        # each factor is a pass over the largest tensor of all: merge factors, and skip a factor of 1
        if self.softcap > 0:
            return raw.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / temperature)
        factor = self.scale / temperature
        return raw if factor == 1.0 else raw.mul_(factor)

    def differentiable(self, raw: Tensor) -> Tensor:
        """Final logits at temperature 1, out of place, for autograd."""
        if self.softcap > 0:
            return self.softcap * torch.tanh(raw * (self.scale / self.softcap))
        return raw * self.scale

    def slope(self, logits: Tensor, temperature: float) -> Tensor | float:
        """d logits / d raw, from the result of ``__call__``."""
        factor = self.scale / temperature
        if self.softcap > 0:
            return (logits * (temperature / self.softcap)).square_().neg_().add_(1.0).mul_(factor)
        return factor


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The last layer of a language model, which gives logits."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    transform: LogitTransform = LogitTransform()


def token_logprobs(
    hidden_KH: Tensor,
    head: Head,
    targets_K: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and, with ``entropy``, the entropy of its distribution; in nats, float32, shape [K].

    The distribution is softmax(logits / temperature). Both results are differentiable. Without ``entropy`` the second
    is an empty tensor. ``chunk_bytes`` bounds one float32 tile of logits (default: by the device); peak memory is about three.
    """
    settings = HeadSettings(temperature, head.transform, entropy, chunk_bytes or chunk_bytes_on(hidden_KH.device))
    inputs = _checked(hidden_KH, head, temperature)
    results: tuple[Tensor, Tensor] = _FusedHead.apply(*inputs, targets_K, settings)  # type: ignore[no-untyped-call]
    return results


def _checked(hidden_KH: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias: the tensors that get a gradient."""
    assert temperature > 0, "temperature must be positive"
    dtype = head.weight_VH.dtype
    assert hidden_KH.dtype == dtype, f"hidden is {hidden_KH.dtype}, the head's weight is {dtype}"
    return hidden_KH, head.weight_VH, head.bias_V


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """How logits are computed, and how many at a time."""

    temperature: float
    transform: LogitTransform
    entropy: bool
    chunk_bytes: int

    def tokens(self, row_width: int) -> int:
        return max(1, self.chunk_bytes // (4 * row_width))

    @property
    def factor(self) -> float:
        """The factor from raw logits to logits / temperature, without capping."""
        return self.transform.scale / self.temperature

    def kernels(self, hidden_KH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> HostKernels | None:
        """The C kernels for these logits, or None: they support scaled logits without a bias or capping."""
        scaled_only = bias_V is None and self.transform.softcap == 0 and self.factor > 0
        return kernels_for(hidden_KH, weight_VH) if scaled_only else None

    def logits(self, hidden_kH: Tensor, weight_vH: Tensor, bias_v: Tensor | None) -> Tensor:
        raw_kv = hidden_kH @ weight_vH.T
        # float() of a float32 product returns the product itself, which nobody else holds: it may be changed in place
        wide_kv = full_precision(raw_kv)
        if bias_v is not None:
            wide_kv += bias_v
        return self.transform(wide_kv, self.temperature)


def _chosen_norm_entropy(logits_kV: Tensor, targets_k: Tensor, *, entropy: bool) -> tuple[Tensor, ...]:
    """The target's logit, the log-sum-exp and, with ``entropy``, the entropy. Overwrites ``logits_kV``."""
    chosen_k = logits_kV.gather(1, targets_k[:, None]).squeeze(1)
    top_k = logits_kV.amax(1)
    below_kV = logits_kV.sub_(top_k[:, None])
    weights_kV = below_kV.exp() if entropy else below_kV.exp_()
    sum_k = weights_kV.sum(1)
    norm_k = top_k + sum_k.log()
    if not entropy:
        return chosen_k, norm_k
    return chosen_k, norm_k, sum_k.log() - torch.linalg.vecdot(weights_kV, below_kV) / sum_k


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[HeadSettings],
        hidden_KH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_K: Tensor,
        settings: HeadSettings,
    ) -> tuple[Tensor, Tensor]:
        wide = wide_dtype(hidden_KH)
        total = hidden_KH.shape[0]
        chosen_K = torch.empty(total, dtype=wide, device=hidden_KH.device)
        norm_K = torch.empty_like(chosen_K)
        entropy_K = torch.empty(total if settings.entropy else 0, dtype=wide, device=hidden_KH.device)
        step, kernels = settings.tokens(weight_VH.shape[0]), settings.kernels(hidden_KH, weight_VH, bias_V)
        # all words for a block of tokens at a time; nothing of size [k, V] outlives the loop
        for start in range(0, total, step):
            rows = slice(start, start + step)
            if kernels is None:
                logits_kV = settings.logits(hidden_KH[rows], weight_VH, bias_V)
                some = _chosen_norm_entropy(logits_kV, targets_K[rows], entropy=settings.entropy)
            else:
                raw_kV = hidden_KH[rows] @ weight_VH.T
                some = kernels.head(raw_kV, settings.factor, targets_K[rows], entropy=settings.entropy)
            chosen_K[rows], norm_K[rows] = some[:2]
            if settings.entropy:
                entropy_K[rows] = some[2]
        ctx.save_for_backward(hidden_KH, weight_VH, bias_V, targets_K, norm_K, entropy_K)
        ctx.fixed = settings
        ctx.set_materialize_grads(False)
        return chosen_K - norm_K, entropy_K

    @staticmethod
    def backward(ctx: Context[HeadSettings], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_KH, weight_VH, bias_V, targets_K, norm_K, entropy_K = ctx.saved_tensors
        settings = ctx.fixed
        up_K = torch.zeros_like(norm_K) if grads[0] is None else grads[0]
        up_entropy_K = grads[1] if settings.entropy else None

        def gradient(logits_kv: Tensor, rows: slice, words: slice) -> Tensor:
            logp_kv = logits_kv.sub_(norm_K[rows, None])
            if up_entropy_K is None:
                grad_kv = logp_kv.exp_().mul_(-up_K[rows, None])
            else:
                grad_kv = _with_entropy(logp_kv, up_K[rows], up_entropy_K[rows], entropy_K[rows])
            add_at_targets(grad_kv, targets_K[rows] - words.start, up_K[rows])
            return grad_kv

        kernels = settings.kernels(hidden_KH, weight_VH, bias_V)
        # one C pass over a tile where there is a kernel, else PyTorch's operators
        if kernels is None:
            tile = through_logits(hidden_KH, weight_VH, bias_V, settings, gradient)
        else:

            def tile(rows: slice, words: slice) -> Tensor:
                raw_kv, targets_k = hidden_KH[rows] @ weight_VH[words].T, targets_K[rows] - words.start
                about_entropy = None if up_entropy_K is None else (entropy_K[rows], up_entropy_K[rows])
                return kernels.head_backward(
                    raw_kv, settings.factor, norm_K[rows], up_K[rows], about_entropy, targets_k
                )

        return *backward_in_tiles(ctx, hidden_KH, weight_VH, bias_V, settings, tile), None, None


Tile = Callable[[slice, slice], Tensor]
"""Maps a slice of tokens and a slice of the vocabulary to the gradient of the head's matrix product there, [k, v]."""


def through_logits(
    hidden_KH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    settings: HeadSettings,
    gradient: Callable[[Tensor, slice, slice], Tensor],
) -> Tile:
    """A tile that recomputes the logits and takes their gradient back through the logit transform.

    ``gradient(logits_kv, rows, words)`` returns the gradient with respect to a tile of logits, which it may overwrite.
    """

    def tile(rows: slice, words: slice) -> Tensor:
        logits_kv = settings.logits(hidden_KH[rows], weight_VH[words], None if bias_V is None else bias_V[words])
        # before ``gradient`` overwrites the logits
        slope = settings.transform.slope(logits_kv, settings.temperature)
        grad_kv = gradient(logits_kv, rows, words)
        return grad_kv if isinstance(slope, float) and slope == 1.0 else grad_kv.mul_(slope)

    return tile


def backward_in_tiles(
    ctx: Context[Fixed],
    hidden_KH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    settings: HeadSettings,
    tile: Tile,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of hidden states [K, H], weight [V, H] (None if ``ctx`` says that it is not needed) and bias [V]."""
    wide = wide_dtype(hidden_KH)
    grad_hidden_KH = torch.zeros_like(hidden_KH, dtype=wide)
    grad_weight_VH = torch.empty_like(weight_VH) if ctx.needs_input_grad[1] else None
    grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V)
    step = settings.tokens(TILE_ROWS_V)
    # vocabulary outside, tokens inside: one slice of the weight gradient is summed at a time
    for first in range(0, weight_VH.shape[0], TILE_ROWS_V):
        words = slice(first, first + TILE_ROWS_V)
        weight_vH = weight_VH[words]
        sum_vH: Tensor | float = 0.0
        for start in range(0, hidden_KH.shape[0], step):
            rows = slice(start, start + step)
            grad_kv = tile(rows, words)
            if grad_bias_V is not None:
                grad_bias_V[words] += grad_kv.sum(0)
            # matrix products run in the dtype of the weight
            narrow_kv = grad_kv.to(hidden_KH.dtype)
            grad_hidden_KH[rows] += narrow_kv @ weight_vH
            if grad_weight_VH is not None:
                part_vH = narrow_kv.T @ hidden_KH[rows]
                # most often there is only one part, and a float32 sum would gain nothing
                sum_vH = full_precision(sum_vH).add_(part_vH) if isinstance(sum_vH, Tensor) else part_vH
        if grad_weight_VH is not None:
            grad_weight_VH[words] = sum_vH
    return grad_hidden_KH.to(hidden_KH.dtype), grad_weight_VH, grad_bias_V


def _with_entropy(logp_kv: Tensor, up_k: Tensor, up_entropy_k: Tensor, entropy_k: Tensor) -> Tensor:
    """The gradient with respect to the logits, without the target's own term. Overwrites ``logp_kv``.

    With p = softmax(l) and S its entropy: d logprob / d l = onehot - p and d S / d l = -p (log p + S).
    """
    probs_kv = logp_kv.exp()
    inner_kv = logp_kv.add_(entropy_k[:, None]).mul_(-up_entropy_k[:, None]).sub_(up_k[:, None])
    return inner_kv.mul_(probs_kv)


def add_at_targets(grad_kv: Tensor, targets_k: Tensor, up_k: Tensor) -> None:
    """Add each token's upstream gradient at the column of its target, if the target is in this slice of the vocabulary."""
    inside_k = (targets_k >= 0) & (targets_k < grad_kv.shape[1])
    columns_k = torch.where(inside_k, targets_k, 0)
    grad_kv.scatter_add_(1, columns_k[:, None], torch.where(inside_k, up_k, 0.0)[:, None])


def top_tokens(hidden_KH: Tensor, head: Head) -> Tensor:
    """The likeliest token of each distribution (int64, [K]; the first among equals), without gradients."""
    settings = HeadSettings(1.0, head.transform, entropy=False, chunk_bytes=chunk_bytes_on(hidden_KH.device))
    tops_K = torch.empty(hidden_KH.shape[0], dtype=torch.int64, device=hidden_KH.device)
    step = settings.tokens(head.weight_VH.shape[0])
    with torch.no_grad():
        for start in range(0, hidden_KH.shape[0], step):
            rows = slice(start, start + step)
            tops_K[rows] = settings.logits(hidden_KH[rows], head.weight_VH, head.bias_V).argmax(1)
    return tops_K


def some_logits(hidden_KH: Tensor, head: Head, tokens: tuple[int, ...]) -> Tensor:
    """The logits of a few tokens only: float32, shape [K, len(tokens)], differentiable."""
    chosen_R = moved(torch.tensor(tokens), hidden_KH.device)
    logits_KR = full_precision(hidden_KH @ head.weight_VH.index_select(0, chosen_R).T)
    if head.bias_V is not None:
        logits_KR = logits_KR + head.bias_V.index_select(0, chosen_R)
    return head.transform.differentiable(logits_KR)


@dataclass(frozen=True, slots=True, eq=False)
class TeacherLogits:
    """A frozen model's logits for the tokens in the loss, before the head is applied: its hidden states and its head (J wide).

    ``kind`` selects the divergence. No tensor here gets a gradient.
    """

    states_KJ: Tensor
    head: Head
    kind: Divergence = Divergence.FORWARD


def distill_logprobs(
    hidden_KH: Tensor,
    head: Head,
    targets_K: Tensor,
    teacher: TeacherLogits,
    *,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The student's log-probability of each target and its divergence from the teacher, both in nats, float32, shape [K].

    Both are differentiable with respect to the student. ``temperature`` divides both models' logits. ``chunk_bytes``
    bounds one tile of logits of both models together (default: by the device).
    """
    half = (chunk_bytes or chunk_bytes_on(hidden_KH.device)) // 2
    inputs = _checked(hidden_KH, head, temperature)
    assert len(head.weight_VH) == len(teacher.head.weight_VH), "teacher and student have different vocabularies"
    assert len(hidden_KH) == len(teacher.states_KJ), "teacher and student saw different tokens"
    own, others = (
        HeadSettings(temperature, transform, entropy=False, chunk_bytes=half)
        for transform in (head.transform, teacher.head.transform)
    )
    results: tuple[Tensor, Tensor] = _DistillHead.apply(*inputs, targets_K, teacher, own, others)  # type: ignore[no-untyped-call]
    return results


class _DistillHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[tuple[TeacherLogits, HeadSettings, HeadSettings]],
        hidden_KH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_K: Tensor,
        teacher: TeacherLogits,
        own: HeadSettings,
        others: HeadSettings,
    ) -> tuple[Tensor, Tensor]:
        total = hidden_KH.shape[0]
        logprobs_K = torch.empty(total, dtype=wide_dtype(hidden_KH), device=hidden_KH.device)
        divergence_K, norm_K, teacher_norm_K = (torch.empty_like(logprobs_K) for _ in range(3))
        step = own.tokens(weight_VH.shape[0])
        for start in range(0, total, step):
            rows = slice(start, start + step)
            # the student: log-softmax in place
            logits_kV = own.logits(hidden_KH[rows], weight_VH, bias_V)
            norm_K[rows] = logits_kV.logsumexp(1)
            logp_kV = logits_kV.sub_(norm_K[rows, None])
            logprobs_K[rows] = logp_kV.gather(1, targets_K[rows, None]).squeeze(1)
            # the teacher: the same tokens, in the second half of the chunk
            teacher_kV = others.logits(teacher.states_KJ[rows], teacher.head.weight_VH, teacher.head.bias_V)
            teacher_norm_K[rows] = teacher_kV.logsumexp(1)
            divergence_K[rows] = divergence(teacher_kV.sub_(teacher_norm_K[rows, None]), logp_kV, teacher.kind)
        # beside the inputs only a few numbers a token are kept: the backward recomputes the logits
        ctx.save_for_backward(hidden_KH, weight_VH, bias_V, targets_K, norm_K, teacher_norm_K, divergence_K)
        ctx.fixed = teacher, own, others
        ctx.set_materialize_grads(False)
        return logprobs_K, divergence_K

    @staticmethod
    def backward(
        ctx: Context[tuple[TeacherLogits, HeadSettings, HeadSettings]], *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden_KH, weight_VH, bias_V, targets_K, norm_K, teacher_norm_K, divergence_K = ctx.saved_tensors
        teacher, own, others = ctx.fixed
        up_K, up_divergence_K = (torch.zeros_like(norm_K) if grad is None else grad for grad in grads)

        def gradient(logits_kv: Tensor, rows: slice, words: slice) -> Tensor:
            logp_kv = logits_kv.sub_(norm_K[rows, None])
            bias_v = None if teacher.head.bias_V is None else teacher.head.bias_V[words]
            teacher_kv = others.logits(teacher.states_KJ[rows], teacher.head.weight_VH[words], bias_v)
            teacher_kv.sub_(teacher_norm_K[rows, None])
            # d divergence / d logits, then d log-prob / d logits = onehot - p
            grad_kv = divergence_gradient(teacher_kv, logp_kv, divergence_K[rows], teacher.kind)
            grad_kv.mul_(up_divergence_K[rows, None])
            grad_kv.sub_(logp_kv.exp_().mul_(up_K[rows, None]))
            add_at_targets(grad_kv, targets_K[rows] - words.start, up_K[rows])
            return grad_kv

        tile = through_logits(hidden_KH, weight_VH, bias_V, own, gradient)
        return *backward_in_tiles(ctx, hidden_KH, weight_VH, bias_V, own, tile), None, None, None, None
