"""An agent on the official client of OpenAI alone: it computes with a tool, over several turns (``pip install openai``).

    togi rl --agent examples/agents/openai_agent.py:run --prompt_data sums.jsonl --apply_chat_template ...

A row has a ``question`` (or ``prompt``) and its ``answer``: {"question": "What is (17 + 4) * 12?", "answer": "252"}. Nothing here
knows of training: ``run`` is given where the model is, and returns what the episode was worth. The client finds the key in
OPENAI_API_KEY.
"""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Mapping
from typing import Any

try:
    from openai import AsyncOpenAI
except ModuleNotFoundError:
    raise ModuleNotFoundError("This agent needs the client of OpenAI: pip install openai") from None

TURNS = 8
MODEL = "policy"
SYSTEM = "Use the tool compute for every sum. When you know the result, answer with the number alone."
COMPUTE = {
    "type": "function",
    "function": {
        "name": "compute",
        "description": "Compute an expression of numbers, + - * / and brackets.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "Such as (1 + 2) * 3."}},
            "required": ["expression"],
        },
    },
}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


async def run(base_url: str, task: Mapping[str, Any]) -> float:
    """One episode: 1 if the last answer is the right number, else 0."""
    question = task["question"] if "question" in task else task["prompt"]
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    async with AsyncOpenAI(base_url=base_url) as client:
        for _ in range(TURNS):
            completion = await client.chat.completions.create(model=MODEL, messages=messages, tools=[COMPUTE])
            message = completion.choices[0].message
            # As it came: what was answered must be sent back unchanged, or the model reads another text than it wrote.
            messages.append(message.model_dump(exclude_none=True))
            if not message.tool_calls:
                return float((message.content or "").strip() == str(task["answer"]))
            for call in message.tool_calls:
                result = called(call.function.name, call.function.arguments)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return 0.0


def called(name: str, arguments: str) -> str:
    """The result of a call, or what is wrong with it: the model may write anything."""
    if name != "compute":
        return f"There is no tool {name}, only compute."
    try:
        value = computed(ast.parse(json.loads(arguments)["expression"], mode="eval").body)
    except (ValueError, KeyError, TypeError, SyntaxError, ArithmeticError, RecursionError) as error:
        return f"That cannot be computed: {type(error).__name__}."
    return str(value)


def computed(node: ast.expr) -> float:
    """The value of an expression. Raises ValueError for one that is not of numbers and the four operations."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -computed(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](computed(left), computed(right))
    raise ValueError("no arithmetic")
