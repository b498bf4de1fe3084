"""Supervised rows under the chat templates of common families: the whole text and what of it is learned, written by hand.

What a template cannot do is refused for the reason that is the true one.
"""

import json
import re
from datetime import datetime

import pyarrow
import pyarrow.parquet
import pytest
from transformers.utils import chat_template_utils

from tests.chat_templates import (
    A1,
    CALL,
    CONVERSATIONS,
    Q1,
    RESULT,
    TOOL,
    TOOL_TEXT,
    masked,
    says,
    template_tokenizer,
)
from tests.template_texts import (
    ALL,
    FAMILIES,
    LA,
    LAST,
    LI,
    LLAMA,
    LLAMA_CALL,
    LLAMA_RESULT,
    MISTRAL_TOOLS,
    NO_THOUGHT,
    QWEN_CALL,
    QWEN_RESULT,
    QWEN_TOOLS,
    REFUSALS,
    TOOLS,
    A,
    E,
    T,
    U,
)
from togi.data.faults import Note
from togi.data.records import RecordSpec, load_sft
from togi.errors import DataError


def marked_mistral(template):
    """The template with marks around the text of the assistant."""
    branch, text = "{%- elif message.role == 'assistant' -%}", "{{- ' ' + message.content | trim + eos_token -}}"
    assert branch in template
    return template.replace(branch, f"{branch}{{%- generation -%}}{text}{{%- endgeneration -%}}{{%- elif false -%}}")


@pytest.fixture(autouse=True)
def same_day(monkeypatch):
    """Templates ask for the date."""

    class Day(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 3, 5)

    monkeypatch.setattr(chat_template_utils, "datetime", Day)


def load(tmp_path, tokenizer, name, multiturn, tools=None):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CONVERSATIONS[name]} | ({} if tools is None else {"tools": tools})) + "\n")
    spec = RecordSpec(
        str(path), input_key="messages", apply_chat_template=True, multiturn=multiturn, max_len=4096, max_bad_rows=0.0
    )
    return load_sft(spec, tokenizer)


@pytest.mark.parametrize(
    ("template", "name", "multiturn", "tools", "text", "notes"),
    [
        pytest.param(template, *case[:4], set(case[4:]), id=f"{template}-{case[0]}-{'all' if case[1] else 'last'}-{i}")
        for template, cases in FAMILIES.items()
        for i, case in enumerate(cases)
    ],
)
def test_learned_text(tmp_path, template, name, multiturn, tools, text, notes):
    tokenizer = template_tokenizer(template)
    examples = load(tmp_path, tokenizer, name, multiturn, tools)
    ((sample,),) = examples
    assert masked(sample, tokenizer) == text
    assert {note for note in Note for warning in examples.report.warnings if str(note) in warning} == notes


@pytest.mark.parametrize(("template", "name", "multiturn", "reason"), REFUSALS)
def test_refusals(tmp_path, template, name, multiturn, reason):
    with pytest.raises(DataError, match=rf"^Line 1 of .*a.jsonl.* {reason}"):
        load(tmp_path, template_tokenizer(template), name, multiturn)


@pytest.mark.parametrize("template", FAMILIES)
def test_text_in_parts_is_the_same_text(tmp_path, template):
    tokenizer = template_tokenizer(template)
    ((plain,),) = load(tmp_path, tokenizer, "one turn", LAST)
    parts = [says(m["role"], [{"type": "text", "text": m["content"]}]) for m in CONVERSATIONS["one turn"]]
    path = tmp_path / "parts.jsonl"
    path.write_text(json.dumps({"messages": parts}) + "\n")
    ((sample,),) = load_sft(RecordSpec(str(path), input_key="messages", apply_chat_template=True), tokenizer)
    assert masked(sample, tokenizer) == masked(plain, tokenizer)


def test_calls_from_a_parquet_file(tmp_path):
    """Arrow gives all messages, tools and arguments the keys of any; templates ask whether a key is there."""
    other = {
        "type": "function",
        "function": {"name": "code", "parameters": {"properties": {"zip": {"type": "string"}}}},
    }
    call = {"type": "function", "id": "abcdefgh2", "function": {"name": "code", "arguments": {"zip": "0150"}}}
    turns = [Q1, CALL, RESULT, {**CALL, "tool_calls": [call]}, RESULT, A1]
    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist([{"messages": turns, "tools": [TOOL, other]}])
    pyarrow.parquet.write_table(table, path)
    spec = RecordSpec(str(path), input_key="messages", apply_chat_template=True, multiturn=True, max_len=4096)
    second = (
        '{"type": "function", "function": {"name": "code", "parameters": {"properties": {"zip": {"type": "string"}}}}}'
    )
    tokenizer = template_tokenizer("qwen3")
    ((sample,),) = load_sft(spec, tokenizer)
    first_call = f"{U}q1{E}\n{A}⟦{QWEN_CALL}{E}⟧\n{U}{QWEN_RESULT}{E}\n"
    second_call = QWEN_CALL.replace('"weather"', '"code"').replace('{"city": "Oslo"}', '{"zip": "0150"}')
    assert masked(sample, tokenizer) == (
        QWEN_TOOLS.replace(TOOL_TEXT, f"{TOOL_TEXT}\n{second}")
        + f"{first_call}{A}⟦{second_call}{E}⟧\n{U}{QWEN_RESULT}{E}\n{A}⟦{NO_THOUGHT}a1{E}⟧"
    )
    tokenizer = template_tokenizer("llama3")
    ((sample,),) = load_sft(spec, tokenizer)
    second_call = '{"name": "code", "parameters": {"zip": "0150"}}'
    assert masked(sample, tokenizer).endswith(
        f"{LA}⟦{LLAMA_CALL}{T}⟧{LI}{LLAMA_RESULT}{T}{LA}⟦{second_call}{T}⟧{LI}{LLAMA_RESULT}{T}{LA}⟦a1{T}⟧"
    )


def test_tools_that_move_with_the_last_question(tmp_path):
    reason = "has the messages before its message 1 rendered differently by the chat template when more messages follow"
    tokenizer = template_tokenizer("mistral_v3")
    with pytest.raises(DataError, match=rf"{reason}.*: mark .*, or train on its last turn only"):
        load(tmp_path, tokenizer, "two turns", ALL, TOOLS)
    tokenizer.chat_template = marked_mistral(tokenizer.chat_template)
    ((sample,),) = load(tmp_path, tokenizer, "two turns", ALL, TOOLS)
    assert masked(sample, tokenizer) == f"<s>[INST] q1[/INST]⟦ a1</s>⟧{MISTRAL_TOOLS}[INST] q2[/INST]⟦ a2</s>⟧"


def test_advice_that_works(tmp_path):
    """The last turn is not helped by training on the last turn only, nor are two turns of the assistant in a row."""
    tokenizer = template_tokenizer("mistral_v3")
    with pytest.raises(
        DataError, match=r"rendered differently .*: use a template that renders them alike, or mark"
    ) as error:
        load(tmp_path, tokenizer, "system", LAST)
    assert "last turn only" not in str(error.value)
    tokenizer.chat_template = marked_mistral(tokenizer.chat_template)
    ((sample,),) = load(tmp_path, tokenizer, "system", LAST)
    assert masked(sample, tokenizer) == "<s>[INST] q1[/INST]⟦ a1</s>⟧"
    with pytest.raises(
        DataError, match=r"rendered differently .*: join messages of the assistant that follow each other"
    ) as error:
        load(tmp_path, template_tokenizer("qwen3"), "two answers", ALL)
    assert "last turn only" not in str(error.value)


def test_reasoning_switched_off_in_the_template(tmp_path):
    tokenizer = template_tokenizer("qwen3", "{%- set enable_thinking = false -%}\n")
    ((sample,),) = load(tmp_path, tokenizer, "two turns", LAST)
    # The empty reasoning is in the generation prompt.
    assert masked(sample, tokenizer) == f"{U}q1{E}\n{A}a1{E}\n{U}q2{E}\n{A}{NO_THOUGHT}⟦a2{E}⟧"
    prompt = re.escape(repr(A + NO_THOUGHT))
    with pytest.raises(DataError, match=f"generation prompt {prompt}"):
        load(tmp_path, tokenizer, "reasoning", LAST)
    with pytest.raises(DataError, match=f"has its message 1 .*generation prompt {prompt}"):
        load(tmp_path, tokenizer, "two turns", ALL)


def test_reasoning_that_the_generation_prompt_opens(tmp_path):
    tokenizer = template_tokenizer("qwen3", after="{{- '<think>\\n' if add_generation_prompt -}}")
    # What is in the prompt is not learned, whether the row has its reasoning beside the content or in it.
    for name, answer in {
        "reasoning": "r1\n</think>\n\na1",
        "one thought": "r1\n</think>\n\na1",
        "one turn": "\n</think>\n\na1",
    }.items():
        ((sample,),) = load(tmp_path, tokenizer, name, LAST)
        assert masked(sample, tokenizer) == f"{U}q1{E}\n{A}<think>\n⟦{answer}{E}⟧"
    with pytest.raises(DataError, match=r"has its message 1 .*generation prompt"):
        load(tmp_path, tokenizer, "two turns", ALL)


@pytest.mark.parametrize("tools", [[], "[]", "", None])
def test_no_tools_are_none(tmp_path, tools):
    """Templates that ask whether tools are given at all would render a list of nothing."""
    for template, text in {"llama3": f"{LLAMA}⟦a1{T}⟧", "mistral_v3": "<s>[INST] q1[/INST]⟦ a1</s>⟧"}.items():
        tokenizer = template_tokenizer(template)
        path = tmp_path / f"{template}.jsonl"
        path.write_text(json.dumps({"messages": CONVERSATIONS["one turn"], "tools": tools}) + "\n")
        ((sample,),) = load_sft(RecordSpec(str(path), input_key="messages", apply_chat_template=True), tokenizer)
        assert masked(sample, tokenizer) == text


def test_tool_call_ids_that_the_template_refuses(tmp_path):
    turns = json.loads(json.dumps(CONVERSATIONS["call"]).replace("abcdefgh1", "call_1"))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    reason = r"is refused by the chat template \(Tool call IDs should be alphanumeric strings with length 9!\)"
    with pytest.raises(DataError, match=rf"^Line 1 of .*a.jsonl {reason}"):
        load_sft(
            RecordSpec(str(path), input_key="messages", apply_chat_template=True), template_tokenizer("mistral_v3")
        )
