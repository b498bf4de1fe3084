"""Read a row as what a command trains on or scores.

Supervised fine-tuning: an answer, every assistant turn, or a whole text. Pairs: a chosen and a rejected answer to one prompt.

``join_pair`` finds the tokens that both share. All tokens after them are trained in both, so the two logprobs are of the same
continuation, even if BPE merges the end of the prompt with the start of only one answer.

Unpaired: an answer with a label, desirable or not. Steps: a text with a placeholder token after each step, and a label for
each, for process reward models. The prediction is at the placeholder: the next-token prediction of its hidden state is compared
with the label. Hard labels are tokens (their ids are in the stream), soft labels are the probability of the positive token.

Outputs: a prompt and an output as the token ids for a reward model, formatted as in its training. The text is made and tokenised
as that of pairs: prompt and output as one text with an end token. Unlike there, an empty output
has a score too.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from togi.data.chat import Tokenizer, check_rendering, encode, plain_prompt, render_messages, visible
from togi.data.faults import SENTENCES, Drop, Note, RowError, check_whole, named
from togi.data.fields import (
    answer_dialogue,
    as_text,
    chat_draft,
    is_empty,
    joined,
    plain_draft,
    prompt_dialogue,
    prompted_dialogue,
    prompted_draft,
    row_frame,
    value_of,
    whole_dialogue,
)
from togi.data.messages import Dialogue
from togi.data.precheck import RecordSpec
from togi.data.report import note_warnings
from togi.data.source import Mixture
from togi.data.tables import Row
from togi.data.turns import Coded, Draft, Span, check_last, conversation, end_tokens
from togi.errors import DataError


def read_sft(row: Row, where: str, spec: RecordSpec, tokenizer: Tokenizer) -> tuple[Draft, ...] | Drop:
    """One draft, in one of the modes of the module's title. Raises RowError."""
    assert spec.output_key is not None or spec.apply_chat_template or spec.pretrain_mode, "--output_key is not set"
    value = value_of(row, where, "input_key", spec.input_key)
    if spec.pretrain_mode:
        draft = _raw(value, where, spec)
    elif spec.output_key is None:
        draft = _conversation(row, value, where, spec, tokenizer)
    else:
        answer = value_of(row, where, "output_key", spec.output_key)
        draft = prompted_draft(row, value, answer, where, (spec.input_key, spec.output_key), spec, tokenizer)
    return draft if isinstance(draft, Drop) else (draft,)


def _raw(value: object, where: str, spec: RecordSpec) -> Draft | Drop:
    if is_empty(value):
        return Drop.EMPTY_PROMPT
    text = as_text(value, where, spec.input_key, chat=False)
    return Draft(text, ((0, len(text)),), complete=False)


def _conversation(row: Row, value: object, where: str, spec: RecordSpec, tokenizer: Tokenizer) -> Draft | Drop:
    if is_empty(value):
        return Drop.EMPTY_PROMPT
    dialogue = whole_dialogue(value, where, spec.input_key, row_frame(row, where), "output_key", tokenizer)
    count = len(dialogue.messages)
    if not spec.multiturn:
        with named(f"{where}: the field {spec.input_key!r}"):
            check_last(dialogue.messages)
        if count == 1:
            return Drop.EMPTY_PROMPT
    return chat_draft(dialogue, 0 if spec.multiturn else count - 1, where, tokenizer)


MARGIN = "margin"


def read_pair(row: Row, where: str, spec: RecordSpec, tokenizer: Tokenizer) -> tuple[Draft, ...] | Drop:
    """Two drafts, chosen first, with values "chosen" (1 or 0) and "margin" (0 if there is none). Raises RowError."""
    answers = {
        spec.chosen_key: value_of(row, where, "chosen_key", spec.chosen_key),
        spec.rejected_key: value_of(row, where, "rejected_key", spec.rejected_key),
    }
    prompt = None if spec.prompt_key is None else value_of(row, where, "prompt_key", spec.prompt_key)
    margin = _margin(row, where)
    # Cheap reasons to drop the row, before anything is formatted.
    if spec.prompt_key is not None and is_empty(prompt):
        return Drop.EMPTY_PROMPT
    if any(is_empty(answer) for answer in answers.values()):
        return Drop.EMPTY_ANSWER
    if answers[spec.chosen_key] == answers[spec.rejected_key]:
        return Drop.TIE
    if spec.apply_chat_template:
        drafts = _chats(row, prompt, answers, where, spec, tokenizer)
    else:
        drafts = [_plain(row, prompt, key, answer, where, spec, tokenizer) for key, answer in answers.items()]
    pair = []
    for chosen, draft in zip((1.0, 0.0), drafts, strict=True):
        if isinstance(draft, Drop):
            return draft
        pair.append(replace(draft, values={"chosen": chosen, "margin": margin}))
    return tuple(pair)


def join_pair(coded: Sequence[Coded]) -> tuple[Coded, ...] | Drop:
    """The pair with a common ``prompt_length``: the equal leading tokens that neither side trains on."""
    chosen, rejected = coded
    if np.array_equal(chosen.tokens, rejected.tokens):
        return Drop.CUT_EQUAL
    limit = min(chosen.prompt_length, rejected.prompt_length)
    differs = np.flatnonzero(chosen.tokens[:limit] != rejected.tokens[:limit])
    shared = int(differs[0]) if len(differs) else limit
    return tuple(
        replace(side, prompt_length=shared, runs=((shared, side.runs[0][1]), *side.runs[1:])) for side in coded
    )


def _margin(row: Row, where: str) -> float:
    value = row.get(MARGIN)
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(
            Drop.WRONG_TYPE, f"{where}: the field {MARGIN!r} is {value!r}, not a finite number: correct or remove it."
        )
    return float(value)


def _plain(
    row: Row, prompt: object, key: str, answer: object, where: str, spec: RecordSpec, tokenizer: Tokenizer
) -> Draft | Drop:
    """A draft in plain text. Without a prompt field the answer is the whole text."""
    if spec.prompt_key is None:
        return plain_draft("", as_text(answer, where, key))
    return prompted_draft(row, prompt, answer, where, (spec.prompt_key, key), spec, tokenizer)


def _chats(
    row: Row, prompt: object, answers: Mapping[str, object], where: str, spec: RecordSpec, tokenizer: Tokenizer
) -> list[Draft | Drop]:
    """Both conversations, checked to answer the same history. Raises RowError."""
    found: list[tuple[Dialogue, int]] = []
    for key, value in answers.items():
        if spec.prompt_key is not None:
            found.append(prompted_dialogue(row, prompt, value, where, (spec.prompt_key, key), tokenizer))
            # Without a prompt field each conversation holds its own prompt, and its last message is the answer.
            continue
        dialogue = whole_dialogue(value, where, key, row_frame(row, where), "prompt_key", tokenizer)
        with named(f"{where}: the field {key!r}"):
            check_last(dialogue.messages)
        found.append((dialogue, len(dialogue.messages) - 1))
    (chosen, chosen_first), (rejected, rejected_first) = found
    if chosen.messages[:chosen_first] != rejected.messages[:rejected_first]:
        names = " and ".join(map(repr, answers))
        raise RowError(
            Drop.WRONG_ROLES,
            f"{where}: the conversations in {names} differ before their last message: both must answer the same history.",
        )
    if chosen_first == 0:
        return [Drop.EMPTY_PROMPT] * 2
    if chosen.messages == rejected.messages:
        return [Drop.TIE] * 2
    return [chat_draft(dialogue, first, where, tokenizer) for dialogue, first in found]


# CSV cells are strings: labels as written by hand, by Python and by tables with missing values.
LABELS: Mapping[object, float] = {0: 0.0, 1: 1.0} | {
    text: label for label, texts in ((0.0, ("0", "0.0", "false")), (1.0, ("1", "1.0", "true"))) for text in texts
}


def read_unpaired(row: Row, where: str, spec: RecordSpec, tokenizer: Tokenizer) -> tuple[Draft, ...] | Drop:
    """One draft as for supervised fine-tuning, with values "desirable" (1 or 0) and "mismatched" (0)."""
    label = value_of(row, where, "label_key", spec.label_key)
    known = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(known, str | int | float) or known not in LABELS:
        raise RowError(
            Drop.WRONG_LABELS,
            f"{where}: the field {spec.label_key!r} is {label!r}: a label must be true or 1 (desirable), or false or 0.",
        )
    drafts = read_sft(row, where, spec, tokenizer)
    if isinstance(drafts, Drop):
        return drafts
    values = {"desirable": LABELS[known], "mismatched": 0.0}
    return tuple(replace(draft, values=values) for draft in drafts)


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


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """The fields of prompt and output, and how they are formatted. Fields are named as their flags; lengths in tokens."""

    input_key: str
    output_key: str
    apply_chat_template: bool
    input_template: str | None
    max_len: int


def read_outputs(mixture: Mixture, spec: OutputSpec, tokenizer: Tokenizer) -> tuple[list[Row], list[list[int]]]:
    """The rows in the order of the mixture, and the token ids of each.

    Raises DataError naming row and field, also for a row of more than ``max_len`` tokens.
    """
    check_rendering(tokenizer, apply_chat_template=spec.apply_chat_template, input_template=spec.input_template)
    names = [mixture.place(pick) for pick in mixture.picks]
    rows = mixture.rows()
    notes = Counter[Note]()
    # Format all rows first: a bad row is reported before anything is tokenised.
    texts = [_text(row, name, spec, tokenizer, notes) for row, name in zip(rows, names, strict=True)]
    for text, name in zip(texts, names, strict=True):
        check_whole(text, f"{name} has")
    for warning in note_warnings(notes, len(rows)):
        logger.warning("%s", warning)
    ids = encode(texts, tokenizer, add_special_tokens=not spec.apply_chat_template)
    enders = end_tokens(tokenizer, chat=spec.apply_chat_template)
    for name, tokens in zip(names, ids, strict=True):
        # The score is read at the end token, as in training.
        if tokens[-1] not in enders:
            tokens.append(tokenizer.eos_token_id)
        if len(tokens) > spec.max_len:
            raise DataError(f"{name} has {len(tokens)} tokens, more than --max_len {spec.max_len}: raise it.")
    return rows, ids


def _text(row: Row, where: str, spec: OutputSpec, tokenizer: Tokenizer, notes: Counter[Note]) -> str:
    prompt = value_of(row, where, "input_key", spec.input_key)
    value = value_of(row, where, "output_key", spec.output_key)
    if not spec.apply_chat_template:
        text, output = as_text(prompt, where, spec.input_key), as_text(value, where, spec.output_key)
        return _nonempty(plain_prompt(text, spec.input_template) + output, where)
    frame = row_frame(row, where)
    dialogue = prompt_dialogue(prompt, where, spec.input_key, frame, tokenizer)
    if not dialogue.messages:
        raise DataError(f"{where} {SENTENCES[Drop.EMPTY_PROMPT]}")
    # An empty output is scored at the end of the generation prompt.
    if value == "" or (isinstance(value, str) and not value.strip()):
        with named(where):
            return render_messages(dialogue, tokenizer, add_generation_prompt=True)
    answer = answer_dialogue(value, where, spec.output_key, frame, tokenizer)
    whole, first = joined(dialogue, answer, where, (spec.input_key, spec.output_key))
    with named(where):
        draft = conversation(whole, first, tokenizer)
        if not draft.spans:  # an answer without text has a score, too
            return render_messages(dialogue, tokenizer, add_generation_prompt=True)
    notes.update(draft.notes)
    return draft.text


def _nonempty(text: str, where: str) -> str:
    if not text:
        raise DataError(f"{where} has neither a prompt nor an output: remove it.")
    return text
