"""Tools and tool calls of a row, converted to the form of chat templates (OpenAI's), with arguments as objects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from togi.data.faults import Drop, Note, RowError
from togi.data.written import kind, parsed, short

Tool: TypeAlias = Mapping[str, Any]

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
    if isinstance(found, str):
        if found.strip() in ("", "[]", "null", "None"):
            return ()
        found = parsed(found, _has_name)
        notes.add(Note.AS_TEXT)
    if found is None:
        return ()
    found = [found] if isinstance(found, Mapping) else found
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise RowError(Drop.WRONG_TYPE, f"is {short(value)}, {_TOOL_FORM}")
    return tuple(_tool(each, number, notes) for number, each in enumerate(found))


def _tool(value: object, number: int, notes: set[Note]) -> Tool:
    tool = value
    if isinstance(tool, str):
        tool = parsed(tool, _has_name)
        notes.add(Note.AS_TEXT)
    if not isinstance(tool, Mapping) or not _has_name(tool):
        raise RowError(Drop.WRONG_TYPE, f"has the entry {number} {short(value)}, {_TOOL_FORM}")
    return dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}


def tool_names(tools: Sequence[Tool]) -> list[str]:
    """The names of the tools."""
    return [str(_function(tool)["name"]) for tool in tools]


def is_tools(value: object) -> bool:
    """Whether a value is a list of tools and nothing else."""
    return (
        isinstance(value, list) and bool(value) and all(isinstance(tool, Mapping) and _has_name(tool) for tool in value)
    )


def settle_calls(message: dict[str, Any], where: str, notes: set[Note]) -> None:
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
        raise RowError(Drop.WRONG_TYPE, f"has tool_calls of type {kind(calls)} {where}: {_CALL_FORM}")
    message["tool_calls"] = [_call(call, f"{where} (call {number})", notes) for number, call in enumerate(calls)]


def call_list(content: object) -> list[Mapping[str, Any]] | None:
    """A call or a list of calls, given as an object or as text; None for anything else."""
    value = parsed(content, _has_name) if isinstance(content, str) else content
    calls = value if isinstance(value, list) else [value]
    named = [call for call in calls if isinstance(call, Mapping) and _has_name(call)]
    return named if named and len(named) == len(calls) else None


def _call(call: object, where: str, notes: set[Note]) -> dict[str, Any]:
    found = call_list(call)
    if found is None or len(found) != 1:
        raise RowError(Drop.WRONG_TYPE, f"has a tool call without the name of a function {where}: {_CALL_FORM}")
    # Arguments: one of several names, an object or JSON text.
    (record,) = found
    function = dict(_function(record))
    names = [name for name in ARGUMENTS if name in function]
    if len(names) > 1:
        listed = " and ".join(map(repr, names))
        raise RowError(Drop.WRONG_TYPE, f"has {listed} {where}: keep one of them, as 'arguments'.")
    if names and names[0] != "arguments":
        notes.add(Note.CALL)
    arguments = function.pop(names[0]) if names else None
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise RowError(
                Drop.WRONG_TYPE,
                f"has arguments that are not JSON ({short(arguments)}) {where}: correct or remove the row.",
            ) from None
    arguments = {} if arguments is None or arguments == "" else arguments
    if not isinstance(arguments, Mapping):
        raise RowError(Drop.WRONG_TYPE, f"has arguments of type {kind(arguments)} {where}: {_CALL_FORM}")
    # Other fields of the call (its id) stay.
    outer = {key: item for key, item in record.items() if key not in (*ARGUMENTS, "name", "function")}
    return {"type": "function", **outer, "function": {**function, "arguments": dict(arguments)}}


def call_names(message: Mapping[str, Any]) -> list[str]:
    """The names of the functions that a message calls."""
    return [str(call["function"]["name"]) for call in message.get("tool_calls", ())]


def argument_texts(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each value in the arguments of a message's calls, as text and as JSON. Skips booleans and null, which have no fixed text."""
    for call in message.get("tool_calls", ()):
        for value in _leaves(call["function"]["arguments"]):
            yield str(value), json.dumps(value, ensure_ascii=False).strip('"')


def _leaves(value: object) -> Iterator[str | int | float]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield value


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool or a call. Some rows lack the wrapping object, and some write the function as text."""
    inner = tool.get("function", tool)
    if isinstance(inner, str):
        inner = parsed(inner, lambda record: isinstance(record.get("name"), str))
    return inner if isinstance(inner, Mapping) else {}


def _has_name(tool: Mapping[str, Any]) -> bool:
    return isinstance(_function(tool).get("name"), str)
