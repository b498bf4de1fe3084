"""What is asked of a method of training on fixed data. Everything outside this package asks it, and never its type.

A method is its settings and what follows from them: the rules between them, the rows it reads, what it needs of models, its
loss, what an evaluation measures. So a ``Method`` is the settings class of its command, and a run's settings answer for
themselves. The loss needs torch and stands in a file of its own beside the method (``kto_objective`` beside ``kto``), which is
imported when a run asks for the objective: settings, help and their errors work without it.
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

    ``explanation``: one sentence for the report, of a metric that only this method has; the others are in ``togi.obs.names``.
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
"""Of methods that tell better responses from worse ones by a reward, explicit or implicit."""


class Method(LaunchSettings, ModelSettings, DatasetSettings, TrainSettings, EvaluationSettings, OutputSettings, ABC):
    """Training on fixed data"""

    command: ClassVar[str]
    """Its name on the command line."""
    summary: ClassVar[str]
    """The line of ``togi --help``."""
    title: ClassVar[str]
    """What a model went through, in a model card."""
    measures: ClassVar[tuple[Measure, ...]]
    """The metrics of an evaluation beside its loss."""
    number: ClassVar[str]
    """What ``Objective.judge`` says of a held-out sequence, for people."""
    width: ClassVar[int] = 1
    """Sequences a row."""
    is_scalar: ClassVar[bool] = False
    """Whether the model in training has a scalar head in place of a language model's."""
    looks_at_all_rows: ClassVar[bool] = False
    """Whether the loss of a row depends on the others of its step, so that an evaluation takes all rows at once."""

    learning_rate: float = flag(5e-6, "Peak learning rate.", ge=0)

    # ---- settings

    @property
    def split(self) -> str:
        """The split of the training sets."""
        return self.dataset_split

    def problems(self, *, template_given: bool) -> Iterator[str]:
        """The contradictions between its own settings: sentences that name both flags and the way out.

        ``template_given``: the user wrote ``--input_template``. Its default gives way to a chat template, a wish does not.
        """
        yield from ()

    # ---- rows

    @property
    @abstractmethod
    def row_fields(self) -> Mapping[str, str | None]:
        """The field that each flag names, of those every row must have; None for a flag that names none."""

    @abstractmethod
    def load(self, spec: RecordSpec, tokenizer: Tokenizer) -> Examples:
        """The rows of a set as samples. Raises DataError."""

    def check_rows(self, train: Examples, held_out: Sequence[Examples], steps: Iterable[Sequence[int]]) -> None:
        """What only the rows can tell. ``steps``: the rows of each optimizer step. Raises ConfigError."""

    @property
    def prompt_text(self) -> PromptText | None:
        """The settings that make text of prompts; None where there are no prompts."""
        return None

    @property
    def learns_every_token(self) -> bool:
        """Whether rows are plain text (``--pretrain_mode``)."""
        return False

    # ---- models

    @property
    def head(self) -> str:
        """The name of the scalar head, of a method that has one (``is_scalar``)."""
        raise AssertionError(f"togi {self.command} trains a language model")

    @property
    def reference(self) -> str:
        """The frozen model that scores the rows beside the one in training, a folder or hub name; "" for none."""
        return ""

    @property
    def scores_ahead(self) -> bool:
        """Whether the reference scores all rows before the training, and is not in memory during it."""
        return False

    @property
    def teacher(self) -> str:
        """The frozen model whose distributions the objective reads, a folder or hub name; "" for none."""
        return ""

    @property
    def more_models(self) -> Mapping[str, str]:
        """By its flag each model folder that is named beside ``--pretrain``."""
        return {}

    @property
    def offload_flag(self) -> str:
        """The flag that asks for frozen weights in host memory, "" if none is set."""
        return ""

    @property
    def on_policy(self) -> OnPolicySettings | None:
        """How the model in training answers some of the prompts itself; None where all responses are the data's."""
        return None

    # ---- training

    @abstractmethod
    def objective(self, material: Material) -> Objective:
        """The loss. Raises ConfigError for what only the models can tell."""

    def preparation(self, dealer: Dealer, policy: Scorer, reference: Scorer) -> Preparation:
        """What adds the reference's log-probs to the rows of a step; asked only where there is a ``reference``."""
        from togi.methods.training import WithReference

        return WithReference(dealer, reference)

    # ---- evaluation

    def badness(self, sequences: Sequence[tuple[Sample, float]]) -> float:
        """How bad a held-out row did, from the ``number`` of each of its sequences: the higher, the worse."""
        (number,) = (value for _, value in sequences)
        return number
