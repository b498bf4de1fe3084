"""What conversations become under the templates of ``chat_templates``, written by hand; ⟦ and ⟧ are around what is learned.

A case is the name of a conversation, whether all turns are learned or the last, the row's field "tools", the text, and what
the data report says.
"""

from __future__ import annotations

import json

from tests.chat_templates import TOOL, TOOL_LINES, TOOL_TEXT
from togi.data.faults import Note

LAST, ALL = False, True
TOOLS = [TOOL]
LOST, UNSEEN, UNLEARNED = Note.CONTEXT_LOST, Note.TOOLS_UNSEEN, Note.REASONING_LOST

# ChatML.
S, U, A, E = "<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
NO_THOUGHT = "<think>\n\n</think>\n\n"
QWEN_TOOLS = (
    f"{S}# Tools\n\nYou may call one or more functions.\n<tools>\n{TOOL_TEXT}\n</tools>\n"
    f'Write {{"name": ..., "arguments": ...}} within <tool_call></tool_call>.{E}\n'
)
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
QWEN_RESULT = '<tool_response>\n{"degrees": 22}\n</tool_response>'
QWEN = [
    ("one turn", LAST, None, f"{U}q1{E}\n{A}⟦{NO_THOUGHT}a1{E}⟧"),
    ("spaces", LAST, None, f"{U} q1 \n{E}\n{A}⟦{NO_THOUGHT} a1 \n{E}⟧"),
    ("two turns", LAST, None, f"{U}q1{E}\n{A}a1{E}\n{U}q2{E}\n{A}⟦{NO_THOUGHT}a2{E}⟧"),
    # An older turn is rendered without the empty reasoning, in the text as in generation.
    ("two turns", ALL, None, f"{U}q1{E}\n{A}⟦a1{E}⟧\n{U}q2{E}\n{A}⟦{NO_THOUGHT}a2{E}⟧"),
    ("system", LAST, None, f"{S}be brief{E}\n{U}q1{E}\n{A}⟦{NO_THOUGHT}a1{E}⟧"),
    (
        "call",
        ALL,
        TOOLS,
        f"{QWEN_TOOLS}{U}q1{E}\n{A}⟦{QWEN_CALL}{E}⟧\n{U}{QWEN_RESULT}{E}\n{A}⟦{NO_THOUGHT}a1{E}⟧",
    ),
    (
        "two calls",
        ALL,
        TOOLS,
        f"{QWEN_TOOLS}{U}q1{E}\n{A}⟦{QWEN_CALL}\n{QWEN_CALL}{E}⟧\n{U}{QWEN_RESULT}\n{QWEN_RESULT}{E}\n"
        f"{A}⟦{NO_THOUGHT}a1{E}⟧",
    ),
    (
        "calls in two turns",
        ALL,
        TOOLS,
        f"{QWEN_TOOLS}{U}q1{E}\n{A}⟦{QWEN_CALL}{E}⟧\n{U}{QWEN_RESULT}{E}\n{A}⟦a1{E}⟧\n"
        f"{U}q2{E}\n{A}⟦{QWEN_CALL}{E}⟧\n{U}{QWEN_RESULT}{E}\n{A}⟦{NO_THOUGHT}a2{E}⟧",
    ),
    (
        "call in words",
        ALL,
        None,
        f"{U}q1{E}\n{A}⟦I look up the weather in Oslo.\n{QWEN_CALL}{E}⟧\n{U}{QWEN_RESULT}{E}\n{A}⟦{NO_THOUGHT}a1{E}⟧",
    ),
    ("thoughts", LAST, None, f"{U}q1{E}\n{A}a1{E}\n{U}q2{E}\n{A}⟦<think>\nr2\n</think>\n\na2{E}⟧", LOST),
    ("reasoning", LAST, None, f"{U}q1{E}\n{A}⟦<think>\nr1\n</think>\n\na1{E}⟧"),
    (
        "reasoning in two turns",
        ALL,
        None,
        f"{U}q1{E}\n{A}⟦a1{E}⟧\n{U}q2{E}\n{A}⟦<think>\nr2\n</think>\n\na2{E}⟧",
        UNLEARNED,
    ),
    ("two questions", LAST, None, f"{U}q1{E}\n{U}q2{E}\n{A}⟦{NO_THOUGHT}a2{E}⟧"),
    # White space that the template puts around reasoning is no change.
    ("tight thoughts", LAST, None, f"{U}q1{E}\n{A}⟦<think>\nr1\n</think>\n\na1{E}⟧"),
    ("late system", LAST, None, f"{U}q1{E}\n{A}a1{E}\n{S}be brief{E}\n{U}q2{E}\n{A}⟦{NO_THOUGHT}a2{E}⟧"),
]

SMOL_2 = f"{S}You are SmolLM.{E}\n{U}q1{E}\n{A}"
SMOLLM2 = [
    ("one turn", LAST, None, f"{SMOL_2}⟦a1{E}⟧"),
    ("two turns", ALL, None, f"{SMOL_2}⟦a1{E}⟧\n{U}q2{E}\n{A}⟦a2{E}⟧"),
    ("system", LAST, None, f"{S}be brief{E}\n{U}q1{E}\n{A}⟦a1{E}⟧"),
    ("one turn", LAST, TOOLS, f"{SMOL_2}⟦a1{E}⟧", UNSEEN),
    (
        "call in words",
        LAST,
        TOOLS,
        f'{SMOL_2}I look up the weather in Oslo.{E}\n<|im_start|>tool\n{{"degrees": 22}}{E}\n{A}⟦a1{E}⟧',
        UNSEEN,
        LOST,
    ),
    (
        "thoughts",
        ALL,
        None,
        f"{SMOL_2}⟦<think>\nr1\n</think>\n\na1{E}⟧\n{U}q2{E}\n{A}⟦<think>\nr2\n</think>\n\na2{E}⟧",
    ),
    ("reasoning", LAST, None, f"{SMOL_2}⟦a1{E}⟧", UNLEARNED),
    ("two questions", LAST, None, f"{S}You are SmolLM.{E}\n{U}q1{E}\n{U}q2{E}\n{A}⟦a2{E}⟧"),
    ("two answers", ALL, None, f"{SMOL_2}⟦a1{E}⟧\n{A}⟦a2{E}⟧"),
    ("late system", ALL, None, f"{SMOL_2}⟦a1{E}⟧\n{S}be brief{E}\n{U}q2{E}\n{A}⟦a2{E}⟧"),
]


def smol_3(mode, instructions):
    return (
        f"{S}## Metadata\n\nToday Date: 05 March 2026\nReasoning Mode: {mode}\n\n## Custom Instructions\n\n"
        f"{instructions}\n\n{E}\n{U}q1{E}\n{A}"
    )


SMOL_3 = smol_3("/think", "Think first.")
# Its marks are around the header, which is in the generation prompt and so not learned.
SMOLLM3 = [
    ("one turn", LAST, None, f"{SMOL_3}⟦a1{E}⟧"),
    ("two turns", ALL, None, f"{SMOL_3}⟦a1{E}⟧\n{U}q2{E}\n{A}⟦a2{E}⟧"),
    ("two turns", LAST, None, f"{SMOL_3}a1{E}\n{U}q2{E}\n{A}⟦a2{E}⟧"),
    ("system", LAST, None, smol_3("/think", "be brief") + f"⟦a1{E}⟧"),
    ("no_think", LAST, None, smol_3("/no_think", "be brief") + f"<think>\n\n</think>\n⟦a1{E}⟧", LOST),
    ("one turn", LAST, TOOLS, f"{SMOL_3}⟦a1{E}⟧", UNSEEN),
    (
        "thoughts",
        ALL,
        None,
        f"{SMOL_3}⟦<think>\nr1\n</think>\n\na1{E}⟧\n{U}q2{E}\n{A}⟦<think>\nr2\n</think>\n\na2{E}⟧",
    ),
    ("reasoning", LAST, None, f"{SMOL_3}⟦a1{E}⟧", UNLEARNED),
    ("two answers", ALL, None, f"{SMOL_3}⟦a1{E}⟧\n{A}⟦a2{E}⟧"),
    ("late system", LAST, None, f"{SMOL_3}a1{E}\n{U}q2{E}\n{A}⟦a2{E}⟧", LOST),
]

H, T = "<|start_header_id|>", "<|eot_id|>"
LU, LA, LI = (f"{H}{role}<|end_header_id|>\n\n" for role in ("user", "assistant", "ipython"))
LLAMA_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA_HEAD = f"<|begin_of_text|>{H}system<|end_header_id|>\n\n{LLAMA_DATES}"
LLAMA = f"{LLAMA_HEAD}{T}{LU}q1{T}{LA}"
LLAMA_TOOLS = (
    f"<|begin_of_text|>{H}system<|end_header_id|>\n\nEnvironment: ipython\n{LLAMA_DATES}{T}"
    f"{LU}You can call these functions.\n\n{TOOL_LINES}\n\nq1{T}{LA}"
)
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Oslo"}}'
LLAMA_RESULT = r'"{\"degrees\": 22}"'
LLAMA3 = [
    ("one turn", LAST, None, f"{LLAMA}⟦a1{T}⟧"),
    ("spaces", LAST, None, f"{LLAMA}⟦a1{T}⟧"),
    ("two turns", LAST, None, f"{LLAMA}a1{T}{LU}q2{T}{LA}⟦a2{T}⟧"),
    ("two turns", ALL, None, f"{LLAMA}⟦a1{T}⟧{LU}q2{T}{LA}⟦a2{T}⟧"),
    ("system", LAST, None, f"{LLAMA_HEAD}be brief{T}{LU}q1{T}{LA}⟦a1{T}⟧"),
    ("call", ALL, TOOLS, f"{LLAMA_TOOLS}⟦{LLAMA_CALL}{T}⟧{LI}{LLAMA_RESULT}{T}{LA}⟦a1{T}⟧"),
    ("call", ALL, json.dumps(TOOLS), f"{LLAMA_TOOLS}⟦{LLAMA_CALL}{T}⟧{LI}{LLAMA_RESULT}{T}{LA}⟦a1{T}⟧", Note.AS_TEXT),
    (
        "thoughts",
        ALL,
        None,
        f"{LLAMA}⟦<think>\nr1\n</think>\n\na1{T}⟧{LU}q2{T}{LA}⟦<think>\nr2\n</think>\n\na2{T}⟧",
    ),
    ("reasoning", LAST, None, f"{LLAMA}⟦a1{T}⟧", UNLEARNED),
    ("two questions", LAST, None, f"{LLAMA_HEAD}{T}{LU}q1{T}{LU}q2{T}{LA}⟦a2{T}⟧"),
    ("two answers", ALL, None, f"{LLAMA}⟦a1{T}⟧{LA}⟦a2{T}⟧"),
    ("late system", ALL, None, f"{LLAMA}⟦a1{T}⟧{H}system<|end_header_id|>\n\nbe brief{T}{LU}q2{T}{LA}⟦a2{T}⟧"),
]

MISTRAL_TOOLS = f"[AVAILABLE_TOOLS] [{TOOL_TEXT}][/AVAILABLE_TOOLS]"
MISTRAL_CALL = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "abcdefgh1"}]</s>'
MISTRAL_RESULT = '[TOOL_RESULTS] {"content": {"degrees": 22}, "call_id": "abcdefgh1"}[/TOOL_RESULTS]'
MISTRAL_V3 = [
    ("one turn", LAST, None, "<s>[INST] q1[/INST]⟦ a1</s>⟧"),
    ("spaces", LAST, None, "<s>[INST]  q1 \n[/INST]⟦ a1</s>⟧"),
    ("two turns", ALL, None, "<s>[INST] q1[/INST]⟦ a1</s>⟧[INST] q2[/INST]⟦ a2</s>⟧"),
    ("call", ALL, TOOLS, f"<s>{MISTRAL_TOOLS}[INST] q1[/INST]⟦{MISTRAL_CALL}⟧{MISTRAL_RESULT}⟦ a1</s>⟧"),
    ("two turns", LAST, TOOLS, f"<s>[INST] q1[/INST] a1</s>{MISTRAL_TOOLS}[INST] q2[/INST]⟦ a2</s>⟧"),
    (
        "calls in two turns",
        LAST,
        TOOLS,
        f"<s>[INST] q1[/INST]{MISTRAL_CALL}{MISTRAL_RESULT} a1</s>"
        f"{MISTRAL_TOOLS}[INST] q2[/INST]{MISTRAL_CALL}{MISTRAL_RESULT}⟦ a2</s>⟧",
    ),
    (
        "thoughts",
        LAST,
        None,
        "<s>[INST] q1[/INST] <think>\nr1\n</think>\n\na1</s>[INST] q2[/INST]⟦ <think>\nr2\n</think>\n\na2</s>⟧",
    ),
    ("reasoning", LAST, None, "<s>[INST] q1[/INST]⟦ a1</s>⟧", UNLEARNED),
]
MISTRAL_7 = "<s>[SYSTEM_PROMPT]You are a model of Mistral AI.[/SYSTEM_PROMPT]"
MISTRAL_V7 = [
    ("two turns", ALL, None, f"{MISTRAL_7}[INST]q1[/INST]⟦a1</s>⟧[INST]q2[/INST]⟦a2</s>⟧"),
    ("system", LAST, None, "<s>[SYSTEM_PROMPT]be brief[/SYSTEM_PROMPT][INST]q1[/INST]⟦a1</s>⟧"),
    ("one turn", LAST, TOOLS, f"{MISTRAL_7}[INST]q1[/INST]⟦a1</s>⟧", UNSEEN),
    ("two questions", LAST, None, f"{MISTRAL_7}[INST]q1[/INST][INST]q2[/INST]⟦a2</s>⟧"),
    ("two answers", ALL, None, f"{MISTRAL_7}[INST]q1[/INST]⟦a1</s>a2</s>⟧"),
    (
        "late system",
        ALL,
        None,
        f"{MISTRAL_7}[INST]q1[/INST]⟦a1</s>⟧[SYSTEM_PROMPT]be brief[/SYSTEM_PROMPT][INST]q2[/INST]⟦a2</s>⟧",
    ),
]

GU, GM, GE = "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>"
GEMMA = [
    ("spaces", LAST, None, f"<bos>{GU}q1{GE}\n{GM}⟦a1{GE}⟧"),
    ("one turn", LAST, None, f"<bos>{GU}q1{GE}\n{GM}⟦a1{GE}⟧"),
    ("two turns", ALL, None, f"<bos>{GU}q1{GE}\n{GM}⟦a1{GE}⟧\n{GU}q2{GE}\n{GM}⟦a2{GE}⟧"),
    ("one turn", LAST, TOOLS, f"<bos>{GU}q1{GE}\n{GM}⟦a1{GE}⟧", UNSEEN),
    ("reasoning", LAST, None, f"<bos>{GU}q1{GE}\n{GM}⟦a1{GE}⟧", UNLEARNED),
    (
        "thoughts",
        ALL,
        None,
        f"<bos>{GU}q1{GE}\n{GM}⟦<think>\nr1\n</think>\n\na1{GE}⟧\n{GU}q2{GE}\n{GM}⟦<think>\nr2\n</think>\n\na2{GE}⟧",
    ),
]
GEMMA3 = [*GEMMA, ("system", LAST, None, f"<bos>{GU}be brief\n\nq1{GE}\n{GM}⟦a1{GE}⟧")]

X, END = "<|end|>", "<|endoftext|>"
# EOS is after the last turn only.
PHI3 = [
    ("one turn", LAST, None, f"<|user|>\nq1{X}\n<|assistant|>\n⟦a1{X}\n{END}⟧"),
    (
        "two turns",
        ALL,
        None,
        f"<|user|>\nq1{X}\n<|assistant|>\n⟦a1{X}⟧\n<|user|>\nq2{X}\n<|assistant|>\n⟦a2{X}\n{END}⟧",
    ),
    ("system", LAST, None, f"<|system|>\nbe brief{X}\n<|user|>\nq1{X}\n<|assistant|>\n⟦a1{X}\n{END}⟧"),
    # The tool's answer is left out.
    (
        "call in words",
        LAST,
        TOOLS,
        f"<|user|>\nq1{X}\n<|assistant|>\nI look up the weather in Oslo.{X}\n<|assistant|>\n⟦a1{X}\n{END}⟧",
        UNSEEN,
        LOST,
    ),
]
PHI4_MINI = [
    ("one turn", LAST, None, f"<|user|>q1{X}<|assistant|>⟦a1{X}{END}⟧"),
    ("two turns", LAST, None, f"<|user|>q1{X}<|assistant|>a1{X}<|user|>q2{X}<|assistant|>⟦a2{X}{END}⟧"),
    ("two turns", ALL, None, f"<|user|>q1{X}<|assistant|>⟦a1{X}⟧<|user|>q2{X}<|assistant|>⟦a2{X}{END}⟧"),
    ("one turn", LAST, TOOLS, f"<|user|>q1{X}<|assistant|>⟦a1{X}{END}⟧", UNSEEN),
    (
        "tools as text",
        LAST,
        None,
        f'<|system|>be brief<|tool|>[{{"name": "weather"}}]<|/tool|>{X}<|user|>q1{X}<|assistant|>⟦a1{X}{END}⟧',
    ),
    ("reasoning", LAST, None, f"<|user|>q1{X}<|assistant|>⟦a1{X}{END}⟧", UNLEARNED),
    ("two questions", LAST, None, f"<|user|>q1{X}<|user|>q2{X}<|assistant|>⟦a2{X}{END}⟧"),
    ("two answers", ALL, None, f"<|user|>q1{X}<|assistant|>⟦a1{X}⟧<|assistant|>⟦a2{X}{END}⟧"),
    (
        "late system",
        ALL,
        None,
        f"<|user|>q1{X}<|assistant|>⟦a1{X}⟧<|system|>be brief{X}<|user|>q2{X}<|assistant|>⟦a2{X}{END}⟧",
    ),
]
FAMILIES = {
    "qwen3": QWEN,
    "llama3": LLAMA3,
    "mistral_v3": MISTRAL_V3,
    "mistral_v7": MISTRAL_V7,
    "gemma2": GEMMA,
    "gemma3": GEMMA3,
    "phi3": PHI3,
    "phi4_mini": PHI4_MINI,
    "smollm2": SMOLLM2,
    "smollm3": SMOLLM3,
}

ALTERNATE = r"Conversation roles must alternate user/assistant/user/assistant/\.\.\."
REFUSALS = [
    # What the template says itself.
    (
        "llama3",
        "two calls",
        ALL,
        r"is refused by the chat template \(This model only supports single tool-calls at once!\)",
    ),
    ("gemma2", "system", LAST, r"is refused by the chat template \(System role not supported\)"),
    ("gemma2", "call", ALL, rf"is refused by the chat template \({ALTERNATE}\)"),
    ("gemma3", "late system", LAST, rf"is refused by the chat template \({ALTERNATE}\)"),
    ("gemma3", "two questions", LAST, rf"is refused by the chat template \({ALTERNATE}\)"),
    ("mistral_v3", "two questions", LAST, "is refused by the chat template .After the optional system message"),
    ("mistral_v3", "late system", LAST, "is refused by the chat template"),
    # A call is not content: its text would be lost without a word.
    ("llama3", "call in words", ALL, "has its message 1 changed by the chat template"),
    ("smollm2", "call", ALL, "has tool calls in its message 1 that the chat template leaves out"),
    ("smollm2", "call in words", ALL, "has tool calls in its message 1 that the chat template leaves out"),
    ("smollm3", "call", ALL, "has tool calls in its message 1 that the chat template leaves out"),
    ("smollm3", "call in words", ALL, "has tool calls in its message 1 that the chat template leaves out"),
    ("phi3", "call", ALL, "has tool calls in its message 1 that the chat template leaves out"),
    ("phi4_mini", "call in words", ALL, "has tool calls in its message 1 that the chat template leaves out"),
    # The reasoning of an older turn is cut off its text.
    (
        "qwen3",
        "thoughts",
        ALL,
        "has its message 1 rendered without its reasoning by the chat template when more messages",
    ),
    # The first of two answers is generated after an empty reasoning, which it has no longer as the second follows.
    ("qwen3", "two answers", ALL, "has the messages before its message 2 rendered differently by the chat template"),
    # The system prompt is left out once the answer is there.
    ("mistral_v3", "system", LAST, "has the messages before its message 2 rendered differently by the chat template"),
    ("think_opened", "one turn", LAST, r"generation prompt '<\|im_start\|>assistant\\n<think>\\n'"),
    ("think_opened", "thoughts", LAST, r"generation prompt '<\|im_start\|>assistant\\n<think>\\n'"),
]
