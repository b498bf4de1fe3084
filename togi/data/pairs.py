"""Read a row as a chosen and a rejected answer to one prompt.

``join_pair`` finds the tokens that both share. All tokens after them are trained in both, so the two logprobs are of the same
continuation, even if BPE merges the end of the prompt with the start of only one answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from togi.data.chat import Tokenizer
from togi.data.faults import Drop, RowError, named
from togi.data.fields import (
    as_text,
    chat_draft,
    is_empty,
    plain_draft,
    prompted_dialogue,
    prompted_draft,
    row_frame,
    value_of,
    whole_dialogue,
)
from togi.data.masks import Coded, Draft
from togi.data.messages import Dialogue
from togi.data.record_spec import RecordSpec
from togi.data.tables import Row
from togi.data.turns import check_last

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
