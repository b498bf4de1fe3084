"""Supervised fine-tuning on responses, and continued pre-training on plain text.

The loss is ``SFTObjective`` of ``togi.learn.objective``, which ``togi rl`` can mix in too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from togi.config.fields import Count, PathText, flag
from togi.methods.method import Good, Measure, PlainTextOrResponse
from togi.obs import names

if TYPE_CHECKING:
    from togi.learn.objective import Objective
    from togi.methods.training import Material


class SFT(PlainTextOrResponse):
    """Supervised fine-tuning."""

    command = "sft"
    summary = "supervised fine-tuning, continued pre-training"
    title = "supervised fine-tuning"
    measures = (Measure(names.PERPLEXITY, Good.LOW),)
    number = "nats a token"

    multiturn: bool = flag(False, "Learn every assistant turn of a chat list; needs --apply_chat_template.")
    train_split: str | None = flag(None, "Established name of --dataset_split.")
    max_epochs: Count = flag(2, "Passes over the data.")
    max_samples: Count = flag(1_000_000, "Use at most this many rows of the mixture.")
    ckpt_path: PathText = flag("./ckpt/checkpoints_sft", "Folder of resumable checkpoints.")
    wandb_project: str = flag("togi_sft", "Weights & Biases project.")

    @property
    def split(self) -> str:
        """The split of the training sets, given under either of its two names."""
        return self.train_split if self.train_split is not None else self.dataset_split

    def problems(self, *, template_given: bool) -> Iterator[str]:
        if self.multiturn and not self.apply_chat_template:
            yield "--multiturn needs --apply_chat_template: add it or leave the first out."
        if self.multiturn and self.output_key is not None:
            yield "--multiturn takes the whole conversation from --input_key, not --output_key: leave one of them out."
        if self.train_split is not None and self.changed("dataset_split"):
            yield "--train_split and --dataset_split name the same thing: leave one of them out."
        yield from super().problems(template_given=template_given)
        if self.pretrain_mode and self.output_key is not None:
            yield "--pretrain_mode reads --input_key only, but --output_key is set too: leave one of them out."

    def objective(self, material: Material) -> Objective:
        from togi.learn.objective import SFTObjective

        return SFTObjective()
