"""Read a row as a text with a placeholder token after each step, and a label for each: for process reward models.

The prediction is at the placeholder: the next-token prediction of its hidden state is compared with the label. Hard labels are
tokens (their ids are in the stream), soft labels are the probability of the positive token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from togi.data.chat import Tokenizer, visible
from togi.data.faults import Drop, RowError
from togi.data.fields import as_text, is_empty, value_of
from togi.data.masks import Coded, Draft, Span
from togi.data.record_spec import RecordSpec
from togi.data.tables import Row
from togi.errors import DataError

_KINDS = {False: "tokens", True: "numbers"}


@dataclass(frozen=True, slots=True)
class StepLabels:
    """How steps are marked and labelled. ``reward_ids``: in the order of ``--reward_tokens``; None: any token.

    ``soft``: labels are probabilities of the first reward token instead of tokens; a data set has one kind only.
    """

    placeholder: str
    reward_tokens: tuple[str, ...] | None
    reward_ids: tuple[int, ...] | None
    soft: bool


def step_labels(spec: RecordSpec, first_label: object, tokenizer: Tokenizer) -> StepLabels:
    """Check that each named text is one token, and that soft labels have two tokens. Raises DataError."""
    token_id(spec.placeholder_token, "--placeholder_token", tokenizer)
    tokens = spec.reward_tokens
    ids = None if tokens is None else tuple(token_id(token, "--reward_tokens", tokenizer) for token in tokens)
    if ids is not None and len(set(ids)) < len(ids):
        raise DataError(
            f"Two of --reward_tokens {' '.join(tokens or ())} are the same token of this tokenizer: choose texts of different "
            "tokens."
        )
    soft = is_soft(first_label)
    if soft and (ids is None or len(ids) != 2):
        raise DataError(
            f"The labels in {spec.label_key!r} are numbers, which need two tokens to divide the probability: give "
            "--reward_tokens POSITIVE NEGATIVE."
        )
    return StepLabels(spec.placeholder_token, tokens, ids, soft)


def token_id(text: str, flag: str, tokenizer: Tokenizer) -> int:
    """The id of a text that is one token. Raises RowError naming the flag if it is not."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise RowError(
            Drop.WRONG_LABELS,
            f"{flag} {text!r} is {len(ids)} tokens of this tokenizer, not one: choose a text that is a token of its own.",
        )
    return ids[0]


def read_steps(row: Row, where: str, spec: RecordSpec, kind: StepLabels, tokenizer: Tokenizer) -> tuple[Draft] | Drop:
    """One draft whose spans are the placeholders. Raises RowError if the labels do not match them."""
    value = value_of(row, where, "input_key", spec.input_key)
    labels = label_list(value_of(row, where, "label_key", spec.label_key))
    if is_empty(value):
        return Drop.EMPTY_PROMPT
    text = as_text(value, where, spec.input_key, chat=False)
    if not isinstance(labels, Sequence) or isinstance(labels, str):
        raise RowError(
            Drop.WRONG_TYPE,
            f"{where}: the field {spec.label_key!r} is of type {type(labels).__name__}, not a list: give one label for "
            'each placeholder, in a CSV file as JSON (["+", "-"]).',
        )
    spans = _occurrences(text, kind.placeholder)
    if len(spans) != len(labels):
        raise RowError(
            Drop.WRONG_LABELS,
            f"{where} has {len(labels)} labels in {spec.label_key!r} for {len(spans)} placeholders "
            f"{kind.placeholder!r} in {spec.input_key!r}: give one label for each.",
        )
    if not spans:
        return Drop.NO_STEPS
    if not text[: spans[0][0]].strip():
        raise RowError(
            Drop.WRONG_LABELS, f"{where} starts with a placeholder in {spec.input_key!r}: put the step before it."
        )
    numbers = tuple(_number(label, f"{where}: label {i}", kind, tokenizer) for i, label in enumerate(labels))
    return (Draft(text, tuple(spans), complete=False, labels=numbers),)


def label_list(value: object) -> object:
    """The value; if it is the JSON text of a list, as in a CSV cell, that list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            return json.loads(value)
    return value


def is_soft(label: object) -> bool:
    """Whether a label is a probability (a number, or true for 1) instead of a token."""
    return isinstance(label, int | float)


def check_places(coded: Coded, kind: StepLabels, tokenizer: Tokenizer) -> None:
    """Raise RowError if a placeholder is not a single token of its own."""
    for number, (start, end) in enumerate(coded.runs):
        part = visible(tokenizer, coded.tokens[start:end].tolist())
        if end - start != 1 or part.strip() != kind.placeholder.strip():
            raise RowError(
                Drop.WRONG_LABELS,
                f"has its placeholder {number} in the tokens {part!r}, together with other text: put white space around "
                "placeholders, or choose another --placeholder_token.",
            )


def _number(label: object, what: str, kind: StepLabels, tokenizer: Tokenizer) -> float:
    """A label as a number: the id of its token, or the probability. Raises RowError."""
    if not isinstance(label, str | int | float):
        raise RowError(
            Drop.WRONG_LABELS, f"{what} is of type {type(label).__name__}: give a token, or a number from 0 to 1."
        )
    if is_soft(label) != kind.soft:
        raise RowError(
            Drop.WRONG_LABELS,
            f"{what} is {label!r}, but earlier labels are {_KINDS[kind.soft]}: use one kind for all rows.",
        )
    if isinstance(label, str):
        if kind.reward_tokens is not None and label not in kind.reward_tokens:
            raise RowError(
                Drop.WRONG_LABELS,
                f"{what} is {label!r}, which is not among --reward_tokens {' '.join(kind.reward_tokens)}: add it there "
                "or correct the row.",
            )
        return float(token_id(label, what, tokenizer))
    if not 0 <= label <= 1:
        raise RowError(
            Drop.WRONG_LABELS, f"{what} is {label!r}: a probability of the positive token must lie between 0 and 1."
        )
    return float(label)


def _occurrences(text: str, placeholder: str) -> list[Span]:
    spans, start = [], text.find(placeholder)
    while start >= 0:
        spans.append((start, start + len(placeholder)))
        start = text.find(placeholder, start + len(placeholder))
    return spans
