"""Reward models from preference pairs. The loss is in ``preference``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from togi.config.choices import RewardLoss
from togi.config.fields import Count, FromZero, PathText, flag
from togi.config.shared import head_problems
from togi.methods.method import REWARD_MEASURES, Pairs

if TYPE_CHECKING:
    from togi.learn.objective import Objective
    from togi.methods.training import Material


class RM(Pairs):
    """Reward model from preference pairs."""

    command = "rm"
    summary = "reward model from preference pairs"
    title = "training as a reward model"
    measures = REWARD_MEASURES
    number = "score"
    is_scalar = True

    loss: RewardLoss = flag(RewardLoss.SIGMOID, "Pairwise loss; log-exp is the same function without a margin.")
    margin_loss: bool = flag(False, "Subtract the field margin, which every row must have, inside the sigmoid loss.")
    compute_fp32_loss: bool = flag(False, "Compute the loss from float32 scores. Always so here, with or without.")
    value_head_prefix: str = flag("score", "Name of the scalar head; score loads in plain Transformers.")
    learning_rate: FromZero = flag(9e-6, "Peak learning rate.")
    max_len: Count = flag(512, "At most this many tokens per sequence, prompt and response together.")
    ckpt_path: PathText = flag("./ckpt/checkpoints_rm", "Folder of resumable checkpoints.")
    wandb_project: str = flag("togi_rm", "Weights & Biases project.")

    def problems(self, *, template_given: bool) -> Iterator[str]:
        yield from super().problems(template_given=template_given)
        if self.margin_loss and self.loss is not RewardLoss.SIGMOID:
            yield f"--margin_loss has no meaning with --loss {self.loss}: use --loss sigmoid or leave the first out."
        yield from head_problems(self.value_head_prefix)

    @property
    def head(self) -> str:
        return self.value_head_prefix

    def objective(self, material: Material) -> Objective:
        from togi.methods.preference import PairwiseRewardObjective

        return PairwiseRewardObjective(self.loss, self.margin_loss)
