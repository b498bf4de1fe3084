"""Chat templates with the constructs of the published ones, a tokenizer for each, and conversations to render with them.

They are written for the tests: what published templates do with history, system prompts, tools and reasoning is there, their
texts are not.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer
from togi.sample import Sample

FOLDER = Path(__file__).parent / "templates"
# The special tokens of each family: BOS (or none), EOS, others.
CHATML = (None, "<|im_end|>", ())
LLAMA = ("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"))
MISTRAL = ("<s>", "</s>", ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"))
MISTRAL_13 = (
    *MISTRAL[:2],
    (*MISTRAL[2], "[ARGS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
)
GEMMA = ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"))
GEMMA4_TOKENS = (
    "<|turn>",
    "<turn|>",
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
)
GEMMA4 = ("<bos>", "<eos>", (*GEMMA4_TOKENS, '<|"|>', "<|channel>", "<channel|>", "<|think|>"))
FUNCTIONS = (
    "<start_function_call>",
    "<end_function_call>",
    "<start_function_response>",
    "<end_function_response>",
    "<escape>",
)
FUNCTION_GEMMA = (*GEMMA[:2], (*GEMMA[2], "<start_function_declaration>", "<end_function_declaration>", *FUNCTIONS))
PHI = (None, "<|endoftext|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>"))
FAMILIES = {
    "qwen3": CHATML,
    "qwen35": CHATML,
    "think_opened": CHATML,
    "llama3": LLAMA,
    "mistral_v3": MISTRAL,
    "mistral_v7": MISTRAL,
    "mistral_v13": MISTRAL_13,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gemma4": GEMMA4,
    "function_gemma": FUNCTION_GEMMA,
    "phi3": PHI,
    "phi4_mini": PHI,
    "smollm2": CHATML,
    "smollm3": CHATML,
}


def template_tokenizer(name: str, before: str = "", after: str = "") -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with the special tokens and the template of that name, between ``before`` and ``after``."""
    bos, eos, others = FAMILIES[name]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": list(others)})
    if bos is None:
        tokenizer.bos_token = None
    else:
        tokenizer.add_special_tokens({"bos_token": bos})
    tokenizer.chat_template = before + (FOLDER / f"{name}.jinja").read_text(encoding="utf-8") + after
    return tokenizer


def masked(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of a sequence, learned parts between ⟦ and ⟧."""
    parts = []
    tokens = zip(sample.tokens.tolist(), sample.loss_mask.tolist(), strict=True)
    for learned, run in groupby(tokens, key=lambda token: token[1]):
        text = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        parts.append(f"⟦{text}⟧" if learned else text)
    return "".join(parts)


def says(role: str, content: str, **more: Any) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content, **more}


Q1, A1, Q2, A2 = says("user", "q1"), says("assistant", "a1"), says("user", "q2"), says("assistant", "a2")
SYSTEM = says("system", "be brief")
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
# As a template's ``tojson`` writes it, and with ``indent=4``.
TOOL_TEXT = (
    '{"type": "function", "function": {"name": "weather", "description": "The weather.", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}'
)
TOOL_LINES = """{
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {
                    "type": "string"
                }
            }
        }
    }
}"""
CALL = {
    "role": "assistant",
    "tool_calls": [
        {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    ],
}
RESULT = says("tool", '{"degrees": 22}', tool_call_id="abcdefgh1")
CALL_IN_WORDS = {**CALL, "content": "I look up the weather in Oslo."}
THOUGHT_1, THOUGHT_2 = (says("assistant", f"<think>\nr{i}\n</think>\n\na{i}") for i in (1, 2))
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [Q1, A1],
    "spaces": [says("user", " q1 \n"), says("assistant", " a1 \n")],
    "two turns": [Q1, A1, Q2, A2],
    "system": [SYSTEM, Q1, A1],
    "call": [Q1, CALL, RESULT, A1],
    "two calls": [Q1, {**CALL, "tool_calls": CALL["tool_calls"] * 2}, RESULT, RESULT, A1],
    "calls in two turns": [Q1, CALL, RESULT, A1, Q2, CALL, RESULT, A2],
    "one thought": [Q1, THOUGHT_1],
    "tight thoughts": [Q1, says("assistant", "<think>r1</think>a1")],
    "thoughts": [Q1, THOUGHT_1, Q2, THOUGHT_2],
    "reasoning": [Q1, {**A1, "reasoning_content": "r1"}],
    "reasoning in two turns": [Q1, {**A1, "reasoning_content": "r1"}, Q2, {**A2, "reasoning_content": "r2"}],
    "two questions": [Q1, Q2, A2],
    "two answers": [Q1, A1, A2],
    "late system": [Q1, A1, SYSTEM, Q2, A2],
    "call in words": [Q1, CALL_IN_WORDS, RESULT, A1],
    "no_think": [says("system", "be brief /no_think"), Q1, A1],
    "tools as text": [says("system", "be brief", tools='[{"name": "weather"}]'), Q1, A1],
}
