"""A small environment of ``verifiers`` to try ``verifiers_agent.py`` with: spell a word backwards, without any download.

A module like this, with a ``Taskset`` (and perhaps a ``Harness``) in ``__all__``, is what verifiers means by an environment; its
name is the id. The harness talks to the model within this process; those that come with verifiers start programs, and
install packages for them at the first time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import verifiers.v1 as vf
from openai import AsyncOpenAI

__all__ = ["Chat", "Words"]
WORDS = ("stone", "river", "cloud", "ember")


class WordData(vf.TaskData):
    """A word, beside the prompt."""

    word: str


class WordTask(vf.Task[WordData, vf.State]):
    """Scores the last answer."""

    @vf.reward()
    async def backwards(self, trace: vf.Trace) -> float:
        """1 for the word backwards, and half of it for its letters in another order."""
        answer = (trace.last_reply or "").strip()
        if answer == self.data.word[::-1]:
            return 1.0
        return 0.5 * (sorted(answer) == sorted(self.data.word))


class Words(vf.Taskset[WordTask, vf.TasksetConfig]):
    """A task for each word."""

    def load(self) -> Iterator[WordTask]:
        for word in WORDS:
            yield WordTask(WordData(prompt=f"Spell '{word}' backwards.", word=word), self.config.task)


class ChatConfig(vf.HarnessConfig):
    """Nothing to set."""


class Chat(vf.Harness[ChatConfig]):
    """One question, one answer."""

    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
        **others: Any,
    ) -> vf.ProgramResult:
        _, prompt = self.resolve_prompt(data)
        async with AsyncOpenAI(base_url=endpoint, api_key=secret) as client:
            await client.chat.completions.create(model=ctx.model, messages=[{"role": "user", "content": prompt}])
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")
