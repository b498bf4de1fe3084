"""Process reward models: a label at each placeholder token. The loss is in ``prm_objective``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from togi.config.fields import Count, FromZero, PathText, flag
from togi.errors import ConfigError
from togi.methods.method import Good, Measure, Method
from togi.obs import names

if TYPE_CHECKING:
    from togi.data.chat import Tokenizer
    from togi.data.precheck import RecordSpec
    from togi.data.records import Examples
    from togi.learn.objective import Objective
    from togi.methods.training import Material


class PRM(Method):
    """Process reward model: a label at each placeholder token."""

    command = "prm"
    summary = "process reward model"
    title = "training as a process reward model"
    measures = (Measure(names.ACCURACY, Good.HIGH),)
    number = "nats a step"

    input_key: str = flag("input", "Field with the text, which has the placeholder after every step.")
    label_key: str = flag("label", "Field with one label a placeholder: tokens, or probabilities of the positive one.")
    placeholder_token: str = flag("", "The step marker: exactly one token. Required.")
    reward_tokens: tuple[str, ...] | None = flag(
        None, "Label tokens, one token each; soft labels need two, the positive one first. Default: the vocabulary."
    )
    learning_rate: FromZero = flag(1e-6, "Peak learning rate.")
    max_samples: Count = flag(1_000_000, "Use at most this many rows of the mixture.")
    ckpt_path: PathText = flag("./ckpt/checkpoints_prm", "Folder of resumable checkpoints.")
    wandb_project: str = flag("togi_prm", "Weights & Biases project.")

    def problems(self, *, template_given: bool) -> Iterator[str]:
        if not self.placeholder_token:
            yield "--placeholder_token is required: the token that stands after every step in --input_key."
        if self.reward_tokens is not None and len(set(self.reward_tokens)) < 2:
            yield f"--reward_tokens {' '.join(self.reward_tokens)} must be two different tokens or more, or left out."
        if self.reward_tokens is not None and self.placeholder_token in self.reward_tokens:
            yield "--placeholder_token is one of --reward_tokens: a step marker cannot be a label, change one of them."

    @property
    def row_fields(self) -> Mapping[str, str | None]:
        return {"input_key": self.input_key, "label_key": self.label_key}

    def load(self, spec: RecordSpec, tokenizer: Tokenizer) -> Examples:
        from togi.data.records import load_steps

        return load_steps(spec, tokenizer)

    def check_rows(self, train: Examples, held_out: Sequence[Examples], steps: Iterable[Sequence[int]]) -> None:
        """The form of the labels comes from the data and must be the same in both sets. Raises ConfigError."""
        if len({examples.labels is not None and examples.labels.soft for examples in (train, *held_out)}) > 1:
            raise ConfigError(
                "--dataset and --eval_dataset have labels of two kinds, tokens in one and probabilities in the other: "
                "use one kind."
            )

    def objective(self, material: Material) -> Objective:
        from togi.methods.prm_objective import StepRewardObjective

        labels = material.rows.labels
        assert labels is not None, "rows without labels"
        return StepRewardObjective(labels.reward_ids, labels.soft)
