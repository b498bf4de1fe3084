"""Conversations as rows hold them -> one form: a list of messages with a known role and text as content, and their tools.

Rows come in several dialects: OpenAI's, ShareGPT's ``from`` and ``value``, content in parts, lists exported as text, one
message in place of a list, columns in place of messages. Each is read for what it is and noted (``Note``); what is none of
them is a fault. Nothing is rendered here (``chat``), and what is learned is decided in ``turns``.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from togi.data.faults import Drop, Note, RowError
from togi.data.tables import Row

Message: TypeAlias = Mapping[str, Any]
Tool: TypeAlias = Mapping[str, Any]

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
ROLES = frozenset({SYSTEM, "developer", USER, ASSISTANT, TOOL})
# What other data sets call those who speak.
SPEAKERS = dict.fromkeys(("human", "prompter"), USER) | dict.fromkeys(
    ("gpt", "chatgpt", "model", "bot", "chatbot", "ai"), ASSISTANT
)
# The same for tools. A template that has a name of its own for them keeps it.
ANSWERERS = dict.fromkeys(("observation", "tool_response", "function_response", "function", "ipython"), TOOL)
# A turn of the assistant that is nothing but a call, written as JSON text.
CALLERS = frozenset({"function_call", "tool_call"})
REASONING = ("reasoning_content", "reasoning", "thinking")
TOOLS = "tools"
_SHARED = {"from": "role", "value": "content"}
# The types of a part that is text, in OpenAI's two interfaces.
_TEXTS = ("text", "input_text", "output_text")
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Messages in the one form, the tools that their template is to show, and what was read otherwise than written."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    notes: frozenset[Note] = frozenset()

    def extended(self, other: Dialogue) -> Dialogue:
        """These messages and then the others, for the same tools."""
        return Dialogue((*self.messages, *other.messages), self.tools, self.notes | other.notes)


def dialogue_of(value: object, role: str, template: str | None, tools: Dialogue | None = None) -> Dialogue:
    """The messages of a field: a string is one message of ``role``, anything else must be messages. Raises RowError.

    ``template``: the text of the chat template; a role that it names is known, and without one any is. ``tools``: those of
    the row.
    """
    notes = set[Note]() if tools is None else set(tools.notes)
    found = _parsed(value, notes, _is_message) if isinstance(value, str) else value
    if isinstance(found, str):
        found = [{"role": role, "content": found}]
    if isinstance(found, Mapping):
        found = _rows_of(found)
        notes.add(Note.ONE_MESSAGE)
    if isinstance(found, list) and found and all(_is_part(item) for item in found):
        found = [{"role": role, "content": found}]
    if not isinstance(found, Sequence):
        raise RowError(Drop.WRONG_TYPE, f"is {named_value(value)}: it must be a string or a list of messages.")
    messages = tuple(_message(message, number, template, notes) for number, message in enumerate(found))
    return Dialogue(messages, () if tools is None else tools.tools, frozenset(notes))


def tools_of(row: Row) -> Dialogue:
    """The tools of a row, as a dialogue without messages: its field ``tools``, a list or the text of one. Raises RowError."""
    value, notes = row.get(TOOLS), set[Note]()
    if value is None or (isinstance(value, str) and value.strip() in ("", "[]", "null")):
        return Dialogue(())
    if isinstance(value, str):
        value = _parsed(value, notes, _is_tool)
    value = [value] if isinstance(value, Mapping) else value
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise RowError(Drop.WRONG_TYPE, f"is {_short(row[TOOLS])}, {_TOOL_FORM}")
    tools = []
    for number, each in enumerate(value):
        tool = _parsed(each, notes, _is_tool) if isinstance(each, str) else each
        if not isinstance(tool, Mapping) or not _is_tool(tool):
            raise RowError(Drop.WRONG_TYPE, f"has the entry {number} {_short(each)}, {_TOOL_FORM}")
        tools.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return Dialogue((), tuple(tools), frozenset(notes))


def tool_names(tools: Sequence[Tool]) -> list[str]:
    """What the tools are called."""
    return [str(_function(tool)["name"]) for tool in tools]


def call_names(message: Message) -> list[str]:
    """The names of the functions that a message calls."""
    return [str(call["function"]["name"]) for call in message.get("tool_calls", ())]


def reasoning_of(message: Message) -> list[str]:
    """What the assistant thought, where the row keeps it beside the content."""
    return [message[key] for key in REASONING if message.get(key)]


def without_answers(dialogue: Dialogue) -> Dialogue:
    """A prompt without the assistant's turns that end it, which are for the model to say."""
    end = len(dialogue.messages)
    while end > 0 and dialogue.messages[end - 1]["role"] == ASSISTANT:
        end -= 1
    if end == len(dialogue.messages):
        return dialogue
    return Dialogue(dialogue.messages[:end], dialogue.tools, dialogue.notes | {Note.ANSWER_LEFT_OUT})


def holds_messages(value: object) -> bool:
    """Whether a value of a table is a message or a list of them."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and ("role" in first or "from" in first)


def unfilled(value: Any) -> Any:
    """A value without the keys that a table fills with null, at any depth: its rows all have the keys that any of them has."""
    if isinstance(value, Mapping):
        return {key: unfilled(item) for key, item in value.items() if item is not None}
    return [unfilled(item) for item in value] if isinstance(value, list) else value


_TOOL_FORM = (
    "but the field 'tools' goes to the chat template: write a list of {'type': 'function', 'function': {'name': ..., "
    "'description': ..., 'parameters': ...}}, or rename the field if it means something else."
)


def _parsed(text: str, notes: set[Note], fits: Callable[[Mapping[str, Any]], bool]) -> object:
    """What a text stands for if it is a record that ``fits`` or a list of them, in JSON or as Python writes it; else the text."""
    start = text.lstrip()
    if not start.startswith(("[", "{")):
        return text
    try:
        value = json.loads(start)
    except (ValueError, RecursionError):
        if not _WRITTEN.match(start):
            return text
        try:
            value = ast.literal_eval(start)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise RowError(
                Drop.WRONG_TYPE,
                f"is a text that looks like a list of messages or tools but is not JSON ({_short(start)}): write the list "
                "itself, or as JSON.",
            ) from None
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, Mapping) and fits(item) for item in items):
        return text
    notes.add(Note.AS_TEXT)
    return value


# The beginning of such a list as Python or NumPy prints it.
_WRITTEN = re.compile(r"\[?\s*\{\s*['\"](role|content|from|value|type|function)['\"]\s*:")


def _is_message(item: Mapping[str, Any]) -> bool:
    return ("role" in item and ("content" in item or "tool_calls" in item)) or _SHARED.keys() <= item.keys()


def _is_part(item: object) -> bool:
    """Whether an item of a list is a part of content, and no message."""
    return (
        isinstance(item, Mapping) and "role" not in item and "from" not in item and ("type" in item or "text" in item)
    )


def _is_tool(item: Mapping[str, Any]) -> bool:
    return isinstance(_function(item).get("name"), str)


def _rows_of(found: Mapping[str, Any]) -> list[Any]:
    """One message as a list of it; a table of messages, a list for each key, as its rows."""
    columns = {key: column for key, column in found.items() if isinstance(column, list)}
    sizes = {len(column) for column in columns.values()}
    if len(sizes) == 1 and len(columns) == len(found) and ("role" in columns or "from" in columns):
        return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return [found]


def _message(message: object, number: int, template: str | None, notes: set[Note]) -> Message:
    """One message in the one form. Keys that a template may know beside role and content stay as they are."""
    where = f"in its message {number}"
    if not isinstance(message, Mapping):
        raise RowError(Drop.WRONG_ROLES, f"has no role and content {where} ({_short(message)}): {_MESSAGE_FORM}")
    kept = {key: item for key, item in message.items() if item is not None or key == "content"}
    if _SHARED.keys() <= kept.keys() and "role" not in kept and kept.get("content") is None:
        kept.pop("content", None)
        kept = {_SHARED.get(key, key): item for key, item in kept.items()}
        notes.add(Note.SHAREGPT)
    if not isinstance(kept.get("role"), str):
        keys = ", ".join(map(repr, message)) or "none"
        raise RowError(Drop.WRONG_ROLES, f"has no role and content {where} (its keys: {keys}): {_MESSAGE_FORM}")
    _settle_role(kept, where, template, notes)
    _settle_calls(kept, where)
    for key in REASONING:
        if key in kept:
            kept[key] = _text(kept, key, where, notes)
    speaks_otherwise = kept["role"] == ASSISTANT and bool(kept.get("tool_calls") or reasoning_of(kept))
    if speaks_otherwise and kept.get("content") is None:
        kept["content"] = ""
    if "content" not in kept:
        keys = ", ".join(map(repr, message))
        raise RowError(Drop.WRONG_ROLES, f"has no content {where} (its keys: {keys}): {_MESSAGE_FORM}")
    kept["content"] = _text(kept, "content", where, notes)
    return kept


_MESSAGE_FORM = "write {'role': 'user', 'content': ...}."


def _settle_role(kept: dict[str, Any], where: str, template: str | None, notes: set[Note]) -> None:
    """Give the message a known role, in place."""
    written = kept["role"]
    name = written.strip().lower()
    named = template is not None and any(f"{mark}{written}{mark}" in template for mark in "'\"")
    if written in ROLES or (named and written not in SPEAKERS):
        return
    if name in CALLERS:
        calls = _parsed_call(kept.get("content"))
        if calls is None:
            raise RowError(
                Drop.WRONG_ROLES,
                f"has the role {written!r} {where}, but its content is not a call ({_short(kept.get('content'))}): write "
                "{'name': ..., 'arguments': {...}} as JSON.",
            )
        kept |= {"role": ASSISTANT, "content": None, "tool_calls": calls}
    else:
        role = SPEAKERS.get(name) or ANSWERERS.get(name) or name
        if role not in ROLES and template is None:
            return
        if role not in ROLES:
            raise RowError(
                Drop.WRONG_ROLES,
                f"has the unknown role {written!r} {where}: write system, user, assistant or tool, or use a chat template "
                "that names this role.",
            )
        kept["role"] = role
    notes.add(Note.ALIAS)


def _parsed_call(content: object) -> list[Any] | None:
    """A call, or a list of them, as an object or its JSON text; None for anything else."""
    value = content
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    calls = value if isinstance(value, list) else [value]
    fits = calls and all(isinstance(call, Mapping) and isinstance(_function(call).get("name"), str) for call in calls)
    return calls if fits else None


def _settle_calls(kept: dict[str, Any], where: str) -> None:
    """Bring tool calls into one form, in place: objects with a function whose arguments are an object, as templates expect."""
    value = kept.pop("tool_calls", None)
    if value is None and kept["role"] == ASSISTANT and isinstance(kept.get("function_call"), Mapping):
        value = [kept.pop("function_call")]
    if isinstance(value, str):
        value = _parsed_call(value) or value
    calls = [value] if isinstance(value, Mapping) else value
    if not calls:
        return
    if isinstance(calls, str) or not isinstance(calls, Sequence):
        raise RowError(Drop.WRONG_TYPE, f"has tool_calls of type {_kind(calls)} {where}: {_CALL_FORM}")
    kept["tool_calls"] = [_call(call, f"{where} (call {number})") for number, call in enumerate(calls)]


_CALL_FORM = "write a list of {'type': 'function', 'function': {'name': ..., 'arguments': {...}}}."


def _call(call: object, where: str) -> dict[str, Any]:
    call = _parsed_call(call) if isinstance(call, str) else call
    call = call[0] if isinstance(call, list) and len(call) == 1 else call
    function = dict(_function(call)) if isinstance(call, Mapping) else {}
    if not isinstance(call, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(Drop.WRONG_TYPE, f"has a tool call without the name of a function {where}: {_CALL_FORM}")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise RowError(
                Drop.WRONG_TYPE,
                f"has arguments that are not JSON ({_short(arguments)}) {where}: correct or remove the row.",
            ) from None
    arguments = {} if arguments is None or arguments == "" else arguments
    if not isinstance(arguments, Mapping):
        raise RowError(Drop.WRONG_TYPE, f"has arguments of type {_kind(arguments)} {where}: {_CALL_FORM}")
    outer = {key: item for key, item in call.items() if key not in ("name", "arguments", "function")}
    return {"type": "function", **outer, "function": {**function, "arguments": dict(arguments)}}


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool or a call, which some rows leave without its wrapping."""
    inner = tool.get("function", tool)
    return inner if isinstance(inner, Mapping) else {}


def _text(message: Mapping[str, Any], key: str, where: str, notes: set[Note]) -> str:
    """A text, or the text of parts that are nothing else. Raises RowError naming what it is."""
    value = message[key]
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        notes.add(Note.PARTS)
        return "".join(_part(part, key, where) for part in value)
    raise RowError(
        Drop.WRONG_TYPE,
        f"has {key} that is {named_value(value)} {where} (role {message['role']}): it must be a string, "
        "correct or remove the row.",
    )


def _part(part: object, key: str, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        keys = [name for name, item in part.items() if item is not None]
        is_text = part["type"] in _TEXTS if "type" in keys else keys == ["text"]
        if is_text and isinstance(part.get("text"), str):
            return str(part["text"])
        what = (
            f"of type {part['type']!r}"
            if "type" in keys and not is_text
            else f"with the keys {', '.join(map(repr, keys))}"
        )
    else:
        what = named_value(part)
    raise RowError(
        Drop.WRONG_TYPE,
        f"has a part {what} in the {key} {where}: only text can be trained on, as {{'type': 'text', 'text': ...}}.",
    )


def named_value(value: object) -> str:
    """What a value is that should be text, in words."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "null" if value is None else "NaN, a missing value"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"the {'number' if is_number else _kind(value)} {_short(value)}"


def _kind(value: object) -> str:
    return "object" if isinstance(value, Mapping) else type(value).__name__


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text[:_SHOWN] + ("..." if len(text) > _SHOWN else "")) if isinstance(value, str) else text[:_SHOWN]
