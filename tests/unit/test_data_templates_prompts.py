"""Pairs, labelled answers and prompts under the chat templates of common families, with tools: texts written by hand."""

import json

import pytest

from tests.chat_templates import CALL, CONVERSATIONS, Q1, RESULT, SYSTEM, TOOL, masked, says, template_tokenizer
from tests.template_texts import (
    GE,
    GM,
    GU,
    LA,
    LI,
    LLAMA_CALL,
    LLAMA_RESULT,
    LLAMA_TOOLS,
    MISTRAL_CALL,
    MISTRAL_RESULT,
    MISTRAL_TOOLS,
    NO_THOUGHT,
    QWEN_CALL,
    QWEN_RESULT,
    QWEN_TOOLS,
    SMOL_2,
    A,
    E,
    T,
    U,
    X,
)
from togi.data.faults import Note
from togi.data.prompts import PromptSpec, load_prompts
from togi.data.records import RecordSpec, load_pairs, load_unpaired
from togi.errors import DataError

# Up to the answer, the call as an answer, and a text as an answer.
TOOL_FAMILIES = {
    "qwen3": (f"{QWEN_TOOLS}{U}q1{E}\n{A}", f"{NO_THOUGHT}{QWEN_CALL}{E}", f"{NO_THOUGHT}I guess 20 C.{E}"),
    "llama3": (LLAMA_TOOLS, f"{LLAMA_CALL}{T}", f"I guess 20 C.{T}"),
    "mistral_v3": (f"<s>{MISTRAL_TOOLS}[INST] q1[/INST]", MISTRAL_CALL, " I guess 20 C.</s>"),
}
GUESS = says("assistant", "I guess 20 C.")


def write(tmp_path, row):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return str(path)


def records(path, **settings):
    return RecordSpec(path, apply_chat_template=True, max_len=4096, max_bad_rows=0.0, **settings)


@pytest.mark.parametrize("template", TOOL_FAMILIES)
@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"p": [Q1], "chosen": [CALL], "rejected": [GUESS]}, {"prompt_key": "p"}),
        ({"p": "q1", "chosen": CALL, "rejected": "I guess 20 C."}, {"prompt_key": "p"}),
        ({"chosen": [Q1, CALL], "rejected": [Q1, GUESS]}, {}),
    ],
)
def test_pairs_of_a_call_and_a_text(tmp_path, template, row, settings):
    tokenizer = template_tokenizer(template)
    path = write(tmp_path, {**row, "tools": [TOOL]})
    ((chosen, rejected),) = load_pairs(records(path, **settings), tokenizer)
    prompt, call, text = TOOL_FAMILIES[template]
    # What both have in common is not part of either answer.
    assert masked(chosen, tokenizer) == f"{prompt}⟦{call}⟧"
    assert masked(rejected, tokenizer) == f"{prompt}⟦{text}⟧"
    assert chosen.prompt_length == rejected.prompt_length
    assert tokenizer.decode(chosen.tokens[: chosen.prompt_length]) == prompt


@pytest.mark.parametrize("template", ["smollm2", "gemma3", "phi4_mini", "mistral_v7"])
def test_a_pair_whose_call_the_template_leaves_out(tmp_path, template):
    path = write(tmp_path, {"p": "q1", "chosen": CALL, "rejected": "a1", "tools": [TOOL]})
    with pytest.raises(DataError, match="has tool calls in its message 1 that the chat template leaves out"):
        load_pairs(records(path, prompt_key="p"), template_tokenizer(template))


@pytest.mark.parametrize("multiturn", [False, True])
def test_labelled_answers_with_calls(tmp_path, multiturn):
    path = write(tmp_path, {"m": CONVERSATIONS["call"], "tools": json.dumps([TOOL]), "label": True})
    expected = {
        "qwen3": (f"{QWEN_TOOLS}{U}q1{E}\n{A}", f"{QWEN_CALL}{E}", f"\n{U}{QWEN_RESULT}{E}\n{A}", f"{NO_THOUGHT}a1{E}"),
        "llama3": (LLAMA_TOOLS, f"{LLAMA_CALL}{T}", f"{LI}{LLAMA_RESULT}{T}{LA}", f"a1{T}"),
        "mistral_v3": (f"<s>{MISTRAL_TOOLS}[INST] q1[/INST]", MISTRAL_CALL, MISTRAL_RESULT, " a1</s>"),
    }
    for template, (prompt, call, result, answer) in expected.items():
        tokenizer = template_tokenizer(template)
        ((sample,),) = load_unpaired(records(path, input_key="m", multiturn=multiturn), tokenizer)
        assert masked(sample, tokenizer) == prompt + (f"⟦{call}⟧" if multiturn else call) + f"{result}⟦{answer}⟧"
        assert sample.values["desirable"] == 1.0


PROMPTS = [
    ("qwen3", {"m": [Q1, CALL, RESULT]}, f"{QWEN_TOOLS}{U}q1{E}\n{A}{QWEN_CALL}{E}\n{U}{QWEN_RESULT}{E}\n{A}", set()),
    ("llama3", {"m": [Q1, CALL, RESULT]}, f"{LLAMA_TOOLS}{LLAMA_CALL}{T}{LI}{LLAMA_RESULT}{T}{LA}", set()),
    (
        "mistral_v3",
        {"m": [Q1, CALL, RESULT]},
        f"<s>{MISTRAL_TOOLS}[INST] q1[/INST]{MISTRAL_CALL}{MISTRAL_RESULT}",
        set(),
    ),
    ("mistral_v3", {"m": [SYSTEM, Q1]}, f"<s>{MISTRAL_TOOLS}[INST] be brief\n\nq1[/INST]", set()),
    ("smollm2", {"m": "q1"}, SMOL_2, {Note.TOOLS_UNSEEN}),
    ("smollm2", {"m": "what is the weather"}, SMOL_2.replace("q1", "what is the weather"), {Note.TOOLS_UNSEEN}),
    ("gemma3", {"m": [SYSTEM, Q1]}, f"<bos>{GU}be brief\n\nq1{GE}\n{GM}", {Note.TOOLS_UNSEEN}),
    (
        "phi4_mini",
        {"m": [{**SYSTEM, "tools": "[1]"}, Q1]},
        f"<|system|>be brief<|tool|>[1]<|/tool|>{X}<|user|>q1{X}<|assistant|>",
        {Note.TOOLS_UNSEEN},
    ),
]


@pytest.mark.parametrize(("template", "row", "text", "notes"), PROMPTS)
def test_prompts_with_tools(tmp_path, template, row, text, notes):
    path = write(tmp_path, {**row, "tools": [TOOL]})
    tokenizer = template_tokenizer(template)
    prompts = load_prompts(PromptSpec(path, input_key="m", apply_chat_template=True), tokenizer)
    (prompt,) = prompts
    assert prompt.text == text
    assert tokenizer.decode(prompt.tokens) == text
    assert {note for note in Note for warning in prompts.report.warnings if str(note) in warning} == notes
