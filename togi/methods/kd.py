"""Distillation from a frozen teacher, on the data's responses or on the student's own. The loss is in ``kd_objective``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from togi.config.choices import Divergence
from togi.config.fields import Count, PathText, Share, flag
from togi.errors import ConfigError
from togi.methods.method import Good, Measure, OnPolicySettings, PlainTextOrResponse
from togi.obs import names

if TYPE_CHECKING:
    from togi.data.records import Examples
    from togi.learn.objective import Objective
    from togi.methods.training import Material


class KD(PlainTextOrResponse, OnPolicySettings):
    """Knowledge distillation from a frozen teacher."""

    command = "kd"
    summary = "distillation from a teacher"
    title = "distillation"
    measures = (Measure(names.CROSS_ENTROPY, Good.LOW), Measure(names.KL_TEACHER, Good.LOW))
    number = "loss a token"

    output_key: str | None = flag("output", "Field with the response; as --input_key: its last message.")
    teacher_model: PathText = flag("", "Teacher: a Hugging Face folder or hub name. Required.")
    kd_coef: Share = flag(0.4, "Share of the distillation loss; the rest is cross-entropy on the data.")
    kd_divergence: Divergence = flag(
        Divergence.FORWARD,
        "forward: the student covers all the teacher may say; reverse: it says only what the teacher may.",
    )
    teacher_offload: bool = flag(False, "Keep the teacher in host memory, on the device only for its pass.")
    max_samples: Count = flag(1_000_000, "Use at most this many rows of the mixture.")
    ckpt_path: PathText = flag("./ckpt/checkpoints_kd", "Folder of resumable checkpoints.")
    wandb_project: str = flag("togi_kd", "Weights & Biases project.")

    def problems(self, *, template_given: bool) -> Iterator[str]:
        if not self.teacher_model:
            yield "--teacher_model is required: the Hugging Face folder or hub name of the model to learn from."
        yield from super().problems(template_given=template_given)
        if self.on_policy_share > 0 and self.pretrain_mode:
            yield "--pretrain_mode has no prompts, but --on_policy_share lets the student answer them: leave one of them out."
        yield from self.generation_problems()

    @property
    def row_fields(self) -> Mapping[str, str | None]:
        fields = super().row_fields
        return {**fields, "output_key": None} if self.pretrain_mode else fields

    def check_rows(self, train: Examples, held_out: Sequence[Examples], steps: Iterable[Sequence[int]]) -> None:
        """A response can only be generated for a prompt. Raises ConfigError."""
        if self.on_policy_share > 0 and 0 in train.prompt_lengths():
            raise ConfigError(
                "--on_policy_share lets the student answer prompts, but there are rows in --dataset without any: fill "
                "--input_key or set --input_template."
            )

    @property
    def teacher(self) -> str:
        return self.teacher_model

    @property
    def more_models(self) -> Mapping[str, str]:
        return {"teacher_model": self.teacher_model}

    @property
    def offload_flag(self) -> str:
        return "--teacher_offload" if self.teacher_offload else ""

    @property
    def on_policy(self) -> OnPolicySettings | None:
        return self if self.on_policy_share > 0 else None

    def objective(self, material: Material) -> Objective:
        from togi.methods.kd_objective import DistillationObjective

        (teacher,) = material.teachers
        models = teacher.model, material.vocabulary
        return DistillationObjective(*models, self.kd_coef, self.kd_divergence, around=teacher.around)
