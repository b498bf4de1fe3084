"""Distillation: cross-entropy on the data mixed with the divergence from a frozen teacher on the same tokens.

Teacher and student run on the same batch, and both terms are over the same tokens: the distribution that predicts a token in the
loss. The divergence is computed in chunks inside the student's forward pass (``togi.model.heads``).

On responses that the student generated, only the divergence is trained: on-policy distillation, GKD (Agarwal et al. 2023, arXiv
2306.13649, section 3), with either divergence. It is the exact KL over the vocabulary at each generated position, and
the positions are taken as given: no gradient goes through the sampling. MiniLLM (Gu et al. 2023, arXiv 2306.08543)
minimises the reverse KL of whole responses. That has the same term plus a policy gradient, which credits a token for the
divergence at later tokens; their teacher-mixed sampling and length normalisation reduce its variance. That part is left
out here. Generation is elsewhere.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from togi.batch import Batch
from togi.config.choices import Divergence
from togi.errors import ConfigError
from togi.learn.objective import Loss, Objective, sequence_means, token_metrics
from togi.methods.method import GENERATED
from togi.model.policy import Needs, Outputs, PolicyModel
from togi.obs import names


@dataclass(frozen=True, slots=True)
class DistillationObjective(Objective):
    """The loss of a token is ``(1 - kd_coef) CE + kd_coef D`` on data, and ``D`` where the student wrote it, in nats.

    The total is the mean over all tokens in the loss of the step, of both kinds. The value ``generated`` (1 or 0) tells
    the rows apart; without it all rows are data.

    ``teacher``: frozen, on the batch's device, whole on every rank (not sharded). ``vocabulary``: the student's
    ``PolicyModel.vocabulary``, which must equal the teacher's. ``around``: a context for each pass of the teacher, such
    as one with its weights on the device. ``kind``: which KL is D; forward (KL(teacher || student)) differs from the
    cross-entropy with the teacher's distribution by a constant only. Metrics: loss, CE and D on data, D on generated responses.
    """

    teacher: PolicyModel
    vocabulary: int
    kd_coef: float = 0.4
    kind: Divergence = Divergence.FORWARD
    around: Callable[[], AbstractContextManager[None]] = nullcontext

    def __post_init__(self) -> None:
        if self.teacher.vocabulary != self.vocabulary:
            raise ConfigError(
                f"--teacher_model predicts {self.teacher.vocabulary} tokens and --pretrain {self.vocabulary}: "
                "distillation compares them token by token, so choose two models with one vocabulary"
            )
        assert 0 <= self.kd_coef <= 1, "--kd_coef is a share, from 0 to 1"

    @property
    def needs(self) -> Needs:
        return Needs(logprobs=True)

    def count(self, batch: Batch) -> float:
        return float(batch.targets_K.numel())

    def forward(self, model: nn.Module, batch: Batch, *, balance: bool = False) -> Outputs:
        # The teacher's states only: its logits are made chunk by chunk beside the student's.
        with torch.no_grad(), self.around():
            states_uJ = self.teacher(batch, Needs(states=True)).states_uH
            logits = self.teacher.logits_of(states_uJ, self.kind)
        outputs: Outputs = model(batch, replace(self.needs, balance=balance), teacher=logits)
        return outputs

    def judge(self, outputs: Outputs, batch: Batch) -> Tensor:
        loss_K = self.kd_coef * outputs.divergence_K - (1 - self.kd_coef) * outputs.logprobs_K
        return sequence_means(loss_K, batch)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        own_K = _generated(batch)
        entropy = -outputs.logprobs_K.masked_fill(own_K, 0.0).sum()
        divergence = outputs.divergence_K.masked_fill(own_K, 0.0).sum()
        own = outputs.divergence_K.masked_fill(~own_K, 0.0).sum()
        total = (1 - self.kd_coef) * entropy + self.kd_coef * divergence + own
        # Means per kind of token, since their shares vary from step to step. They are counted on the host.
        tokens, generated = outputs.logprobs_K.numel(), int(_generated(batch.host).sum())
        metrics = token_metrics({names.LOSS: total}, tokens, {})
        on_data = {names.CROSS_ENTROPY: entropy, names.KL_TEACHER: divergence}
        for sums, of_kind in ((on_data, tokens - generated), ({names.KL_TEACHER_GENERATED: own}, generated)):
            if of_kind > 0:  # a step may have one kind only
                metrics |= token_metrics(sums, of_kind, {})
        return Loss(total, metrics)


def _generated(batch: Batch) -> Tensor:
    """Which tokens in the loss the student wrote, shape (K), bool."""
    sequences_K = batch.target_sequences_K
    if GENERATED not in batch.values:
        return torch.zeros_like(sequences_K, dtype=torch.bool)
    return (batch.values[GENERATED] == 1)[sequences_K]
