"""Distillation: cross-entropy on the data mixed with the divergence from a frozen teacher on the same tokens.

Teacher and student run on the same batch, and both terms are about the same tokens: the distribution from which a token
in the loss is predicted. The divergence is computed in chunks inside the student's forward (``togi.model.distill_head``).
Not here: rows that the student generates itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from togi.batch import Batch
from togi.config.choices import Divergence
from togi.errors import ConfigError
from togi.learn.objective import Loss, Objective, token_metrics
from togi.model.outputs import Needs, Outputs
from togi.model.policy import PolicyModel
from togi.obs import names


@dataclass(frozen=True, slots=True)
class DistillationObjective(Objective):
    """``(1 - kd_coef) CE + kd_coef D``, means over the tokens in the loss of the step, in nats.

    ``teacher`` is frozen, on the batch's device, and whole on every rank (not sharded). ``vocabulary``: the student's
    ``PolicyModel.vocabulary``, which must be the teacher's. ``around`` each pass of the teacher is a context to run it in,
    such as one with its weights on the device. ``kind``: which KL is D; forward (KL(teacher || student))
    differs from the cross-entropy with the teacher's distribution by a constant only. Metrics: loss, both its parts.
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
        if not 0 <= self.kd_coef <= 1:
            raise ConfigError(f"--kd_coef is {self.kd_coef}: it is a share, from 0 to 1")

    @property
    def needs(self) -> Needs:
        return Needs(logprobs=True)

    def count(self, batch: Batch) -> float:
        return float(batch.targets_K.numel())

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        with torch.no_grad(), self.around():
            states_KJ = self.teacher(batch, Needs(states=True)).states_KH
            logits = self.teacher.logits_of(states_KJ, self.kind)
        outputs: Outputs = model(batch, self.needs, teacher=logits)
        return outputs

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        entropy, divergence = -outputs.logprobs_K.sum(), outputs.divergence_K.sum()
        total = (1 - self.kd_coef) * entropy + self.kd_coef * divergence
        sums = {names.LOSS: total, names.CROSS_ENTROPY: entropy, names.KL_TEACHER: divergence}
        return Loss(total, token_metrics(sums, outputs.logprobs_K.numel(), {}))
