"""The interface of a method of training on fixed data. Code outside this package uses it and never checks the type.

A method is its settings and what follows from them: the rules between them, the rows that it reads, the models that it needs, its
loss, the metrics of an evaluation. So a ``Method`` is the settings class of its command. The loss needs torch and has its own file
beside the method (``kto_objective`` beside ``kto``), which is imported when a run needs the objective: settings, help and their
errors work without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from togi.config.fields import flag
from togi.config.offline import DatasetSettings, EvaluationSettings, LaunchSettings
from togi.config.shared import ModelSettings, OutputSettings, PromptText, TrainSettings
from togi.methods.on_policy import OnPolicySettings
from togi.obs import names

if TYPE_CHECKING:
    from togi.data.chat import Tokenizer
    from togi.data.record_spec import RecordSpec
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

    learning_rate: float = flag(5e-6, "Peak learning rate.", ge=0)

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
