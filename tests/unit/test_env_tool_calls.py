"""Tool calls in text: every format there and back, what models write beside it, and that reading is linear."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chat_templates import FOLDER, TOOL
from togi.env.tool_calls import (
    MOST_CALLS,
    MOST_PROBLEMS,
    CallFormat,
    Parsed,
    ToolCall,
    format_of,
    instructions,
    parse,
    written,
)

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,12}", fullmatch=True)
# Text with the marks of all formats in it.
TAGS = """</tool_call> <tool_call> </parameter> <parameter=a> </function> [TOOL_CALLS] [ARGS] ``` <escape> <|"|> <tool_call|>
<think> </think> [/THINK] <|channel>thought <|python_tag|> { } " \\"""
MARKS = st.sampled_from([*TAGS.split(), "\n"])
# Half of a surrogate pair is no text.
TEXT = st.lists(MARKS | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=4).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
CALLS = st.builds(ToolCall, NAMES, st.dictionaries(NAMES, VALUES, max_size=4), st.just("abcdef123"))


def meant(parsed: Parsed) -> list[tuple[str, Mapping[str, Any]]]:
    assert parsed.problems == ()
    return [(call.name, call.arguments) for call in parsed.calls]


@pytest.mark.parametrize("form", CallFormat)
@settings(max_examples=80, deadline=None)
@given(call=CALLS)
def test_a_written_call_is_read_as_it_was(form: CallFormat, call: ToolCall) -> None:
    parsed = parse(written(call, form), form)
    assert meant(parsed) == [(call.name, call.arguments)]
    # equality of Python does not tell 1 from True and 1.0
    assert repr(dict(parsed.calls[0].arguments)) == repr(dict(call.arguments))
    assert (parsed.content, parsed.reasoning) == ("", "")
    assert form is not CallFormat.MISTRAL or parsed.calls[0].id == call.id


@pytest.mark.parametrize("form", CallFormat)
@settings(max_examples=60, deadline=None)
@given(text=TEXT | st.lists(MARKS, max_size=12).map("".join), thinking=st.booleans())
def test_any_text_is_read_without_an_exception(form: CallFormat, text: str, thinking: bool) -> None:
    parsed = parse(text, form, thinking=thinking)
    assert all(problem.endswith(".") and problem.count("\n") <= 6 for problem in parsed.problems)


@pytest.mark.parametrize("form", CallFormat)
@settings(max_examples=40, deadline=None)
@given(call=CALLS, data=st.data())
def test_a_call_that_is_cut_off_is_a_problem(form: CallFormat, call: ToolCall, data: st.DataObject) -> None:
    whole = written(call, form)
    parsed = parse(whole[: data.draw(st.integers(1, len(whole)))], form)
    # Either it is all there (but for its closing tag), or it is none: no argument is ever cut.
    assert all((each.name, each.arguments) == (call.name, call.arguments) for each in parsed.calls)
    assert len(parsed.calls) <= 1  # arguments may hold the words of a format, which are then problems of their own


HERMES, XML, LLAMA, MISTRAL = CallFormat.HERMES, CallFormat.XML, CallFormat.LLAMA, CallFormat.MISTRAL
GEMMA, FUNCTION_GEMMA, GEMMA4 = CallFormat.GEMMA, CallFormat.FUNCTION_GEMMA, CallFormat.GEMMA4
OSLO = ("weather", {"city": "Oslo"})
JSON = '{"name": "weather", "arguments": {"city": "Oslo"}}'
# What models write: the answer, and its content, reasoning and calls.
WILD: list[tuple[CallFormat, str, str, str, list[tuple[str, dict[str, Any]]]]] = [
    (HERMES, "no call at all", "no call at all", "", []),
    (HERMES, f"I look.\n<tool_call>\n{JSON}\n</tool_call>", "I look.", "", [OSLO]),
    (HERMES, f"<tool_call>{JSON}</tool_call>\n<tool_call>{JSON}</tool_call>", "", "", [OSLO, OSLO]),
    (HERMES, f"<tool_call>{JSON}\n{JSON}</tool_call>", "", "", [OSLO, OSLO]),
    (HERMES, f"<tool_call>[{JSON}, {JSON}]</tool_call>", "", "", [OSLO, OSLO]),
    (HERMES, f"<tool_call>{JSON}", "", "", [OSLO]),
    (HERMES, '<tool_call>{"name": "now"}</tool_call>', "", "", [("now", {})]),
    (HERMES, '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", "", [("now", {})]),
    (HERMES, '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}</tool_call>', "", "", [OSLO]),
    (HERMES, f'<tool_call>{{"type": "function", "function": {JSON}}}</tool_call>', "", "", [OSLO]),
    (
        HERMES,
        '<tool_call>{"name": "say", "arguments": {"text": "a\nb"}}</tool_call>',
        "",
        "",
        [("say", {"text": "a\nb"})],
    ),
    (
        HERMES,
        f"<think>\nhm <tool_call>{JSON}</tool_call>\n</think>\n\nNo.",
        "No.",
        f"hm <tool_call>{JSON}</tool_call>",
        [],
    ),
    (HERMES, f"<think>hm <tool_call>{JSON}</tool_call>", "", f"hm <tool_call>{JSON}</tool_call>", []),
    (HERMES, "hm\n</think>\n\nYes.", "Yes.", "hm", []),
    (HERMES, f"Well. <think>hm</think><tool_call>{JSON}</tool_call>", "Well.", "hm", [OSLO]),
    (
        XML,
        "<think>\nhm\n</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
        "",
        "hm",
        [OSLO],
    ),
    (XML, "<function=weather><parameter=city>Oslo</parameter></function>", "", "", [OSLO]),
    (
        XML,
        "<function=f><parameter=a>5</parameter><parameter=b>[1]</parameter></function>",
        "",
        "",
        [("f", {"a": 5, "b": [1]})],
    ),
    (XML, "<function=f><parameter=a>\n  x\n\ny\n</parameter></function>", "", "", [("f", {"a": "  x\n\ny"})]),
    (LLAMA, '{"name": "weather", "parameters": {"city": "Oslo"}}', "", "", [OSLO]),
    (LLAMA, f"<|python_tag|>{JSON}; {JSON}", "", "", [OSLO, OSLO]),
    (LLAMA, f"{JSON};{JSON}", "", "", [OSLO, OSLO]),
    (LLAMA, f"[{JSON}]", "", "", [OSLO]),
    (LLAMA, '{"answer": 5}', '{"answer": 5}', "", []),
    (LLAMA, '{"name": "Oslo", "people": 5}', '{"name": "Oslo", "people": 5}', "", []),
    (LLAMA, "{not json}", "{not json}", "", []),
    (LLAMA, f"It is {JSON}", f"It is {JSON}", "", []),
    (MISTRAL, f"[TOOL_CALLS] [{JSON}]", "", "", [OSLO]),
    (MISTRAL, f"So.[TOOL_CALLS][{JSON}, {JSON}]", "So.", "", [OSLO, OSLO]),
    (MISTRAL, '[THINK]hm[/THINK][TOOL_CALLS]weather[ARGS]{"city": "Oslo"}', "", "hm", [OSLO]),
    (MISTRAL, '[TOOL_CALLS]weather{"city": "Oslo"}[TOOL_CALLS]now[ARGS]{}', "", "", [OSLO, ("now", {})]),
    (MISTRAL, '[TOOL_CALLS]weather[CALL_ID]abcdef123[ARGS]{"city": "Oslo"}', "", "", [OSLO]),
    (GEMMA, '```tool_code\nweather(city="Oslo")\n```', "", "", [OSLO]),
    (GEMMA, "```tool_code\nprint(default_api.weather(city='Oslo'))\n```", "", "", [OSLO]),
    (GEMMA, '```tool_code\n[weather(city="Oslo"), now()]\n```', "", "", [OSLO, ("now", {})]),
    (
        GEMMA,
        '```tool_code\nf(a=[1, -2.5], b={"c": None, "d": True})```',
        "",
        "",
        [("f", {"a": [1, -2.5], "b": {"c": None, "d": True}})],
    ),
    (GEMMA, f"So:\n```json\n{JSON}\n```", "So:", "", [OSLO]),
    (GEMMA, f"```tool_call\n{JSON}\n```", "", "", [OSLO]),
    (GEMMA, '{"name": "weather", "parameters": {"city": "Oslo"}}', "", "", [OSLO]),
    (GEMMA, '```json\n{"answer": 5}\n```', '```json\n{"answer": 5}\n```', "", []),
    (GEMMA, "```json\n{'a': 1} # no JSON\n```", "```json\n{'a': 1} # no JSON\n```", "", []),
    (GEMMA, "```python\nweather(city='Oslo')\n```", "```python\nweather(city='Oslo')\n```", "", []),
    (FUNCTION_GEMMA, "<start_function_call>call:weather{city:<escape>Oslo<escape>}<end_function_call>", "", "", [OSLO]),
    (
        GEMMA4,
        '<|channel>thought\nhm\n<channel|><|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>',
        "",
        "hm",
        [OSLO],
    ),
    (GEMMA4, '<|tool_call>call:weather{"city":"Oslo"}<tool_call|>', "", "", [OSLO]),
    (GEMMA4, "<|tool_call>call:weather{city:Oslo}<tool_call|>", "", "", [OSLO]),
    (
        GEMMA4,
        '<|tool_call>call:f{a:[1,{b:<|"|>}<|"|>}],c:true}<tool_call|>',
        "",
        "",
        [("f", {"a": [1, {"b": "}"}], "c": True})],
    ),
]


@pytest.mark.parametrize(("form", "text", "content", "reasoning", "calls"), WILD)
def test_what_models_write(form: CallFormat, text: str, content: str, reasoning: str, calls: list[Any]) -> None:
    parsed = parse(text, form)
    assert (parsed.content, parsed.reasoning, meant(parsed)) == (content, reasoning, calls)


BROKEN = [
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>',
        "is not valid JSON (Expecting ',' delimiter at character 35)",
    ),
    (HERMES, '<tool_call>{"name": "f", "argu', "is cut off before its end"),
    (HERMES, '<tool_call>{"arguments": {}}</tool_call>', "has no name"),
    (HERMES, '<tool_call>{"name": 3, "arguments": {}}</tool_call>', "has no name"),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "has arguments that are no object"),
    (HERMES, '<tool_call>"f"</tool_call>', "is no object"),
    (HERMES, "<tool_call></tool_call>", "is not valid JSON (Expecting value at character 0)"),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "is not valid JSON (NaN is no JSON)"),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>', "is not valid JSON (1e999 is no JSON)"),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>',
        "has arguments that are not valid Unicode, or too deep",
    ),
    (
        HERMES,
        f"<tool_call>{JSON} thanks</tool_call>",
        "goes on after its arguments with 'thanks</tool_call>', not with '</tool_call>'",
    ),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 9999 + "</tool_call>",
        "is not valid JSON (a number is too long, or there are too many brackets)",
    ),
    (XML, "<tool_call>{}</tool_call>", "does not begin with <function=NAME>"),
    (XML, "<tool_call><function=f><parameter=a>1</tool_call>", "has no </parameter>"),
    (XML, "<tool_call><function=f></tool_call>", "does not end with </function>"),
    (LLAMA, '{"name": "f", "parameters": {', "is cut off before its end"),
    (LLAMA, "<|python_tag|>import os", "is not valid JSON (Expecting value at character 0)"),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a"', "is cut off before its end"),
    (MISTRAL, "[TOOL_CALLS]", "is cut off before its end"),
    (
        MISTRAL,
        "[TOOL_CALLS]f[ARGS]{a}",
        "is not valid JSON (Expecting property name enclosed in double quotes at character 1)",
    ),
    (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": nu', "is cut off before its end"),
    (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": "\\u12', "is cut off before its end"),
    (GEMMA, "```tool_code\nweather('Oslo')\n```", "has an argument without '='"),
    (GEMMA, "```tool_code\nweather(city=oslo)\n```", "has a value that is no literal ('oslo')"),
    (GEMMA, "```tool_code\nx = 5\n```", "is neither JSON nor a Python call with named arguments"),
    (GEMMA4, "<|tool_call>weather{}<tool_call|>", "does not begin with call:NAME{"),
    (GEMMA4, '<|tool_call>call:weather{city:<|"|>Os', "is cut off before its end"),
    (GEMMA4, "<|tool_call>call:f{a:" + "[" * 99 + "}<tool_call|>", "has too many brackets in each other"),
]


@pytest.mark.parametrize(("form", "text", "why"), BROKEN)
def test_a_malformed_call_is_one_sentence_and_stays_in_the_content(form: CallFormat, text: str, why: str) -> None:
    parsed = parse(f"So. {text}" if form not in (LLAMA, GEMMA) else text, form)
    assert parsed.calls == ()
    (problem,) = parsed.problems
    # The example says what to write, and can be read itself.
    start, example = problem.removesuffix(".").split(" Write ", 1)
    assert start == f"Tool call 1 {why}."
    assert meant(parse(example, form)) == [("NAME", {"ARGUMENT": "VALUE"})]
    assert parsed.content.endswith(text[:-1].rstrip()) or text in parsed.content


def test_a_good_call_beside_a_bad_one_is_made() -> None:
    parsed = parse(f"<tool_call>{{</tool_call><tool_call>{JSON}</tool_call>", HERMES)
    assert [call.name for call in parsed.calls] == ["weather"]
    assert [problem[:12] for problem in parsed.problems] == ["Tool call 1 "]
    # but not one in the same block: the model will write the block again
    assert parse(f"<tool_call>{JSON} {{</tool_call>", HERMES).calls == ()


def test_what_follows_a_string_without_an_end_is_no_call() -> None:
    text = """[TOOL_CALLS]f[ARGS]{"a": oops, "text": "[TOOL_CALLS]weather[ARGS]{}"}"""
    assert (parse(text, MISTRAL).calls, parse(text, MISTRAL).content) == ((), text)
    text = """[TOOL_CALLS]say[ARGS]{"text": "[TOOL_CALLS]weather[ARGS]{}"""
    parsed = parse(text, MISTRAL)
    assert (parsed.calls, len(parsed.problems), parsed.content) == ((), 1, text)


def test_too_many_calls_are_said() -> None:
    parsed = parse(f"<tool_call>{JSON}</tool_call>" * 130, HERMES)
    assert len(parsed.calls) == MOST_CALLS
    assert [problem.split(" Write ")[0] for problem in parsed.problems] == [
        f"Tool call {MOST_CALLS + place} comes after {MOST_CALLS} others, which is too many." for place in (1, 2)
    ]


def test_types_of_tools_decide_what_a_parameter_is() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "soon": {"type": "boolean"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    text = "<function=weather><parameter=city>\n1984\n</parameter><parameter=soon>True</parameter></function>"
    assert meant(parse(text, XML, tools=tools)) == [("weather", {"city": "1984", "soon": True})]
    assert meant(parse(text, XML)) == [("weather", {"city": 1984, "soon": "True"})]


def test_a_prompt_that_opens_the_reasoning() -> None:
    text = f"hm <tool_call>{JSON}</tool_call>"
    assert parse(text, HERMES, thinking=True) == Parsed("", text, (), ())
    assert parse(f"{text}</think>Yes.", HERMES, thinking=True) == Parsed("Yes.", text, (), ())


def test_equal_answers_have_equal_ids_and_calls_of_one_answer_have_not() -> None:
    text = f"<tool_call>{JSON}</tool_call>" * 2
    ids = [call.id for call in parse(text, HERMES).calls]
    assert ids == [call.id for call in parse(text, HERMES).calls]
    assert len({*ids, *(call.id for call in parse(text + " ", HERMES).calls)}) == 4
    assert all(len(each) == 9 and each.isalnum() for each in ids)


def test_the_format_is_read_from_the_template() -> None:
    found = {path.stem: format_of(path.read_text()) for path in FOLDER.glob("*.jinja")}
    assert {name: found[name] for name in ("qwen3", "llama3", "mistral_v3", "gemma3", "smollm2")} == {
        "qwen3": HERMES,
        "llama3": LLAMA,
        "mistral_v3": MISTRAL,
        "gemma3": GEMMA,
        "smollm2": HERMES,
    }
    assert format_of("") is HERMES


@pytest.mark.parametrize("form", CallFormat)
def test_instructions_name_the_tools_and_show_a_call_that_can_be_read(form: CallFormat) -> None:
    text = instructions([TOOL], form)
    assert json.dumps(TOOL["function"]) in text
    assert written(ToolCall("NAME", {"ARGUMENT": "VALUE"}, "000000000"), form) in text


ADVERSARIAL = [
    ("<tool_call>", HERMES),
    ('<tool_call>{"', HERMES),
    ("<tool_call>{</tool_call>", HERMES),
    ('<tool_call>{"a</tool_call>', HERMES),
    (f"<tool_call>{JSON}</tool_call>", HERMES),
    ("<think></think>", HERMES),
    ("<tool_call>  ", XML),
    ("<function=f>", XML),
    ("<function=f><parameter=a>", XML),
    ("<function=f><parameter=a>[</parameter></function>", XML),
    ("{", LLAMA),
    ('{"name": "a"};', LLAMA),
    ("<|python_tag|>{", LLAMA),
    ("[TOOL_CALLS]", MISTRAL),
    ("[TOOL_CALLS]a", MISTRAL),
    ("[TOOL_CALLS]a[CALL_ID]", MISTRAL),
    ("[TOOL_CALLS]a{}", MISTRAL),
    ("```tool_code\n", GEMMA),
    ("```json\n{'a'\n```", GEMMA),
    ("```json\n{", GEMMA),
    ("```tool_code\nf(a='\\", GEMMA),
    ("```tool_code\nf()\n```", GEMMA),
    ("<start_function_call>call:f{a:<escape>", FUNCTION_GEMMA),
    ("<|tool_call>call:f{a:", GEMMA4),
    ("<|tool_call>call:f{a:[", GEMMA4),
    ("<|tool_call>call:f{a:1}<tool_call|>", GEMMA4),
    ('<|tool_call>call:f{"', GEMMA4),
]


@pytest.mark.parametrize(("piece", "form"), ADVERSARIAL)
def test_reading_takes_work_in_proportion_to_the_text(piece: str, form: CallFormat) -> None:
    """Python's own steps are counted, as a clock would be of the machine. Steps inside a search are not: see the next test."""

    def steps(size: int) -> int:
        text, count = piece * (size // len(piece)), 0

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal count
            count += 1
            return trace

        sys.settrace(trace)
        try:
            parse(text, form)
        finally:
            sys.settrace(None)
        return count

    small, large = steps(2_000), steps(16_000)
    assert large <= 9 * small + 500


@pytest.mark.parametrize(("piece", "form"), ADVERSARIAL)
def test_a_megabyte_is_read_at_once(piece: str, form: CallFormat) -> None:
    parsed = parse(piece * (1_000_000 // len(piece)), form)
    assert len(parsed.problems) <= MOST_PROBLEMS + 1
