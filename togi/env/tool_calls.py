"""Tool calls in the text of an answer: the formats of model families, read and written.

A call that cannot be read is a problem, a sentence for the model. It is never an exception, and its text stays in the content.
Every reader goes forward over the text. One that fails may look as far as the end, so reading stops after ``MOST_PROBLEMS``
failures, and the time is linear in the length of the text.
Nothing is rendered or tokenised here (``render``), and no tool is called.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from togi.data.messages import ARGUMENTS, Tool
from togi.env.notation import Malformed, Values, escaped, json_value, notation, quoted, skip, until

MOST_CALLS, MOST_PROBLEMS = 128, 8
ID_LENGTH = 9  # what Mistral's templates demand


class CallFormat(StrEnum):
    """How a model family writes a call."""

    HERMES = "hermes"
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen 2.5 and 3, and models without a format."""
    XML = "xml"
    """<tool_call><function=name><parameter=key>value</parameter></function></tool_call>: Qwen3-Coder, Qwen 3.5."""
    LLAMA = "llama"
    """{"name": ..., "parameters": {...}}, maybe after <|python_tag|>; several with ";" between: Llama 3."""
    MISTRAL = "mistral"
    """[TOOL_CALLS] [{"name": ..., "arguments": {...}, "id": ...}]."""
    MISTRAL_ARGS = "mistral_args"
    """[TOOL_CALLS]name[ARGS]{...}, maybe with [CALL_ID]: Mistral since 2025."""
    GEMMA = "gemma"
    """A fenced block ``tool_code`` with JSON or a Python call: Gemma 3, which has no format of its own."""
    FUNCTION_GEMMA = "function_gemma"
    """<start_function_call>call:name{key:<escape>text<escape>}<end_function_call>."""
    GEMMA4 = "gemma4"
    """<|tool_call>call:name{key:<|"|>text<|"|>}<tool_call|>."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call. ``id``: as the model wrote it, or a digest of answer and place. ``source``: the arguments as written, if known."""

    name: str
    arguments: Mapping[str, Any]
    id: str
    source: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Parsed:
    """An answer in parts. ``problems``: one sentence for each call that cannot be read; its text is in ``content``."""

    content: str
    reasoning: str
    calls: tuple[ToolCall, ...]
    problems: tuple[str, ...]


# What a template says about its calls; the first that it contains decides.
_SIGNS = (
    ("<start_function_call>", CallFormat.FUNCTION_GEMMA),
    ("<|tool_call>", CallFormat.GEMMA4),
    ("[ARGS]", CallFormat.MISTRAL_ARGS),
    ("[TOOL_CALLS]", CallFormat.MISTRAL),
    ("<function=", CallFormat.XML),
    ("<tool_call>", CallFormat.HERMES),
    ("<|python_tag|>", CallFormat.LLAMA),
    ("<|start_header_id|>", CallFormat.LLAMA),
    ("<start_of_turn>", CallFormat.GEMMA),
)


def format_of(template: str) -> CallFormat:
    """The format that a chat template (Jinja text) shows; HERMES if it shows none."""
    return next((form for sign, form in _SIGNS if sign in template), CallFormat.HERMES)


# What a call begins with.
_OPENINGS = {
    CallFormat.HERMES: re.compile("<tool_call>"),
    CallFormat.XML: re.compile(r"<tool_call>\s*<function=|<function=|<tool_call>"),
    CallFormat.LLAMA: re.compile(r"<\|python_tag\|>"),
    CallFormat.MISTRAL: re.compile(r"\[TOOL_CALLS\]"),
    CallFormat.MISTRAL_ARGS: re.compile(r"\[TOOL_CALLS\]"),
    CallFormat.GEMMA: re.compile(r"```(?:tool_code|tool_call|json)(?=\s|$)"),
    CallFormat.FUNCTION_GEMMA: re.compile("<start_function_call>"),
    CallFormat.GEMMA4: re.compile(r"<\|tool_call>"),
}
_THINK, _BRACKETS, _CHANNEL = ("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>thought", "<channel|>")
_REASONING = {
    CallFormat.MISTRAL: (_THINK, _BRACKETS),
    CallFormat.MISTRAL_ARGS: (_BRACKETS, _THINK),
    CallFormat.GEMMA4: (_CHANNEL, _THINK),
}


def reasoning_tags(form: CallFormat) -> tuple[tuple[str, str], ...]:
    """The (opening, closing) tags of reasoning, the usual pair first."""
    return _REASONING.get(form, (_THINK,))


def parse(text: str, form: CallFormat, *, tools: Sequence[Tool] = (), thinking: bool = False) -> Parsed:
    """The parts of an answer.

    ``tools`` give the types of XML parameters, which are text. ``thinking``: the generation prompt has opened the reasoning.
    """
    reasoning, rest = _split(text, form, thinking)
    answer = _Answer(rest, form, _types(tools))
    _READERS[form](answer)
    # Equal answers get equal ids, so an answer is known by the ids of its calls.
    digest = call_id(text)
    calls = tuple(
        ToolCall(each.name, each.arguments, each.id or call_id(f"{number} {digest}"), each.source)
        for number, each in enumerate(answer.calls)
    )
    return Parsed("".join(answer.content).strip(), reasoning.strip(), calls, tuple(answer.problems))


def _split(text: str, form: CallFormat, thinking: bool) -> tuple[str, str]:
    """Reasoning, and what is around it. Reasoning that is not closed holds no call, so nothing follows it."""
    for opening, closing in reasoning_tags(form):
        inside, closed, after = text.partition(closing)
        # Without its opening tag, which then was in the prompt, reasoning is known by its end.
        before, opened, thought = inside.partition(opening)
        if opened and not before.strip():
            return thought, after
        if closed and (thinking or not _begins_call(before, form)):
            return (thought, before + after) if opened else (inside, after)
    return (text, "") if thinking else ("", text)


def _begins_call(text: str, form: CallFormat) -> bool:
    bare = form in (CallFormat.LLAMA, CallFormat.GEMMA) and _is_bare(text)
    return bare or _OPENINGS[form].search(text) is not None


def _is_bare(text: str) -> bool:
    return text.startswith(("{", "["), skip(text, 0))


def first_call(text: str, form: CallFormat) -> int:
    """Where the first call of an answer begins; its length if there is none."""
    if _begins_call(text, form) and _OPENINGS[form].search(text) is None:
        return 0
    found = _OPENINGS[form].search(text)
    return len(text) if found is None else found.start()


def call_id(text: str) -> str:
    """An id that is made of a text."""
    return hashlib.blake2b(text.encode(errors="surrogatepass")).hexdigest()[:ID_LENGTH]


def _types(tools: Sequence[Tool]) -> dict[tuple[str, str], str]:
    """The type of each parameter by the names of tool and parameter, where it is one word."""
    found = {}
    for tool in tools:
        function = tool.get("function", tool)
        function = function if isinstance(function, Mapping) else {}
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        for key, schema in (properties if isinstance(properties, Mapping) else {}).items():
            if isinstance(schema, Mapping) and isinstance(schema.get("type"), str):
                found[str(function["name"]), str(key)] = str(schema["type"]).lower()
    return found


class _NoCall(Exception):
    """A block that only looks like a call."""


class _Answer:
    """What has been read of a text."""

    def __init__(self, text: str, form: CallFormat, types: Mapping[tuple[str, str], str]) -> None:
        self.text, self.form, self.types = text, form, types
        self.content, self.calls, self.problems = list[str](), list[ToolCall](), list[str]()

    def problem(self, error: Malformed, *, cut: bool) -> None:
        number = len(self.calls) + len(self.problems) + 1
        why = "is cut off before its end" if cut else str(error)
        self.problems.append(f"Tool call {number} {why}. Write {_example(self.form)}.")

    def read(self, closing: str, resume: str | None, body: Callable[[_Answer, str, int], int]) -> None:
        """Read the calls that end with ``closing``. ``body`` reads from the opening on and returns where the call ends. After a
        mistake reading goes on after the pattern ``resume``, or not at all: what looks like a call may be in a string.
        """
        place, failures = 0, 0
        while (match := _OPENINGS[self.form].search(self.text, place)) is not None:
            if failures == MOST_PROBLEMS:
                self.problems.append("The rest of the answer has not been read.")
                break
            self.content.append(self.text[place : match.start()])
            known = len(self.calls)
            try:
                place = self._closed(body(self, match.group(), match.end()), closing)
            except _NoCall:
                place = match.end()
                self.content.append(match.group())
            except Malformed as error:
                # A block is one whole: calls before the mistake would be made twice if the model writes it again.
                del self.calls[known:]
                failures += 1
                end = None if resume is None else re.compile(resume).search(self.text, match.end())
                # What follows a string without an end may be part of it, and no call.
                place = end.end() if end is not None and not error.cut else len(self.text)
                self.problem(error, cut=end is None and (error.cut or bool(closing)))
                self.content.append(self.text[match.start() : place])
        self.content.append(self.text[place:])

    def _closed(self, place: int, closing: str) -> int:
        place = skip(self.text, place)
        if place < len(self.text) and not self.text.startswith(closing, place):
            raise Malformed(f"goes on after its arguments with {self.text[place : place + 20]!r}, not with {closing!r}")
        return min(place + len(closing), len(self.text))

    def add(self, found: object, source: str = "") -> None:
        """A call as an object with name and arguments. Raises Malformed."""
        if not isinstance(found, Mapping):
            raise Malformed("is no object")
        if len(self.calls) == MOST_CALLS:
            raise Malformed(f"comes after {MOST_CALLS} others, which is too many")
        function = found["function"] if isinstance(found.get("function"), Mapping) else found
        name, wanted = function.get("name"), found.get("id")
        if not isinstance(name, str) or not name.strip():
            raise Malformed("has no name")
        arguments = next((function[key] for key in ARGUMENTS if key in function), None)
        if isinstance(arguments, str) and arguments.strip():
            arguments, _ = json_value(arguments, 0)
        arguments = {} if arguments is None or arguments == "" else arguments
        if not isinstance(arguments, Mapping):
            raise Malformed("has arguments that are no object")
        _check_unicode(name, arguments)
        self.calls.append(ToolCall(name.strip(), arguments, wanted if isinstance(wanted, str) else "", source))


def _check_unicode(name: str, arguments: object) -> None:
    try:
        json.dumps([name, arguments], ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # half of a surrogate pair
        raise Malformed("has arguments that are not valid Unicode, or too deep") from None


def _json_calls(answer: _Answer, _: str, place: int) -> int:
    """Objects one after the other, or lists of them; at least one."""
    place = skip(answer.text, place)
    known = len(answer.calls)
    while len(answer.calls) == known or answer.text.startswith("{", place):
        found, end = json_value(answer.text, place)
        for each in _listed(found):
            answer.add(each)
        place = skip(answer.text, end, also=",;")
        if found == []:
            break
    return place


def _listed(found: object) -> list[object]:
    return found if isinstance(found, list) else [found]


def _read_hermes(answer: _Answer) -> None:
    answer.read("</tool_call>", "</tool_call>", _json_calls)


def _read_xml(answer: _Answer) -> None:
    # Some models leave out the tag around.
    answer.read("", "</tool_call>|(?=<tool_call>)", _xml_call)


def _xml_call(answer: _Answer, opening: str, place: int) -> int:
    text = answer.text
    if not opening.endswith("<function="):
        raise Malformed("does not begin with <function=NAME>", cut=skip(text, place) >= len(text))
    name, place = until(text, place, ">")
    arguments = dict[str, object]()
    while text.startswith("<parameter=", place := skip(text, place)):
        key, place = until(text, place + len("<parameter="), ">")
        value, place = until(text, place, "</parameter>")
        arguments[key.strip()] = _typed(value, answer.types.get((name.strip(), key.strip()), ""))
    for closing in ("</function>", "</tool_call>") if opening.startswith("<tool_call>") else ("</function>",):
        place = skip(text, place)
        if not text.startswith(closing, place):
            raise Malformed(f"does not end with {closing}", cut=place >= len(text))
        place += len(closing)
    answer.add({"name": name, "arguments": arguments})
    return place


def _typed(text: str, kind: str) -> object:
    """A parameter of the XML format: text for the type ``string``, else JSON, else text."""
    text = text.removeprefix("\n").removesuffix("\n")
    if kind == "string":
        return text
    if kind == "boolean" and text in ("True", "False"):
        return text == "True"
    try:
        value, end = json_value(text.strip(), 0)
    except Malformed:
        return text
    return value if end == len(text.strip()) else text


_BEGUN = re.compile(r'\s*\[?\s*\{\s*"(name"|type"\s*:\s*"function")')


def _read_llama(answer: _Answer) -> None:
    if "<|python_tag|>" in answer.text and not _is_bare(answer.text):
        answer.read("", None, _json_calls)
    else:
        _read_bare(answer)


def _read_bare(answer: _Answer) -> None:
    """An answer that is nothing but calls as JSON. Other JSON is content."""
    text, found = answer.text, list[object]()
    place = skip(text, 0)
    try:
        while text.startswith(("{", "["), place):
            value, end = json_value(text, place)
            found += _listed(value)
            place = skip(text, end, also=",;")
        if found and all(map(_is_call, found)):
            for each in found:
                answer.add(each)
            answer.content.append(text[place:])
            return
    except Malformed as error:
        answer.calls.clear()
        if found or _BEGUN.match(text):
            answer.problem(error, cut=error.cut)
    answer.content.append(text)


def _is_call(found: object) -> bool:
    """Whether an object is meant as a call, be it complete or not."""
    if not isinstance(found, Mapping):
        return False
    return "arguments" in found or "parameters" in found or {"name"} <= found.keys() <= {"name", "type", "id"}


def _read_mistral(answer: _Answer) -> None:
    answer.read("", None, _mistral_calls)


def _mistral_calls(answer: _Answer, opening: str, place: int) -> int:
    """Both of Mistral's formats: a list of objects, or a name and its arguments."""
    text, place = answer.text, skip(answer.text, place)
    if re.compile(r"\{|\[\s*[{\]]").match(text, place):
        return _json_calls(answer, opening, place)
    match = re.compile(r"([^\s\[{]+)\s*(?:\[CALL_ID\]([^\s\[{]*))?\s*(?:\[ARGS\])?\s*").match(text, place)
    if match is None:
        raise Malformed("has no name", cut=place >= len(text))
    arguments, end = json_value(text, match.end())
    answer.add({"name": match[1], "arguments": arguments, "id": match[2]}, text[match.end() : end])
    return end


_FENCE = "```"


def _read_gemma(answer: _Answer) -> None:
    if _FENCE in answer.text and not _is_bare(answer.text):
        answer.read(_FENCE, _FENCE, _fenced)
    else:
        _read_bare(answer)


def _fenced(answer: _Answer, opening: str, place: int) -> int:
    text, place = answer.text, skip(answer.text, place)
    if opening == _FENCE + "json" and not _BEGUN.match(text, place):
        # JSON that is no call is content, be it valid or not.
        try:
            found, _ = json_value(text[place : text.find(_FENCE, place)], 0)
        except Malformed:
            found = None
        if not all(map(_is_call, _listed(found))):
            raise _NoCall
    if re.compile(r"\{|\[\s*\{").match(text, place):
        return _json_calls(answer, opening, place)
    # Python: a call, one within print, or a list of calls.
    known, listed = len(answer.calls), text.startswith("[", place)
    place += listed
    while (match := re.compile(r"[\s,]*(print\(\s*)?([A-Za-z_][\w.]*)\(").match(text, place)) is not None:
        arguments, place = Values(text).pairs(match.end(), ")")
        answer.add({"name": match[2].removeprefix("default_api."), "arguments": arguments})
        place = skip(text, place)
        place += bool(match[1]) and text.startswith(")", place)
    if len(answer.calls) == known:
        raise Malformed("is neither JSON nor a Python call with named arguments", cut=place >= len(text))
    return skip(text, place, also="]" if listed else "")


def _read_delimited(closing: str, delimiter: str) -> Callable[[_Answer], None]:
    """The format of Gemma's later models: strings stand between two equal tokens."""

    def call(answer: _Answer, _: str, place: int) -> int:
        match = re.compile(r"\s*call:\s*([^\s{}]+)\s*\{").match(answer.text, place)
        if match is None:
            raise Malformed("does not begin with call:NAME{")
        arguments, end = Values(answer.text, delimiter).pairs(match.end(), "}")
        answer.add({"name": match[1], "arguments": arguments}, answer.text[match.end() : end - 1])
        return end

    return lambda answer: answer.read(closing, re.escape(closing), call)


# What stands before and after a string.
_ESCAPE, _QUOTE = "<escape>", '<|"|>'
_READERS: dict[CallFormat, Callable[[_Answer], None]] = {
    CallFormat.HERMES: _read_hermes,
    CallFormat.XML: _read_xml,
    CallFormat.LLAMA: _read_llama,
    CallFormat.MISTRAL: _read_mistral,
    CallFormat.MISTRAL_ARGS: _read_mistral,
    CallFormat.GEMMA: _read_gemma,
    CallFormat.FUNCTION_GEMMA: _read_delimited("<end_function_call>", _ESCAPE),
    CallFormat.GEMMA4: _read_delimited("<tool_call|>", _QUOTE),
}


def written(call: ToolCall, form: CallFormat) -> str:
    """A call in its format, as a chat template writes it."""
    name, arguments = quoted(call.name), json.dumps(call.arguments, ensure_ascii=False)
    match form:
        case CallFormat.HERMES:
            text = f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'
        case CallFormat.XML:
            lines = (f"<parameter={key}>\n{_plain(value)}\n</parameter>\n" for key, value in call.arguments.items())
            text = f"<tool_call>\n<function={call.name}>\n{''.join(lines)}</function>\n</tool_call>"
        case CallFormat.LLAMA:
            text = f'{{"name": {name}, "parameters": {arguments}}}'
        case CallFormat.MISTRAL:
            text = f'[TOOL_CALLS] [{{"name": {name}, "arguments": {arguments}, "id": {quoted(call.id)}}}]'
        case CallFormat.MISTRAL_ARGS:
            text = f"[TOOL_CALLS]{call.name}[ARGS]{arguments}"
        case CallFormat.GEMMA:
            text = f'```tool_code\n{{"name": {name}, "parameters": {arguments}}}\n```'
        case CallFormat.FUNCTION_GEMMA:
            text = f"<start_function_call>call:{call.name}{notation(call.arguments, _ESCAPE)}<end_function_call>"
        case CallFormat.GEMMA4:
            text = f"<|tool_call>call:{call.name}{notation(call.arguments, _QUOTE)}<tool_call|>"
    return text


def _plain(value: object) -> str:
    """A parameter of the XML format: text as it is, unless it would be read as something else."""
    if isinstance(value, str) and "</parameter>" not in value and _typed(f"\n{value}\n", "") == value:
        return value
    return escaped(value)


def _example(form: CallFormat) -> str:
    return written(ToolCall("NAME", {"ARGUMENT": "VALUE"}, "0" * ID_LENGTH), form)


def instructions(tools: Sequence[Tool], form: CallFormat) -> str:
    """System text that explains the tools, for templates that leave them out."""
    listed = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    return (
        f"You can call these tools, each described by a JSON schema:\n{listed}\n\nTo call a tool, write\n{_example(form)}\n"
        "with its name and arguments, and end your answer. The next message is what the tool returned."
    )
