"""What the supervised and preference commands read. The reading itself is in ``records``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from togi.config.choices import Overlong
from togi.config.fields import AUTO
from togi.data.items import DEFAULT_SPLIT


@dataclass(frozen=True, slots=True)
class RecordSpec:
    """Which rows to load and how to make sequences of them. Fields are named as their flags.

    ``max_len``: in tokens, prompt and answer together. Each command reads the keys that it knows. ``max_bad_rows``: the
    share of rows that may be faulty, 0 to 1. ``dataset_num_proc``: processes that tokenise.
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
    max_bad_rows: float = 0.05
    dataset_num_proc: int | Literal["auto"] = AUTO

    @property
    def template(self) -> str | None:
        """The format string around prompts; None with a chat template, which replaces it."""
        return None if self.apply_chat_template else self.input_template

    def of_a_row(self) -> RecordSpec:
        """Only the settings that decide the result of a given row; the others are at their defaults."""
        default = RecordSpec("")
        return replace(
            self,
            dataset=default.dataset,
            dataset_probs=default.dataset_probs,
            split=default.split,
            max_samples=default.max_samples,
            seed=default.seed,
            max_bad_rows=default.max_bad_rows,
            dataset_num_proc=default.dataset_num_proc,
        )
