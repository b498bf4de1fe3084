"""Rows of a prompt and an output as the token ids for a reward model, formatted as in its training.

The text is made and tokenised as in ``pairs``: prompt and output as one text with an end token. Unlike there, an empty output
has a score too.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

from togi.data.chat import Tokenizer, check_rendering, encode, plain_prompt, render_messages
from togi.data.faults import SENTENCES, Drop, Note, check_whole, named
from togi.data.fields import answer_dialogue, as_text, joined, prompt_dialogue, row_frame, value_of
from togi.data.masks import end_tokens
from togi.data.mixture import Mixture
from togi.data.report import note_warnings
from togi.data.tables import Row
from togi.data.turns import conversation
from togi.errors import DataError

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
