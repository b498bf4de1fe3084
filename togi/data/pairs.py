"""A row -> a chosen and a rejected answer to one prompt, for reward models and DPO.

``join_pair`` finds the tokens that both share. What follows them is learned in both, so that the two log-probabilities
are of the same continuation, also if BPE merges the end of the prompt with the start of only one answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from togi.data.chat import Tokenizer
from togi.data.faults import Drop, RowError
from togi.data.fields import (
    as_text,
    chat_draft,
    is_empty,
    plain_draft,
    prompted_draft,
    reply_messages,
    value_of,
)
from togi.data.masks import Coded, Draft
from togi.data.record_spec import RecordSpec
from togi.data.tables import Row
from togi.data.turns import Message

MARGIN = "margin"


def read_pair(row: Row, where: str, spec: RecordSpec, tokenizer: Tokenizer) -> tuple[Draft, ...] | Drop:
    """Two drafts, chosen first, with values "chosen" (1 or 0) and "margin" (0 if there is none). Raises RowError."""
    answers = {
        spec.chosen_key: value_of(row, where, "chosen_key", spec.chosen_key),
        spec.rejected_key: value_of(row, where, "rejected_key", spec.rejected_key),
    }
    prompt = None if spec.prompt_key is None else value_of(row, where, "prompt_key", spec.prompt_key)
    margin = _margin(row, where)
    if spec.prompt_key is not None and is_empty(prompt):
        return Drop.EMPTY_PROMPT
    if any(is_empty(answer) for answer in answers.values()):
        return Drop.EMPTY_ANSWER
    if answers[spec.chosen_key] == answers[spec.rejected_key]:
        return Drop.TIE
    histories = _conversations(answers, where) if spec.apply_chat_template and spec.prompt_key is None else {}
    if any(len(history) == 1 for history in histories.values()):
        return Drop.EMPTY_PROMPT
    drafts = []
    for chosen, (key, answer) in zip((1.0, 0.0), answers.items(), strict=True):
        if spec.prompt_key is not None:
            draft = prompted_draft(prompt, answer, where, (spec.prompt_key, key), spec, tokenizer)
        elif spec.apply_chat_template:
            draft = chat_draft(histories[key], len(histories[key]) - 1, where, tokenizer)
        else:
            draft = plain_draft("", as_text(answer, where, key))
        if isinstance(draft, Drop):
            return draft
        drafts.append(replace(draft, values={"chosen": chosen, "margin": margin}))
    return tuple(drafts)


def join_pair(coded: Sequence[Coded]) -> tuple[Coded, ...] | Drop:
    """The pair with one ``prompt_length``: the leading tokens that are equal and that neither side learns."""
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


def _conversations(answers: dict[str, object], where: str) -> dict[str, list[Message]]:
    """Both conversations, after a check that they differ in their last message only."""
    found = {}
    for key, value in answers.items():
        if isinstance(value, str):
            raise RowError(
                Drop.WRONG_TYPE,
                f"{where}: the field {key!r} is a string, but without --prompt_key it must be a conversation, a list of "
                "messages that ends with the answer: set --prompt_key.",
            )
        found[key] = reply_messages(value, where, key)
    (chosen_key, chosen), (rejected_key, rejected) = found.items()
    if chosen[:-1] != rejected[:-1]:
        raise RowError(
            Drop.WRONG_ROLES,
            f"{where}: the conversations in {chosen_key!r} and {rejected_key!r} differ before their last message: both "
            "must answer the same history.",
        )
    return found
