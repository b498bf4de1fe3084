"""What to read for the supervised and preference commands, and why a row is not used. Reading itself is in ``records``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from togi.config.choices import Overlong
from togi.data.items import DEFAULT_SPLIT


class Drop(StrEnum):
    """Why a row is not used."""

    EMPTY_PROMPT = "empty prompt"
    EMPTY_ANSWER = "empty answer"
    TIE = "tie"
    NO_STEPS = "no steps"
    TOO_LONG = "too long"
    CUT_AWAY = "nothing to learn left when cut"
    CUT_EQUAL = "equal when cut"


# Rows dropped for these reasons are faults of the data; the others depend on --max_len.
FAULTS = frozenset({Drop.EMPTY_PROMPT, Drop.EMPTY_ANSWER, Drop.TIE, Drop.NO_STEPS})


@dataclass(frozen=True, slots=True)
class RecordSpec:
    """Which rows to load and how to make sequences of them. Fields are named as their flags.

    ``max_len`` is in tokens, prompt and answer together. Each command reads the keys that it knows.
    """

    dataset: str
    dataset_probs: str | None = None
    split: str = DEFAULT_SPLIT
    max_samples: int = 100_000_000
    max_len: int = 2048
    input_key: str = "input"
    output_key: str | None = None
    prompt_key: str | None = None
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    label_key: str = "label"
    input_template: str | None = None
    apply_chat_template: bool = False
    multiturn: bool = False
    pretrain_mode: bool = False
    overlong: Overlong = Overlong.DROP
    placeholder_token: str = ""
    reward_tokens: tuple[str, ...] | None = None
    seed: int = 42

    @property
    def template(self) -> str | None:
        """The format string around prompts; a chat template takes its place."""
        return None if self.apply_chat_template else self.input_template
