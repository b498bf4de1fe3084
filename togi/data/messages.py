"""Convert conversations of rows to one form: messages with a known role and text as content, and their tools.

Rows come in several dialects: OpenAI's, ShareGPT's ``from`` and ``value``, content in parts, lists exported as text, a single
message instead of a list, columns instead of messages. Each is recognised and noted (``Note``); anything else is a fault.
Nothing is formatted here (``chat``); ``turns`` decides what is trained.

Tools and tool calls of a row, converted to the form of chat templates (OpenAI's), with arguments as objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from togi.data.faults import Drop, Note, kind, named_value, of_field, parsed, short
from togi.data.tables import Row

Message: TypeAlias = Mapping[str, Any]
Tool: TypeAlias = Mapping[str, object]

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
ROLES = frozenset({SYSTEM, "developer", USER, ASSISTANT, TOOL})
# Names of user and assistant in other data sets.
SPEAKERS = dict.fromkeys(("human", "prompter"), USER)
SPEAKERS |= dict.fromkeys(("gpt", "chatgpt", "model", "bot", "chatbot", "ai"), ASSISTANT)
# Names of the tool role in other data sets. A template that knows the name keeps it.
ANSWERERS = dict.fromkeys(("observation", "tool_response", "function_response", "function", "ipython"), TOOL)
# Roles of an assistant turn that is only a call, as JSON text.
CALLERS = frozenset({"function_call", "tool_call"})
REASONING = ("reasoning_content", "reasoning", "thinking")
# Marks of a turn that is not trained: OpenAI's weight, and other names for it.
MARKS = {"weight": (0, 1), "train": (False, True), "trainable": (False, True)}
TOOLS, FUNCTIONS = "tools", "functions"
# Fields of a row that belong to the formatted prompt besides the messages.
SYSTEM_FIELDS = (SYSTEM, "system_prompt")
FRAME = (TOOLS, FUNCTIONS, *SYSTEM_FIELDS)
_SHARED = {"from": "role", "value": "content"}
# The types of a text part in OpenAI's two interfaces.
_TEXTS = ("text", "input_text", "output_text")
_MESSAGE_FORM = "write {'role': 'user', 'content': ...}."


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Messages in one form, the tools for the template, and notes on what was converted."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    notes: frozenset[Note] = frozenset()

    def extended(self, other: Dialogue) -> Dialogue:
        """These messages followed by the others, with the same tools."""
        return Dialogue((*self.messages, *other.messages), self.tools, self.notes | other.notes)

    def parted(self) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
        """The system turn at the start, if any, and the other turns."""
        cut = 1 if self.messages and self.messages[0]["role"] in (SYSTEM, "developer") else 0
        return self.messages[:cut], self.messages[cut:]

    @property
    def tool_names(self) -> list[str]:
        """The names of the tools."""
        return [str(_function(tool)["name"]) for tool in self.tools]

    def until(self, turn: int) -> Dialogue:
        """The messages before this one, with the same tools."""
        return Dialogue(self.messages[:turn], self.tools)


NO_FRAME = Dialogue(())


def dialogue_of(value: object, role: str, template: str | None, frame: Dialogue = NO_FRAME) -> Dialogue:
    """The messages of a field: a string is one message of ``role``, anything else must be messages. Raises RowError.

    ``template``: the text of the chat template; roles that it names are known, and without a template every role is. ``frame``:
    tools and system turn that the row has in separate fields.
    """
    found, notes = value, set(frame.notes)
    # Undo each dialect, outermost first: text, a bare string, content parts, a single object.
    if isinstance(value, str):
        found = parsed(value, is_message)
        notes |= set() if isinstance(found, str) else {Note.AS_TEXT}
    if isinstance(found, str) or (isinstance(found, list) and found and all(_is_part(item) for item in found)):
        found = [{"role": role, "content": found}]
    if isinstance(found, Mapping):
        found = [{"role": role, "content": [found]}] if _is_part(found) else _rows_of(found)
        notes.add(Note.ONE_MESSAGE)
    if not isinstance(found, Sequence):
        raise Drop.WRONG_TYPE.error(f"is {named_value(value)}: it must be a string or a list of messages.")
    messages = tuple(_message(message, number, template, notes) for number, message in enumerate(found))
    dialogue = Dialogue(messages, frame.tools, frozenset(notes))
    # A system turn in the messages wins over the one in a separate field.
    return dialogue if dialogue.parted()[0] else replace(dialogue, messages=(*frame.messages, *messages))


def frame_of(row: Row) -> Dialogue:
    """Tools (``tools`` or the older ``functions``) and system turn (``system``) in separate fields of a row.

    Raises RowError.
    """
    for name in SYSTEM_FIELDS:
        if row.get(name) and not isinstance(row[name], str):
            raise Drop.WRONG_TYPE.error(
                f"the field {name!r} is {named_value(row[name])}: it is read as the system turn and must be a string; correct "
                "it, or rename the field if it is something else."
            )
    notes, functions = set[Note](), row.get(FUNCTIONS)
    with of_field(TOOLS):
        tools = read_tools(row.get(TOOLS), notes)
        if not tools and isinstance(functions, list) and call_list(functions) is not None:
            tools = read_tools(functions, notes)
    system = next((row[name] for name in SYSTEM_FIELDS if row.get(name)), None)
    if system is None or not system.strip():
        return Dialogue((), tools, frozenset(notes))
    return Dialogue(({"role": SYSTEM, "content": system},), tools, frozenset(notes | {Note.SYSTEM_FIELD}))


def reasoning_of(message: Message) -> list[str]:
    """The reasoning of the assistant, where the row keeps it outside the content."""
    return [message[key] for key in REASONING if message.get(key)]


def is_marked_off(message: Message) -> bool:
    """Whether a turn is marked as not trained."""
    return any(key in message and not message[key] for key in MARKS)


def without_answers(dialogue: Dialogue) -> Dialogue:
    """A prompt without the assistant turns at its end, which the model must write."""
    messages = dialogue.messages
    end = next((end for end in range(len(messages), 0, -1) if messages[end - 1]["role"] != ASSISTANT), 0)
    if end == len(messages):
        return dialogue
    return replace(dialogue, messages=messages[:end], notes=dialogue.notes | {Note.ANSWER_LEFT_OUT})


def holds_messages(value: object) -> bool:
    """Whether a table value is a message or a list of messages."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and ("role" in first or "from" in first)


def unfilled(value: object) -> object:
    """A value without null keys at any depth: a table gives every row the keys that any row has."""
    if isinstance(value, Mapping):
        return {key: unfilled(item) for key, item in value.items() if item is not None}
    return [unfilled(item) for item in value] if isinstance(value, list) else value


def holds_text(value: object) -> bool:
    """Whether a value is a text that stands for no messages. Raises RowError for broken ones."""
    return isinstance(value, str) and isinstance(parsed(value, is_message), str)


def is_message(item: Mapping[str, object]) -> bool:
    """Whether an object that was written as text is a message."""
    return ("role" in item or "from" in item) and bool({"content", "value", "tool_calls"} & item.keys())


def _is_part(item: object) -> bool:
    """Whether an item is a part of content, not a message."""
    if not isinstance(item, Mapping) or "role" in item or "from" in item:
        return False
    return "type" in item or item.keys() == {"text"}


def _rows_of(found: Mapping[str, object]) -> list[Mapping[str, object]]:
    """A single message as a list; a table of messages (a list for each key) as its rows."""
    columns = {key: column for key, column in found.items() if isinstance(column, list)}
    sizes = {len(column) for column in columns.values()}
    if len(sizes) == 1 and len(columns) == len(found) and ("role" in columns or "from" in columns):
        return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return [found]


def _message(message: object, number: int, template: str | None, notes: set[Note]) -> Message:
    """One message in the common form. Other keys than role and content stay, since a template may use them."""
    where = f"in its message {number}"
    if not isinstance(message, Mapping):
        raise Drop.WRONG_ROLES.error(f"has no role and content {where} ({short(message)}): {_MESSAGE_FORM}")
    kept = {key: item for key, item in message.items() if item is not None or key == "content"}
    for written, name in _SHARED.items():
        if written in kept and kept.get(name) is None:
            kept[name] = kept.pop(written)
            notes.add(Note.SHAREGPT)
    role = kept.get("role")
    if not isinstance(role, str):
        keys = ", ".join(map(repr, message)) or "none"
        raise Drop.WRONG_ROLES.error(f"has no role and content {where} (its keys: {keys}): {_MESSAGE_FORM}")
    # Role and calls first: whether content may be missing depends on them.
    _settle_role(kept, role, where, template, notes)
    settle_calls(kept, where, notes)
    for key in REASONING:
        if key in kept:
            kept[key] = _text(kept, key, where, notes)
    _check_marks(kept, where, notes)
    speaks_otherwise = kept["role"] == ASSISTANT and bool(kept.get("tool_calls") or reasoning_of(kept))
    if speaks_otherwise and kept.get("content") is None:
        kept["content"] = ""
    if "content" not in kept:
        keys = ", ".join(map(repr, message))
        raise Drop.WRONG_ROLES.error(f"has no content {where} (its keys: {keys}): {_MESSAGE_FORM}")
    kept["content"] = _text(kept, "content", where, notes)
    # A template would write the reasoning twice.
    if "</think>" in kept["content"] and reasoning_of(kept):
        raise Drop.WRONG_ROLES.error(
            f"has reasoning both in its content and beside it {where}: keep it in one of the two places."
        )
    return kept


def _settle_role(kept: dict[str, object], written: str, where: str, template: str | None, notes: set[Note]) -> None:
    """Give the message a known role, in place. Raises RowError for an unknown one."""
    name = written.strip().lower()
    if written in ROLES or (written not in SPEAKERS and _is_asked_for(written, template)):
        return
    # A turn that is only a call becomes an assistant turn with that call.
    if name in CALLERS:
        calls = call_list(kept.get("content"))
        if calls is None:
            raise Drop.WRONG_ROLES.error(
                f"has the role {written!r} {where}, but its content is not a call ({short(kept.get('content'))}): write "
                "{'name': ..., 'arguments': {...}} as JSON."
            )
        kept |= {"role": ASSISTANT, "content": None, "tool_calls": calls}
    else:
        role = SPEAKERS.get(name) or ANSWERERS.get(name) or name
        if role not in ROLES and template is None:
            return
        if role not in ROLES:
            raise Drop.WRONG_ROLES.error(
                f"has the unknown role {written!r} {where}: write system, user, assistant or tool, or use a chat template "
                "that names this role."
            )
        kept["role"] = role
    notes.add(Note.ALIAS)


def _is_asked_for(role: str, template: str | None) -> bool:
    """Whether the template compares the role of a message with this one."""
    asked = rf"role\b[^%{{}}]*?(==|\bin\b)[^%{{}}]*?['\"]{re.escape(role)}['\"]"
    return bool(role) and template is not None and re.search(asked, template) is not None


def _check_marks(kept: Message, where: str, notes: set[Note]) -> None:
    for key, allowed in MARKS.items():
        if key in kept and kept[key] not in allowed:
            raise Drop.WRONG_LABELS.error(
                f"has the {key} {short(kept[key])} {where}: a turn is learned or not, write {allowed[1]} or {allowed[0]}."
            )
    if kept["role"] == ASSISTANT and is_marked_off(kept):
        notes.add(Note.MARKED_OFF)


def _text(message: Message, key: str, where: str, notes: set[Note]) -> str:
    """The text of a string or of text parts. Raises RowError naming anything else."""
    value = message[key]
    if isinstance(value, str):
        return value
    if isinstance(value, list) or (_is_part(value) and value.get("type", "text") in _TEXTS):
        notes.add(Note.PARTS)
        return "".join(_part(part, key, where) for part in (value if isinstance(value, list) else [value]))
    raise Drop.WRONG_TYPE.error(
        f"has {key} that is {named_value(value)} {where} (role {message['role']}): it must be a string, "
        "correct or remove the row."
    )


def _part(part: object, key: str, where: str) -> str:
    if isinstance(part, str):
        return part
    what = named_value(part)
    if isinstance(part, Mapping):
        keys = [name for name, item in part.items() if item is not None]
        is_text = part["type"] in _TEXTS if "type" in keys else keys == ["text"]
        if is_text and isinstance(part.get("text"), str):
            return str(part["text"])
        has_type = "type" in keys and not is_text
        what = f"of type {part['type']!r}" if has_type else f"with the keys {', '.join(map(repr, keys))}"
    raise Drop.WRONG_TYPE.error(
        f"has a part {what} in the {key} {where}: only text can be trained on, as {{'type': 'text', 'text': ...}}."
    )


# The names of a call's arguments in other interfaces.
ARGUMENTS = ("arguments", "parameters", "input", "args")
_CALL_FORM = "write a list of {'type': 'function', 'function': {'name': ..., 'arguments': {...}}}."
_TOOL_FORM = (
    "but the field 'tools' goes to the chat template: write a list of {'type': 'function', 'function': {'name': ..., "
    "'description': ..., 'parameters': ...}}, or rename the field if it means something else."
)


def read_tools(value: object, notes: set[Note]) -> tuple[Tool, ...]:
    """The tools of a row, given as a list, a single tool, or either as JSON text. Raises RowError for anything else."""
    found = value
    if found is None or (isinstance(found, str) and found.strip() in ("", "[]", "null", "None")):
        return ()
    if isinstance(found, str):
        found = parsed(found, _has_name)
        notes.add(Note.AS_TEXT)
    found = [found] if isinstance(found, Mapping) else found
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise Drop.WRONG_TYPE.error(f"is {short(value)}, {_TOOL_FORM}")
    return tuple(_tool(each, number, notes) for number, each in enumerate(found))


def _tool(value: object, number: int, notes: set[Note]) -> Tool:
    tool = value
    if isinstance(tool, str):
        tool = parsed(tool, _has_name)
        notes.add(Note.AS_TEXT)
    if not isinstance(tool, Mapping) or not _has_name(tool):
        raise Drop.WRONG_TYPE.error(f"has the entry {number} {short(value)}, {_TOOL_FORM}")
    return dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}


def settle_calls(message: dict[str, object], where: str, notes: set[Note]) -> None:
    """Convert the calls of a message to one form, in place. Raises RowError."""
    value = message.pop("tool_calls", None)
    old = message.get("function_call") if message["role"] == "assistant" else None
    if not value and old:
        value = old if isinstance(old, str) else [old]
        del message["function_call"]
        notes.add(Note.CALL)
    if isinstance(value, str):
        value = call_list(value) or value
    calls = [value] if isinstance(value, Mapping) else value
    if not calls:
        return
    if isinstance(calls, str) or not isinstance(calls, Sequence):
        raise Drop.WRONG_TYPE.error(f"has tool_calls of type {kind(calls)} {where}: {_CALL_FORM}")
    message["tool_calls"] = [_call(call, f"{where} (call {number})", notes) for number, call in enumerate(calls)]


def call_list(content: object) -> list[Tool] | None:
    """A call or a list of calls, given as an object or as text; None for anything else."""
    value = parsed(content, _has_name) if isinstance(content, str) else content
    calls = value if isinstance(value, list) else [value]
    named = [call for call in calls if isinstance(call, Mapping) and _has_name(call)]
    return named if named and len(named) == len(calls) else None


def _call(call: object, where: str, notes: set[Note]) -> dict[str, object]:
    found = call_list(call)
    if found is None or len(found) != 1:
        raise Drop.WRONG_TYPE.error(f"has a tool call without the name of a function {where}: {_CALL_FORM}")
    # Arguments: one of several names, an object or JSON text.
    (record,) = found
    function = dict(_function(record))
    names = [name for name in ARGUMENTS if name in function]
    if len(names) > 1:
        listed = " and ".join(map(repr, names))
        raise Drop.WRONG_TYPE.error(f"has {listed} {where}: keep one of them, as 'arguments'.")
    if names and names[0] != "arguments":
        notes.add(Note.CALL)
    arguments = function.pop(names[0]) if names else None
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise Drop.WRONG_TYPE.error(
                f"has arguments that are not JSON ({short(arguments)}) {where}: correct or remove the row."
            ) from None
    arguments = {} if arguments is None or arguments == "" else arguments
    if not isinstance(arguments, Mapping):
        raise Drop.WRONG_TYPE.error(f"has arguments of type {kind(arguments)} {where}: {_CALL_FORM}")
    # Other fields of the call (its id) stay.
    outer = {key: item for key, item in record.items() if key not in (*ARGUMENTS, "name", "function")}
    return {"type": "function", **outer, "function": {**function, "arguments": dict(arguments)}}


def call_names(message: Message) -> list[str]:
    """The names of the functions that a message calls."""
    return [str(call["function"]["name"]) for call in message.get("tool_calls", ())]


def argument_texts(message: Message) -> Iterator[tuple[str, str]]:
    """Each value in the arguments of a message's calls, as text and as JSON. Skips booleans and null, which have no fixed text."""
    for call in message.get("tool_calls", ()):
        for value in _leaves(call["function"]["arguments"]):
            yield str(value), json.dumps(value, ensure_ascii=False).strip('"')


def _leaves(value: object) -> Iterator[str | int | float]:
    if isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(item)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield value


def _function(tool: Tool) -> Mapping[str, object]:
    """The function of a tool or a call. Some rows lack the wrapping object, and some write the function as text."""
    inner = tool.get("function", tool)
    if isinstance(inner, str):
        inner = parsed(inner, lambda record: isinstance(record.get("name"), str))
    return inner if isinstance(inner, Mapping) else {}


def _has_name(tool: Tool) -> bool:
    return isinstance(_function(tool).get("name"), str)
