"""Read a row for supervised fine-tuning: an answer, every assistant turn, or a whole text."""

from __future__ import annotations

from togi.data.chat import Tokenizer
from togi.data.faults import Drop, named
from togi.data.fields import as_text, chat_draft, is_empty, prompted_draft, row_frame, value_of, whole_dialogue
from togi.data.masks import Draft
from togi.data.record_spec import RecordSpec
from togi.data.tables import Row
from togi.data.turns import check_last


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
