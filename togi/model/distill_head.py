"""The fused head with a teacher: log-probs of the tokens and the divergence from the teacher, both in chunks.

Shape letters as in ``logprob_head``; J is the teacher's hidden size. Only one block of tokens has its student and teacher logits
in memory at a time. The backward recomputes both tile by tile. The formulas are in ``togi.algo.kl``. Not here: running the
teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from togi.algo.kl import divergence, divergence_gradient
from togi.algo.precision import wide_dtype
from togi.config.choices import Divergence
from togi.model.logprob_head import (
    CHUNK_BYTES,
    HeadSettings,
    LogitTransform,
    add_at_targets,
    backward_in_tiles,
    through_logits,
)


@dataclass(frozen=True, slots=True, eq=False)
class TeacherLogits:
    """A frozen model's logits for the tokens in the loss, before the head is applied: its hidden states and its head.

    ``kind`` selects the divergence. No tensor here gets a gradient.
    """

    states_KJ: Tensor
    weight_VJ: Tensor
    bias_V: Tensor | None
    transform: LogitTransform
    kind: Divergence = Divergence.FORWARD


def distill_logprobs(
    hidden_KH: Tensor,
    weight_VH: Tensor,
    targets_K: Tensor,
    teacher: TeacherLogits,
    *,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    transform: LogitTransform | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """The student's log-probability of each target and its divergence from the teacher, both in nats, float32, shape [K].

    Both are differentiable with respect to the student. ``temperature`` divides both models' logits. ``chunk_bytes``
    bounds one tile of logits of both models together.
    """
    assert temperature > 0, "temperature must be positive"
    assert hidden_KH.dtype == weight_VH.dtype, f"hidden is {hidden_KH.dtype}, the head's weight is {weight_VH.dtype}"
    assert weight_VH.shape[0] == teacher.weight_VJ.shape[0], "teacher and student have different vocabularies"
    assert hidden_KH.shape[0] == teacher.states_KJ.shape[0], "teacher and student saw different tokens"
    own = HeadSettings(temperature, transform or LogitTransform(), entropy=False, chunk_bytes=chunk_bytes // 2)
    others = HeadSettings(temperature, teacher.transform, entropy=False, chunk_bytes=chunk_bytes // 2)
    results: tuple[Tensor, Tensor] = _DistillHead.apply(  # type: ignore[no-untyped-call]
        hidden_KH, weight_VH, bias_V, targets_K, teacher, own, others
    )
    return results


class _DistillHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
            teacher_kV = others.logits(teacher.states_KJ[rows], teacher.weight_VJ, teacher.bias_V)
            teacher_norm_K[rows] = teacher_kV.logsumexp(1)
            divergence_K[rows] = divergence(teacher_kV.sub_(teacher_norm_K[rows, None]), logp_kV, teacher.kind)
        # beside the inputs only a few numbers a token are kept: the backward recomputes the logits
        ctx.save_for_backward(hidden_KH, weight_VH, bias_V, targets_K, norm_K, teacher_norm_K, divergence_K)
        ctx.extra = teacher, own, others
        ctx.set_materialize_grads(False)
        return logprobs_K, divergence_K

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_KH, weight_VH, bias_V, targets_K, norm_K, teacher_norm_K, divergence_K = ctx.saved_tensors
        teacher: TeacherLogits
        own: HeadSettings
        others: HeadSettings
        teacher, own, others = ctx.extra
        up_K, up_divergence_K = (torch.zeros_like(norm_K) if grad is None else grad for grad in grads)

        def gradient(logits_kv: Tensor, rows: slice, words: slice) -> Tensor:
            logp_kv = logits_kv.sub_(norm_K[rows, None])
            bias_v = None if teacher.bias_V is None else teacher.bias_V[words]
            teacher_kv = others.logits(teacher.states_KJ[rows], teacher.weight_VJ[words], bias_v)
            teacher_kv.sub_(teacher_norm_K[rows, None])
            # d divergence / d logits, then d log-prob / d logits = onehot - p
            grad_kv = divergence_gradient(teacher_kv, logp_kv, divergence_K[rows], teacher.kind)
            grad_kv.mul_(up_divergence_K[rows, None])
            grad_kv.sub_(logp_kv.exp_().mul_(up_K[rows, None]))
            add_at_targets(grad_kv, targets_K[rows] - words.start, up_K[rows])
            return grad_kv

        tile = through_logits(hidden_KH, weight_VH, bias_V, own, gradient)
        return *backward_in_tiles(ctx, hidden_KH, weight_VH, bias_V, own, tile), None, None, None, None
