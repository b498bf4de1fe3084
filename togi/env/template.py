"""A chat template: what it knows, found by trying it, and what it is given of a conversation.

Templates differ in whether they know tools, calls, answers of tools and a role of the system. What one leaves out is put where it
is read, so that no message is lost silently. Sampled answers are ``render``'s.

Two code points that Unicode reserves stand in what a template gets, and are taken out of what it renders. ``CUT`` is where text
is tokenised in two parts, so that what a tool or a user says never becomes a control token. ``KEEP`` is beside white space that a
template would trim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Any

from togi.data.chat import Tokenizer, control_tokens, render_messages, template_text
from togi.data.faults import RowError
from togi.data.messages import ASSISTANT, SYSTEM, TOOL, USER, Dialogue, Message, Tool, dialogue_of, read_tools
from togi.env.tool_calls import ID_LENGTH, ToolCall, call_id, format_of, instructions, reasoning_tags, written
from togi.errors import DataError

CUT, KEEP = "\ufdd0", "\ufdd1"
_CALL_ID, _LONG_ID = "abcdef123", "call_0123456789abcdef"
PROBE = "probe-text"
QUESTION: Message = {"role": USER, "content": "?"}
ANSWER: Message = {"role": ASSISTANT, "content": "!"}


class Answers(StrEnum):
    """How a template takes the answers of tools."""

    ALWAYS = "always"
    """As messages of tools."""
    AFTER_CALLS = "after calls"
    """As messages of tools, if the message before has structured calls."""
    NEVER = "never"
    """It does not know them, so they are messages of the user."""


class Template:
    """The chat template of a tokenizer. ``options``: further variables of it. Raises DataError if it cannot render a question."""

    def __init__(self, tokenizer: Tokenizer, options: Mapping[str, object]) -> None:
        self.tokenizer, self._options = tokenizer, options
        self.form = format_of(template_text(tokenizer))
        self.controls = control_tokens(tokenizer)
        self._pattern = re.compile("|".join(map(re.escape, self.controls.values())) or "(?!)")
        asked, opened = self.render([QUESTION]), self.render([QUESTION], opened=True)
        self.prompt = opened.removeprefix(asked) if opened.startswith(asked) else opened
        self.knows_system = self._shows([{"role": SYSTEM, "content": PROBE}, QUESTION])
        self.knows_developer = self._shows_role("developer")
        self.shows_tools = PROBE in (self._tried([QUESTION], [_tool(PROBE)]) or "")
        self.knows_calls = self._shows([QUESTION, _called(_CALL_ID), _result(_CALL_ID, "!"), ANSWER])
        self._needs_short_ids = self.knows_calls and not self._shows(
            [QUESTION, _called(_LONG_ID), _result(_LONG_ID, "!")]
        )
        self.answers = self._how_answers()
        # Whether the generation prompt opens the reasoning, and with which tags, or writes one that is empty.
        self.opens = next((tags for tags in reasoning_tags(self.form) if self.prompt.rstrip().endswith(tags[0])), None)
        self.leaves_out = any(closing in self.prompt for _, closing in reasoning_tags(self.form))

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, opened: bool = False) -> str:
        """The text of messages in the form that the template reads. Raises DataError."""
        try:
            dialogue = Dialogue(tuple(messages), tuple(tools))
            return render_messages(dialogue, self.tokenizer, add_generation_prompt=opened, options=self._options)
        except RowError as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError(f"A conversation with the messages {roles} {error}") from None

    def _tried(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str | None:
        try:
            return self.render(messages, tools)
        except DataError:
            return None

    def _shows(self, messages: Sequence[Message]) -> bool:
        return PROBE in (self._tried(messages) or "")

    def _shows_role(
        self, role: str, before: Sequence[Message] = (), after: Sequence[Message] = (), **named: str
    ) -> bool:
        """Whether the template renders a role otherwise than one that nobody knows."""

        def shown(name: str) -> str:
            message = {"role": name, "content": PROBE, **named}
            return (self._tried([*before, message, *(after or (QUESTION,))]) or "").replace(name, "")

        return PROBE in shown(role) and shown(role) != shown("nobody")

    def _how_answers(self) -> Answers:
        after = [ANSWER, QUESTION]
        if self._shows_role(TOOL, [QUESTION, ANSWER], after):
            return Answers.ALWAYS
        names = {"tool_call_id": _CALL_ID, "name": "tool"}
        if self.knows_calls and self._shows_role(TOOL, [QUESTION, _called(_CALL_ID)], after, **names):
            return Answers.AFTER_CALLS
        return Answers.NEVER

    # What the template is given.

    def read(self, message: Message) -> Message:
        """A message of a client in the common form. Raises DataError."""
        try:
            (read,) = dialogue_of([message], USER, template_text(self.tokenizer)).messages
        except RowError as error:
            raise DataError(f"A conversation {error}") from None
        return read

    def read_tools(self, tools: Sequence[Tool]) -> tuple[Tool, ...]:
        """Tools in the common form. Raises DataError."""
        try:
            return read_tools(list(tools), set())
        except RowError as error:
            raise DataError(f"A list of tools {error}") from None

    def framed(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
        """The messages, with what the template leaves out at their start: tools, or the role of the system."""
        rest, role, texts = list(messages), SYSTEM, list[str]()
        if rest and rest[0]["role"] in (SYSTEM, "developer"):
            first = rest.pop(0)
            role, texts = first["role"], [first["content"]]
        if tools and not self.shows_tools:
            texts.append(instructions(tools, self.form))
        if not texts:
            return rest
        content = "\n\n".join(texts)
        if role != SYSTEM and not self.knows_developer:
            role = SYSTEM
        if role != SYSTEM or self.knows_system:
            return [{"role": role, "content": content}, *rest]
        if rest and rest[0]["role"] == USER:
            return [{**rest[0], "content": f"{content}\n\n{rest[0]['content']}"}, *rest[1:]]
        return [{"role": USER, "content": content}, *rest]

    def takes(self, message: Message, *, has_calls: bool) -> bool:
        """Whether the template takes the answer of a tool as such. ``has_calls``: the message before has structured calls.

        One that names a call which is not there is left to the template, which refuses it.
        """
        if self.answers is Answers.AFTER_CALLS:
            return has_calls or "tool_call_id" in message
        return self.answers is Answers.ALWAYS

    def outside(self, message: Message) -> Message:
        """A message of the assistant that was not sampled here, or whose tokens are not known."""
        form = {key: self.words(item) if key != "role" else item for key, item in message.items()}
        # Reasoning may stand in the content, where templates look for its tags.
        tags = "|".join(re.escape(tag) for pair in reasoning_tags(self.form) for tag in pair)
        parts = re.split(f"({tags})", message["content"])
        form["content"] = "".join(part if number % 2 else self.words(part) for number, part in enumerate(parts))
        calls = [
            self.call_form(call, self.words(call.arguments)) for call in map(call_of, message.get("tool_calls") or ())
        ]
        if not calls:
            return form
        if self.knows_calls:
            return {**form, "tool_calls": calls}
        texts = [written(call_of(call), self.form) for call in calls]
        del form["tool_calls"]
        return {**form, "content": "\n".join([*filter(None, [form["content"]]), *texts])}

    def call_form(self, call: ToolCall, arguments: object) -> Message:
        """A call as the template reads it, with these ``arguments``."""
        return call_message(ToolCall(self.words(call.name), call.arguments, self.wanted_id(call.id)), arguments)

    def wanted_id(self, call: str) -> str:
        """The id of a call in the form that the template wants."""
        fits = len(call) == ID_LENGTH and call.isalnum()
        return call if fits or not self._needs_short_ids else call_id(call)

    def words(self, value: Any) -> Any:
        """A value whose strings are words, cut within the text of each control token."""
        if isinstance(value, str):
            return self.cut(value.replace(CUT, "\ufffd").replace(KEEP, "\ufffd"))
        if isinstance(value, Mapping):
            return {self.words(key): self.words(item) for key, item in value.items()}
        return [self.words(item) for item in value] if isinstance(value, list | tuple) else value

    def cut(self, text: str) -> str:
        """Text cut after the first character of each control token in it."""
        places, match = [0], self._pattern.search(text)
        while match is not None:
            places.append(match.start() + 1)
            match = self._pattern.search(text, places[-1])
        return CUT.join(text[start:end] for start, end in pairwise([*places, len(text)]))


def plain(text: str) -> str:
    """Text without marks."""
    return text.replace(CUT, "").replace(KEEP, "")


def _tool(name: str) -> Tool:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "description": "!"}}}
    return {"type": "function", "function": {"name": name, "description": "!", "parameters": parameters}}


def _called(call: str) -> Message:
    made = ToolCall(PROBE, {"a": "!"}, call)
    return {"role": ASSISTANT, "content": "", "tool_calls": [call_message(made, made.arguments)]}


def _result(call: str, content: str) -> Message:
    return {"role": TOOL, "content": content, "tool_call_id": call, "name": PROBE}


def call_message(call: ToolCall, arguments: object) -> dict[str, Any]:
    """A call in OpenAI's form."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def call_of(call: Mapping[str, Any]) -> ToolCall:
    """The call of a message."""
    function = call["function"]
    return ToolCall(str(function["name"]), function["arguments"], str(call.get("id", "")))
