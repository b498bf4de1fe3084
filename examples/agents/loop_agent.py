"""An agent without any client: a loop of its own over HTTP, in which the model writes its actions as text.

    togi rl --agent examples/agents/loop_agent.py:run --prompt_data rooms.jsonl --apply_chat_template ...

Agents of smolagents, LangGraph and their like come down to this: steps that pass a state on, of which one asks the model. A row
has a ``question``, its ``answer``, and the ``notes`` that can be looked up: {"question": "Where does Ann's brother live?",
"answer": "Rome", "notes": {"Ann": "Her brother is Bob.", "Bob": "He lives in Rome."}}. The standard library does for the rest.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TURNS = 8
SECONDS = 600.0
STEP = re.compile(r"^(Look up|Answer):(.*)$", re.MULTILINE)
RULES = (
    "Answer the question. Think, then end with one line: 'Look up: NAME' to read the note of that name, or 'Answer: TEXT'. "
    "There are notes of {names}.\n\n{question}"
)


@dataclass
class State:
    """What one step leaves to the next. ``found``: the answer, once there is one."""

    base_url: str
    task: Mapping[str, Any]
    messages: list[dict[str, str]]
    turns: int = 0
    found: str = ""
    seen: list[str] = field(default_factory=list)


async def run(base_url: str, task: Mapping[str, Any]) -> dict[str, float]:
    """One episode: 1 for the right answer, and a tenth for having read a note."""
    rules = RULES.format(names=", ".join(task["notes"]), question=task["question"])
    state = State(base_url, task, [{"role": "user", "content": rules}])
    step = think
    while step is not None:
        step = await step(state)
    parts = {"answer": float(state.found == task["answer"]), "read": 0.1 * bool(state.seen)}
    return {"reward": sum(parts.values()), **parts}


async def think(state: State) -> Any:
    """Ask the model."""
    if state.turns == TURNS:
        return None
    state.turns += 1
    # urllib waits, and other episodes must not wait with it.
    text = await asyncio.to_thread(ask, state.base_url, state.messages)
    state.messages.append({"role": "assistant", "content": text})
    return act


async def act(state: State) -> Any:
    """Do what the last line of the answer says that is an action."""
    steps = STEP.findall(state.messages[-1]["content"])
    kind, what = steps[-1] if steps else ("", "")
    if kind == "Answer":
        state.found = what.strip()
        return None
    if kind == "Look up" and what.strip() in state.task["notes"]:
        state.seen.append(what.strip())
        return told(state, state.task["notes"][what.strip()])
    return told(
        state, f"There is no note of {what.strip()}." if kind else "End with 'Look up: NAME' or 'Answer: TEXT'."
    )


def told(state: State, text: str) -> Any:
    """Tell the model what came of its action."""
    state.messages.append({"role": "user", "content": text})
    return think


def ask(base_url: str, messages: list[dict[str, str]]) -> str:
    """One request to the interface of chat completions."""
    body = json.dumps({"model": "policy", "messages": messages}).encode()
    key = os.environ.get("OPENAI_API_KEY", "")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{base_url.rstrip('/')}/chat/completions", body, headers)
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        text: str = json.load(response)["choices"][0]["message"]["content"] or ""
    return text
