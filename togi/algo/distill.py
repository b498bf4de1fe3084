"""The distance between a teacher's and a student's distribution over the vocabulary, and its gradient.

Both functions see log-probabilities of one block of tokens. Not here: how the blocks come about without logits of all
tokens (``togi.model.distill_head``).
Shape letters: k tokens of a block, V the whole vocabulary, v a slice of it.
"""

from __future__ import annotations

from torch import Tensor

from togi.config.choices import Divergence


def divergence(teacher_logp_kV: Tensor, student_logp_kV: Tensor, kind: Divergence) -> Tensor:
    """KL between the two, in nats, shape k.

    forward: ``sum_v pT (log pT - log pS)`` (Hinton, Vinyals & Dean 2015, arXiv 1503.02531, whose cross-entropy is
    this plus the teacher's entropy, a constant). reverse: ``sum_v pS (log pS - log pT)`` (MiniLLM: Gu et al. 2023,
    arXiv 2306.08543).
    """
    if kind is Divergence.FORWARD:
        return (teacher_logp_kV.exp() * (teacher_logp_kV - student_logp_kV)).sum(1)
    return (student_logp_kV.exp() * (student_logp_kV - teacher_logp_kV)).sum(1)


def divergence_gradient(
    teacher_logp_kv: Tensor, student_logp_kv: Tensor, divergence_k: Tensor, kind: Divergence
) -> Tensor:
    """d divergence / d student's logits, for any slice of the vocabulary. Shape k, v.

    forward: ``pS - pT``. reverse: ``pS (log pS - log pT - D)``, with D the divergence over the whole vocabulary.
    """
    if kind is Divergence.FORWARD:
        return student_logp_kv.exp() - teacher_logp_kv.exp()
    return student_logp_kv.exp() * (student_logp_kv - teacher_logp_kv - divergence_k[:, None])
