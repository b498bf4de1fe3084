"""A proxy whose policy says what a test wants, in tokens that no tokenizer would choose, and the official client for it.

``ChatML`` renders by the project's own functions for chat templates: a conversation that begins with what was sampled goes on from
these tokens.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache

from openai import AsyncOpenAI
from transformers import PreTrainedTokenizerFast

from tests.records import SMOL
from togi.data.chat import encode, load_tokenizer, render_messages, visible
from togi.data.messages import Dialogue, Message, Tool
from togi.env.proxy import Proxy
from togi.env.session import Limits, Session
from togi.rollout.collect import Generate
from togi.sample import FinishReason, Generation, Prompt, Rollout, Sampling

TEMPLATE = """{% if tools %}<|im_start|>system
Tools: {{ tools | tojson }}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message.raw %}{{ message.raw.removesuffix('<|im_end|>') }}{% else %}{{ message['content'] }}
{%- for call in message.get('tool_calls', []) %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}
{%- endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SAMPLING = Sampling(max_tokens=64)
LIMITS = Limits(tokens=4000, requests=100, context=2000)
PROMPT = Prompt("0:7", (), "", "42", row={"question": "What is 6 * 7?"}, messages=({"role": "user", "content": "Hi"},))


class ChatML:
    """ChatML with Hermes' calls and ``<think>``. An answer that was sampled is rendered as its own text (``raw``)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def first(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[int, ...]:
        return self._ids(self._text(messages, tools))

    def after(self, before: Sequence[int], messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[int, ...]:
        text, begun = self._text(messages, tools), visible(self.tokenizer, before)
        return (*before, *self._ids(text[len(begun) :])) if text.startswith(begun) else self._ids(text)

    def said(self, ids: Sequence[int], tools: Sequence[Tool]) -> Message:
        text = visible(self.tokenizer, ids).removesuffix("<|im_end|>")
        thought = re.match(r"<think>(.*?)</think>", text, re.DOTALL)
        text = text[thought.end() :] if thought else text
        calls = [json.loads(call) for call in re.findall(r"<tool_call>(.*?)</tool_call>", text)]
        content = text.partition("<tool_call>")[0] if calls else text
        message: dict[str, object] = {"role": "assistant", "content": content, "raw": visible(self.tokenizer, ids)}
        if thought:
            message["reasoning_content"] = thought[1]
        if calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{n}",
                    "type": "function",
                    "function": {**call, "arguments": json.dumps(call["arguments"])},
                }
                for n, call in enumerate(calls)
            ]
        return message

    def _text(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        return render_messages(Dialogue(tuple(messages), tuple(tools)), self.tokenizer, add_generation_prompt=True)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(encode([text], self.tokenizer, add_special_tokens=False)[0]) if text else ()


@cache
def smol() -> PreTrainedTokenizerFast:
    return load_tokenizer(str(SMOL), chat_template=TEMPLATE, trust_remote_code=False)


class Policy:
    """Says ``script`` of (context as text, how many requests before), a character at a time: never the tokenizer's own tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, script: Callable[[str, int], str], delay: float = 0.0
    ) -> None:
        self.tokenizer, self.script, self.delay = tokenizer, script, delay
        self.contexts = list[tuple[int, ...]]()
        self.sampled = list[tuple[int, ...]]()
        self.sampling = list[Sampling]()
        self.gate = asyncio.Event()
        self.gate.set()

    def spelled(self, text: str) -> tuple[int, ...]:
        marks = re.split(r"(<\|im_end\|>)", text)
        parts = [[mark] if mark.startswith("<|") else list(mark) for mark in marks]
        return tuple(self.tokenizer(c, add_special_tokens=False)["input_ids"][0] for part in parts for c in part)

    async def generate(self, prompt_tokens: Sequence[int], sampling: Sampling) -> Generation:
        number = len(self.contexts)
        self.contexts.append(tuple(prompt_tokens))
        self.sampling.append(sampling)
        await asyncio.sleep(self.delay)
        await self.gate.wait()
        tokens = self.spelled(self.script(visible(self.tokenizer, prompt_tokens), number))
        cut = tokens[: sampling.max_tokens]
        self.sampled.append(cut)
        reason = FinishReason.STOP if cut == tokens else FinishReason.LENGTH
        logprobs = tuple(-(number + 1) / (n + 2) for n in range(len(cut)))
        return Generation(cut, logprobs, reason, (number,) * len(cut))


def answers(*texts: str) -> Callable[[str, int], str]:
    """A script that says these one after the other, each with the end of a turn."""
    return lambda context, number: texts[number] + "<|im_end|>"


@asynccontextmanager
async def episode(
    generate: Generate, sampling: Sampling = SAMPLING, limits: Limits = LIMITS, **client: object
) -> AsyncIterator[tuple[AsyncOpenAI, Session]]:
    """A proxy, one session, and a client of it."""
    tokenizer = smol()
    async with (
        Proxy(ChatML(tokenizer), tokenizer) as proxy,
        proxy.session(PROMPT, generate, sampling, limits) as session,
        AsyncOpenAI(base_url=proxy.base_url, api_key=session.key, **client) as openai,  # type: ignore[arg-type]
    ):
        yield openai, session


def sampled(rollout: Rollout) -> tuple[int, ...]:
    """The tokens of a rollout that the policy chose."""
    return tuple(token for token, own in zip(rollout.response_tokens, rollout.response_mask, strict=True) if own)


def whole(rollout: Rollout) -> tuple[int, ...]:
    """All tokens of a rollout."""
    return rollout.prompt.tokens + rollout.response_tokens
