"""A conversation -> its text and the characters of the assistant's turns that are to be learned.

A template that marks turns with ``{% generation %}`` is believed. For others the conversation is rendered once as a
whole, and each turn lies between two renderings of its head: before it with the generation prompt, and with it; a template
that renders the newest turn in another way than older ones shows the end of an older turn by the text that closes it.
Either way the text of each turn must be in its part, and white space after the closing token of a turn is not learned, as
generation stops there. Tokens are made in ``masks``.
"""

from __future__ import annotations

from collections.abc import Sequence

from togi.data.chat import Tokenizer, closing_text, marks_turns, render_marked, render_messages
from togi.data.faults import Drop, Note, RowError
from togi.data.masks import Draft, Span
from togi.data.messages import ASSISTANT, Dialogue, Message, call_names, reasoning_of, tool_names

_SHOWN = 60
_MARK = "mark the assistant's turns in the template with {% generation %} and {% endgeneration %} (--tokenizer_chat_template)"


def check_last(messages: Sequence[Message]) -> None:
    """Raise RowError if the last message is not the assistant's."""
    if messages[-1]["role"] != ASSISTANT:
        raise RowError(
            Drop.WRONG_ROLES,
            f"ends with a message of role {messages[-1]['role']!r}, which cannot be learned: end it with one of role "
            f"{ASSISTANT!r}, or leave the row out.",
        )


def says_something(message: Message) -> bool:
    """Whether there is text, reasoning or a tool call to learn."""
    return bool(message["content"].strip() or "".join(reasoning_of(message)).strip() or message.get("tool_calls"))


def conversation(dialogue: Dialogue, first: int, tokenizer: Tokenizer) -> Draft:
    """The conversation up to its last learned turn: every assistant turn from message ``first`` that says something.

    Turns with nothing before them are context. Without any such turn the draft has no spans. Raises RowError.
    """
    messages = dialogue.messages
    turns = [
        i
        for i, message in enumerate(messages)
        if i >= max(first, 1) and message["role"] == ASSISTANT and says_something(message)
    ]
    if not turns:
        return Draft("", (), complete=False)
    marked = marks_turns(tokenizer)
    text, spans = _marked(dialogue, turns, tokenizer) if marked else _located(dialogue, turns, tokenizer)
    spans = [(start, start + len(text[start:end].rstrip())) for start, end in spans]
    notes = set(dialogue.notes)
    for turn, (start, end) in zip(turns, spans, strict=True):
        notes |= _check_text(messages[turn], turn, text[start:end])
    end = spans[-1][1]
    notes |= lost(Dialogue(messages[: turns[-1]], dialogue.tools), text[:end], learned=frozenset(turns))
    return Draft(text[:end], tuple(spans), complete=True, notes=frozenset(notes))


def lost(dialogue: Dialogue, text: str, *, learned: frozenset[int] = frozenset()) -> set[Note]:
    """What of a dialogue is not in its rendered text; messages that are ``learned`` are checked on their own."""
    notes = set[Note]()
    if dialogue.tools and not any(name in text for name in tool_names(dialogue.tools)):
        notes.add(Note.TOOLS_UNSEEN)
    for number, message in enumerate(dialogue.messages):
        if number in learned:
            continue
        said = [message["content"], *call_names(message)]
        if not all(part.strip() in text for part in said):
            notes.add(Note.CONTEXT_LOST)
    return notes


def _marked(dialogue: Dialogue, turns: Sequence[int], tokenizer: Tokenizer) -> tuple[str, list[Span]]:
    text, marks = render_marked(dialogue, tokenizer)
    assistants = [i for i, message in enumerate(dialogue.messages) if message["role"] == ASSISTANT]
    if len(marks) != len(assistants):
        raise RowError(
            Drop.TEMPLATE,
            f"has {len(assistants)} messages of the assistant, but the chat template marks {len(marks)} parts with "
            "{% generation %}: let it mark each message of the assistant once.",
        )
    return text, [marks[assistants.index(turn)] for turn in turns]


def _located(dialogue: Dialogue, turns: Sequence[int], tokenizer: Tokenizer) -> tuple[str, list[Span]]:
    text = render_messages(dialogue, tokenizer)
    return text, [_place(dialogue, turn, text, tokenizer) for turn in turns]


def _place(dialogue: Dialogue, turn: int, text: str, tokenizer: Tokenizer) -> Span:
    """Where a turn is in the ``text`` of the whole dialogue. Raises RowError that says why it cannot be told."""
    messages, tools = dialogue.messages, dialogue.tools
    before = render_messages(Dialogue(messages[:turn], tools), tokenizer, add_generation_prompt=True)
    is_last = turn + 1 == len(messages)
    after = text if is_last else render_messages(Dialogue(messages[: turn + 1], tools), tokenizer)
    if text.startswith(before):
        if text.startswith(after) and len(after) > len(before):
            return len(before), len(after)
        if (end := _closed(messages[turn], text, len(before), tokenizer)) is not None:
            return len(before), end
        raise RowError(
            Drop.TEMPLATE,
            f"has its message {turn} rendered differently by the chat template when more messages follow, so that its "
            f"place is not known: {_MARK}, or train on its last turn only.",
        )
    history = render_messages(Dialogue(messages[:turn], tools), tokenizer)
    opening = before.removeprefix(history)
    if text.startswith(history) and before.startswith(history):
        rendered = text[len(history) : len(history) + len(opening) + _SHOWN]
        raise RowError(
            Drop.TEMPLATE,
            f"has its message {turn} rendered by the chat template without the generation prompt {opening!r} that answers are "
            f"generated after (it renders {rendered!r}), so that no answer would be learned as it is generated: use a template "
            f"in which both are alike, or {_MARK}.",
        )
    raise RowError(
        Drop.TEMPLATE,
        f"has the messages before its message {turn} rendered differently by the chat template when more messages follow, so "
        f"that the place of the message is not known: {_MARK}"
        + ("." if is_last else ", or train on its last turn only."),
    )


def _closed(message: Message, text: str, start: int, tokenizer: Tokenizer) -> int | None:
    """The end of a turn whose content is rendered right at ``start``: behind the text that closes a turn."""
    content, closing = message["content"].strip(), closing_text(tokenizer)
    if not closing or not text.startswith(content, start):
        return None
    found = text.find(closing, start + len(content))
    return None if found < 0 else found + len(closing)


def _check_text(message: Message, turn: int, part: str) -> set[Note]:
    """What of a learned message is left out without harm. Raises RowError if its content or its calls are not in ``part``."""
    content = message["content"].strip()
    reasoning = [text.strip() for text in reasoning_of(message)]
    if content not in part:
        raise RowError(
            Drop.TEMPLATE,
            f"has its message {turn} changed by the chat template (the part to learn is {part[:_SHOWN]!r}, the message "
            f"{content[:_SHOWN]!r}): use a template that keeps the text of the assistant.",
        )
    if not all(name in part for name in call_names(message)):
        raise RowError(
            Drop.TEMPLATE,
            f"has tool calls in its message {turn} that the chat template leaves out: use a template that renders tool_calls.",
        )
    if all(text in part for text in reasoning):
        return set()
    if not content and not call_names(message):
        raise RowError(
            Drop.TEMPLATE,
            f"has nothing but reasoning in its message {turn}, which the chat template leaves out: use a template that renders "
            "reasoning_content, or put the text into content.",
        )
    return {Note.REASONING_LOST}
