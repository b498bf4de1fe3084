"""The environment in which a policy acts. It gets a callable that generates, so that tests can pass a scripted one.

Not here: rewards (they see whole groups), agents with tools (which implement ``Environment`` elsewhere).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from togi.sample import Generation, Prompt, Rollout, Sampling

Generate = Callable[[Sequence[int], Sampling], Awaitable[Generation]]


class Environment(Protocol):
    """Turns one prompt into one trajectory. One instance serves many concurrent calls, so ``run`` must keep its state local."""

    async def run(self, prompt: Prompt, group_id: str, generate: Generate) -> Rollout:
        """Run one trajectory. Token ids may only be appended: generated ids are passed on, never decoded and encoded again."""
        ...


@dataclass(frozen=True, slots=True)
class SingleTurn:
    """The simplest environment: one prompt, one response. ``decode`` makes the text for rewards and logs."""

    decode: Callable[[Sequence[int]], str]
    sampling: Sampling

    async def run(self, prompt: Prompt, group_id: str, generate: Generate) -> Rollout:
        generation = await generate(prompt.tokens, self.sampling)
        return Rollout(
            prompt=prompt,
            group_id=group_id,
            response_tokens=generation.tokens,
            response_mask=(True,) * len(generation.tokens),
            response_logprobs=generation.logprobs,
            response_text=self.decode(generation.tokens),
            finish_reason=generation.finish_reason,
            policy_version=generation.policy_version,
        )
