"""The interface of a method of training on fixed data. Code outside this package uses it and never checks the type.

A method is its settings and what follows from them: the rules between them, the rows that it reads, the models that it needs, its
loss, the metrics of an evaluation. So a ``Method`` is the settings class of its command. The loss needs torch and has its own file
beside the method (``kto_objective`` beside ``kto``), which is imported when a run needs the objective: settings, help and their
errors work without it.

The row settings that several methods share, with their rules: a prompt and a response, plain text, pairs.

The settings of methods that compare the model in training with a frozen reference.

Rows that the model in training answers itself: the settings of the generation, and the mark of such rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from togi.config.choices import EngineName, Overlong
from togi.config.fields import Count, CountOrAuto, FromZero, Int, PathText, Positive, Settings, Share, flag, unread
from togi.config.shared import (
    MAX_BAD_ROWS,
    PLAIN_TEMPLATE,
    ModelSettings,
    OutputSettings,
    PromptText,
    TrainSettings,
    VLLMSettings,
    lora_dropout_problems,
)
from togi.obs import names

if TYPE_CHECKING:
    from togi.data.chat import Tokenizer
    from togi.data.precheck import RecordSpec
    from togi.data.records import Examples
    from togi.learn.objective import Objective
    from togi.learn.scorer import Scorer
    from togi.methods.training import Dealer, Material, Preparation
    from togi.sample import Sample


class Good(StrEnum):
    """Which values of a metric are good."""

    LOW = "low"
    HIGH = "high"
    EITHER = "either"


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric of an evaluation, by its name in the logs without ``eval/``.

    ``explanation``: one sentence for the report, for a metric of this method only; others are explained in ``togi.obs.names``.
    """

    name: str
    good: Good = Good.EITHER
    explanation: str = ""


REWARD_MEASURES = (
    Measure(names.ACCURACY, Good.HIGH),
    Measure(names.REWARD_CHOSEN, Good.HIGH),
    Measure(names.REWARD_REJECTED),
    Measure(names.REWARD_MARGIN, Good.HIGH),
)
"""The metrics of methods that compare responses by a reward, explicit or implicit."""


class DatasetSettings(Settings):
    """Data"""

    dataset: PathText = flag("", "Training sets, comma-separated: files, folders or hub names, or name@dir. Required.")
    dataset_probs: str | None = flag(None, "Comma-separated sampling probabilities, one per set; default: concatenate.")
    dataset_split: str = flag("train", "Split of the training sets.")
    max_samples: Count = flag(100_000_000, "Use at most this many rows of the mixture.")
    max_len: Count = flag(2048, "At most this many tokens per sequence, prompt and response together.")
    overlong: Overlong = flag(Overlong.DROP, "Longer rows are left out and counted, cut (no end token), or an error.")
    max_bad_rows: float = MAX_BAD_ROWS
    dataset_num_proc: CountOrAuto = flag("auto", "Processes that tokenise; auto: one per core for large sets, or one.")


class EvaluationSettings(Settings):
    """Evaluation"""

    eval_dataset: PathText | None = flag(None, "Held-out sets, with the same fields as --dataset.")
    eval_split: str = flag("test", "Split of the held-out sets.")
    eval_steps: Int = flag(-1, "Evaluate every N optimizer steps; in any case at the end of each epoch.")
    eval_at_start: bool = flag(False, "Also evaluate before the first update.")


class LaunchSettings(Settings):
    """Launch"""

    local_rank: Int = flag(-1, "Set by launchers that start one process per device; wins over LOCAL_RANK.")


class Method(LaunchSettings, ModelSettings, DatasetSettings, TrainSettings, EvaluationSettings, OutputSettings, ABC):
    """Training on fixed data"""

    command: ClassVar[str]
    """The name on the command line."""
    summary: ClassVar[str]
    """The line in ``togi --help``."""
    title: ClassVar[str]
    """The training in words, for a model card."""
    measures: ClassVar[tuple[Measure, ...]]
    """The metrics of an evaluation besides its loss."""
    number: ClassVar[str]
    """What ``Objective.judge`` returns for a held-out sequence, in words."""
    width: ClassVar[int] = 1
    """Sequences per row."""
    is_scalar: ClassVar[bool] = False
    """Whether the model in training has a scalar head instead of a language model head."""
    looks_at_all_rows: ClassVar[bool] = False
    """Whether the loss of a row depends on the other rows of its step, so that an evaluation takes all rows at once."""

    learning_rate: FromZero = flag(5e-6, "Peak learning rate.")

    # ---- settings

    @property
    def split(self) -> str:
        """The split of the training sets."""
        return self.dataset_split

    def problems(self, *, template_given: bool) -> Iterator[str]:
        """Contradictions between the method's own settings: sentences that name both flags and the remedy.

        ``template_given``: the user wrote ``--input_template``. A chat template replaces its default, but contradicts a given one.
        """
        yield from ()

    # ---- rows

    @property
    @abstractmethod
    def row_fields(self) -> Mapping[str, str | None]:
        """The field that each flag names and that every row must have; None for a flag that names none."""

    @abstractmethod
    def load(self, spec: RecordSpec, tokenizer: Tokenizer) -> Examples:
        """The rows of a data set as samples. Raises DataError."""

    def check_rows(self, train: Examples, held_out: Sequence[Examples], steps: Iterable[Sequence[int]]) -> None:
        """Check what depends on the rows. ``steps``: the rows of each optimizer step. Raises ConfigError."""

    @property
    def prompt_text(self) -> PromptText | None:
        """The settings that format prompts; None if there are no prompts."""
        return None

    @property
    def learns_every_token(self) -> bool:
        """Whether rows are plain text (``--pretrain_mode``)."""
        return False

    # ---- models

    @property
    def head(self) -> str:
        """The name of the scalar head, for a method with one (``is_scalar``)."""
        raise AssertionError(f"togi {self.command} trains a language model")

    @property
    def reference(self) -> str:
        """The frozen reference model, a folder or hub name; "" for none."""
        return ""

    @property
    def scores_ahead(self) -> bool:
        """Whether the reference scores all rows before training, and is not in memory during it."""
        return False

    @property
    def teacher(self) -> str:
        """The frozen model whose distributions the objective reads, a folder or hub name; "" for none."""
        return ""

    @property
    def more_models(self) -> Mapping[str, str]:
        """Each model folder besides ``--pretrain``, by its flag."""
        return {}

    @property
    def offload_flag(self) -> str:
        """The flag that moves frozen weights to host memory; "" if none is set."""
        return ""

    @property
    def on_policy(self) -> OnPolicySettings | None:
        """The settings of responses by the model in training; None if all responses are from the data."""
        return None

    # ---- training

    @abstractmethod
    def objective(self, material: Material) -> Objective:
        """The loss. Raises ConfigError for faults that only the models show."""

    def preparation(self, dealer: Dealer, policy: Scorer, reference: Scorer) -> Preparation:
        """What adds the reference's logprobs to the rows of a step; used only if there is a ``reference``."""
        from togi.methods.training import WithReference

        return WithReference(dealer, reference)

    # ---- evaluation

    def badness(self, sequences: Sequence[tuple[Sample, float]]) -> float:
        """How badly a held-out row did, from the ``number`` of each of its sequences: the higher, the worse."""
        (number,) = (value for _, value in sequences)
        return number


class PromptAndResponse(Method):
    """Rows"""

    input_key: str = flag("input", "Field with the prompt: a string or a list of chat messages.")
    output_key: str | None = flag(None, "Field with the response; default: the last message in --input_key.")
    apply_chat_template: bool = flag(False, "Render rows with the tokenizer's chat template.")
    input_template: str | None = flag(PLAIN_TEMPLATE, "Format string with one {} around the prompt, in plain text.")

    @property
    def prompt_text(self) -> PromptText | None:
        return self

    @property
    def row_fields(self) -> Mapping[str, str | None]:
        return {"input_key": self.input_key, "output_key": self.output_key}

    def load(self, spec: RecordSpec, tokenizer: Tokenizer) -> Examples:
        from togi.data.records import load_sft

        return load_sft(spec, tokenizer)


class PlainTextOrResponse(PromptAndResponse):
    """Continued pre-training"""

    pretrain_mode: bool = flag(False, "Plain text in --input_key: no template, no end token, every token in the loss.")

    @property
    def prompt_text(self) -> PromptText | None:
        return None if self.pretrain_mode else self

    @property
    def learns_every_token(self) -> bool:
        return self.pretrain_mode

    def problems(self, *, template_given: bool) -> Iterator[str]:
        """Plain text has no prompt to format; a response needs a field, or is in the chat."""
        yield from super().problems(template_given=template_given)
        if self.pretrain_mode and self.apply_chat_template:
            yield "--pretrain_mode trains on plain text but --apply_chat_template is set: leave one of them out."
        if self.pretrain_mode and template_given and self.input_template is not None:
            yield "--pretrain_mode trains on plain text but --input_template is set: leave one of them out."
        if not self.pretrain_mode and not self.apply_chat_template and self.output_key is None:
            yield "--output_key (the field with the response) is required without --apply_chat_template or --pretrain_mode."


class Pairs(Method):
    """Rows"""

    width: ClassVar[int] = 2
    # Whether what two whole texts share must be left out: it cancels in a difference of sums, but not in means.
    implicit_prompt: ClassVar[bool] = False

    prompt_key: str | None = flag(
        None,
        "Field with the prompt; default: it is part of both conversations (simpo, orpo: or what both texts begin with).",
    )
    chosen_key: str = flag("chosen", "Field with the preferred response or conversation.")
    rejected_key: str = flag("rejected", "Field with the rejected response or conversation.")
    apply_chat_template: bool = flag(False, "Render rows with the tokenizer's chat template.")
    input_template: str | None = flag(None, "Format string with one {} around the prompt, without a chat template.")

    def problems(self, *, template_given: bool) -> Iterator[str]:
        yield from super().problems(template_given=template_given)
        if template_given and self.prompt_key is None:
            yield "--input_template goes around the prompt but --prompt_key is not set: set it, or leave the template out."

    @property
    def prompt_text(self) -> PromptText | None:
        return self

    @property
    def row_fields(self) -> Mapping[str, str | None]:
        return {"prompt_key": self.prompt_key, "chosen_key": self.chosen_key, "rejected_key": self.rejected_key}

    def load(self, spec: RecordSpec, tokenizer: Tokenizer) -> Examples:
        from togi.data.records import load_pairs

        return load_pairs(replace(spec, implicit_prompt=self.implicit_prompt), tokenizer)

    def badness(self, sequences: Sequence[tuple[Sample, float]]) -> float:
        """How far the reward of the rejected response is above the chosen one."""
        (_, chosen), (_, rejected) = sequences
        return rejected - chosen


class HeldToReference(Method):
    """Reference model"""

    ref_pretrain: PathText | None = flag(None, "Reference model; default: --pretrain.")
    ref_offload: bool = flag(False, "Keep the frozen reference in host memory, on the device only while it scores.")
    precompute_ref: bool = flag(False, "Score all rows with the reference before training, then free it (dpo only).")

    def problems(self, *, template_given: bool) -> Iterator[str]:
        """Noise in logprobs that are compared."""
        yield from super().problems(template_given=template_given)
        yield from lora_dropout_problems(self)

    @property
    def reference(self) -> str:
        return self.ref_pretrain or self.pretrain

    @property
    def more_models(self) -> Mapping[str, str]:
        return {} if self.ref_pretrain is None else {"ref_pretrain": self.ref_pretrain}

    @property
    def offload_flag(self) -> str:
        return "--ref_offload" if self.ref_offload else ""


GENERATED = "generated"
"""The value of a sample for whether the model in training wrote its response (1 or 0)."""


class OnPolicySettings(VLLMSettings):
    """On-policy distillation"""

    on_policy_share: Share = flag(0.0, "Share of the rows that the student answers; there only divergence is learned.")
    generate_max_len: Count = flag(1024, "At most this many new tokens per response, within --max_len.")
    temperature: Positive = flag(1.0, "Sampling temperature; the divergence is always that of the plain models.")
    rollout_engine: EngineName = flag(EngineName.VLLM, "What generates: vLLM, or Transformers (no extra install).")
    vllm_gpu_memory_utilization: float = flag(0.3, "Share of a GPU's memory for vLLM, beside the models.", gt=0, le=1)

    def generation_problems(self) -> Iterator[str]:
        """Generation flags without ``--on_policy_share``, and what the engines exclude."""
        yield from unread(self, {"on_policy_share": OnPolicySettings.model_fields})
        yield from self.engine_problems(self.rollout_engine, "rollout_engine", "vllm_gpu_memory_utilization")
