"""A conversation -> its text and the characters of the assistant's turns that are to be learned.

A template that marks turns with ``{% generation %}`` is believed. For others the conversation is rendered once as a
whole, and each turn lies between two renderings of its head: before it with the generation prompt, and with it. Either
way the text of each turn must be in its part, and white space after the closing token of a turn is not learned, as
generation stops there. Tokens are made in ``masks``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from togi.data.chat import Tokenizer, as_messages, marks_turns, render_marked, render_messages
from togi.data.faults import Drop, RowError
from togi.data.masks import Draft, Span

Message = Mapping[str, Any]
ASSISTANT = "assistant"


def answer_messages(value: object) -> list[dict[str, Any]]:
    """A string as one assistant message, or a checked list of messages that ends with one. Raises RowError."""
    if isinstance(value, str):
        return [{"role": ASSISTANT, "content": value}]
    messages = as_messages(value)
    if messages:
        check_last(messages)
    return messages


def check_last(messages: Sequence[Message]) -> None:
    """Raise RowError if the last message is not the assistant's."""
    if messages[-1]["role"] != ASSISTANT:
        raise RowError(
            Drop.WRONG_ROLES,
            f"ends with a message of role {messages[-1]['role']!r}, which cannot be learned: end it with one of role "
            f"{ASSISTANT!r}, or leave the row out.",
        )


def says_something(message: Message) -> bool:
    """Whether there is text (or a tool call) to learn."""
    return any(text.strip() for text in _texts(message)) or bool(message.get("tool_calls"))


def conversation(messages: Sequence[Message], first: int, tokenizer: Tokenizer) -> Draft:
    """The conversation up to its last learned turn: every assistant turn from message ``first`` that says something.

    Turns with nothing before them are context. Without any such turn the draft has no spans. Raises RowError.
    """
    turns = [
        i
        for i, message in enumerate(messages)
        if i >= max(first, 1) and message["role"] == ASSISTANT and says_something(message)
    ]
    if not turns:
        return Draft("", (), complete=False)
    marked = marks_turns(tokenizer)
    text, spans = _marked(messages, turns, tokenizer) if marked else _located(messages, turns, tokenizer)
    spans = [(start, start + len(text[start:end].rstrip())) for start, end in spans]
    for turn, (start, end) in zip(turns, spans, strict=True):
        _check_text(messages[turn], turn, text[start:end])
    return Draft(text[: spans[-1][1]], tuple(spans), complete=True)


def _marked(messages: Sequence[Message], turns: Sequence[int], tokenizer: Tokenizer) -> tuple[str, list[Span]]:
    text, marks = render_marked(messages, tokenizer)
    assistants = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    if len(marks) != len(assistants):
        raise RowError(
            Drop.TEMPLATE,
            f"has {len(assistants)} messages of the assistant, but the chat template marks {len(marks)} parts with "
            "{% generation %}: let it mark each message of the assistant once.",
        )
    return text, [marks[assistants.index(turn)] for turn in turns]


def _located(messages: Sequence[Message], turns: Sequence[int], tokenizer: Tokenizer) -> tuple[str, list[Span]]:
    text = render_messages(messages, tokenizer, add_generation_prompt=False)
    spans = []
    for turn in turns:
        before = render_messages(messages[:turn], tokenizer, add_generation_prompt=True)
        after = text
        if turn + 1 < len(messages):
            after = render_messages(messages[: turn + 1], tokenizer, add_generation_prompt=False)
        if not (text.startswith(after) and after.startswith(before)):
            raise RowError(
                Drop.TEMPLATE,
                f"has its message {turn} rendered differently by the chat template when more messages follow, so that "
                "its place is not known: mark the assistant's turns in the template with {% generation %} and "
                "{% endgeneration %} (--tokenizer_chat_template), or train on its last turn only.",
            )
        spans.append((len(before), len(after)))
    return text, spans


def _check_text(message: Message, turn: int, part: str) -> None:
    for text in _texts(message):
        if text.strip() not in part:
            raise RowError(
                Drop.TEMPLATE,
                f"has its message {turn} changed by the chat template (the part to learn is {part[:60]!r}, the message "
                f"{text.strip()[:60]!r}): use a template that keeps the text of the assistant.",
            )


def _texts(message: Message) -> list[str]:
    """The text of a message: its content, or the texts among its parts."""
    content = message["content"]
    if isinstance(content, str):
        return [content]
    if isinstance(content, Sequence):
        return [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return []
