"""The fields of a row as prompt and answer, and the two as one text to tokenise. What fits neither is a RowError."""

from __future__ import annotations

from collections.abc import Sequence

from togi.data.chat import Tokenizer, as_messages, render_prompt
from togi.data.faults import Drop, RowError, named
from togi.data.masks import Draft
from togi.data.precheck import missing_field
from togi.data.record_spec import RecordSpec
from togi.data.tables import Row
from togi.data.turns import Message, answer_messages, conversation


def value_of(row: Row, where: str, flag: str, key: str) -> object:
    """The value of a field. Raises RowError naming row, flag and field if it is missing."""
    if key not in row:
        raise missing_field(where, flag, key, row)
    value: object = row[key]
    return value


def is_empty(value: object) -> bool:
    """Nothing, only white space, or no messages."""
    return value is None or (isinstance(value, str) and not value.strip()) or value == []


def as_text(value: object, where: str, key: str) -> str:
    """The value if it is a string. Raises RowError."""
    if not isinstance(value, str):
        raise RowError(
            Drop.WRONG_TYPE,
            f"{where}: the field {key!r} is of type {type(value).__name__}, not a string: use --apply_chat_template for "
            "lists of messages.",
        )
    return value


def prompt_messages(value: object, where: str, key: str) -> list[Message]:
    """A string as one user message, or checked messages. Raises RowError naming row and field."""
    with named(f"{where}: the field {key!r}"):
        return list(as_messages(value))


def reply_messages(value: object, where: str, key: str) -> list[Message]:
    """A string as one assistant message, or checked messages that end with one. Raises RowError naming row, field."""
    with named(f"{where}: the field {key!r}"):
        return list(answer_messages(value))


def chat_draft(messages: Sequence[Message], first: int, where: str, tokenizer: Tokenizer) -> Draft | Drop:
    """Learn every assistant turn from message ``first`` on."""
    with named(where):
        draft = conversation(messages, first, tokenizer)
    return draft if draft.spans else Drop.EMPTY_ANSWER


def plain_draft(prompt: str, answer: str) -> Draft:
    """Learn the answer, which follows the rendered prompt without anything between them."""
    text = prompt + answer
    return Draft(text, ((len(prompt), len(text)),), complete=True)


def prompted_draft(
    prompt: object, answer: object, where: str, keys: tuple[str, str], spec: RecordSpec, tokenizer: Tokenizer
) -> Draft | Drop:
    """Prompt and answer of two fields, as a chat or as plain text. ``keys``: their names. Raises RowError."""
    if is_empty(prompt):
        return Drop.EMPTY_PROMPT
    if is_empty(answer):
        return Drop.EMPTY_ANSWER
    if not spec.apply_chat_template:
        text = as_text(prompt, where, keys[0])
        rendered = render_prompt(text, tokenizer, apply_chat_template=False, input_template=spec.template)
        return plain_draft(rendered, as_text(answer, where, keys[1]))
    messages, reply = prompt_messages(prompt, where, keys[0]), reply_messages(answer, where, keys[1])
    if reply[: len(messages)] == messages:
        raise RowError(
            Drop.WRONG_ROLES,
            f"{where}: the field {keys[1]!r} repeats the prompt in {keys[0]!r}: name only the field with the whole "
            "conversation, or leave the prompt out of it.",
        )
    return chat_draft([*messages, *reply], 0 if spec.multiturn else len(messages), where, tokenizer)
