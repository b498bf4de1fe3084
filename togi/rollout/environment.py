"""What a policy acts in. An environment gets a callable that generates, so a scripted one tests it.

Not here: rewards (they see whole groups), agents with tools (they implement ``Environment`` elsewhere).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from togi.sample import Generation, Prompt, Rollout, Sampling

Generate = Callable[[Sequence[int], Sampling], Awaitable[Generation]]


class Environment(Protocol):
    """Turns one prompt into one trajectory. One instance serves many concurrent calls, so ``run`` keeps its state local."""

    async def run(self, prompt: Prompt, group_id: str, generate: Generate) -> Rollout:
        """Token ids only ever get appended: what was generated is passed on as it is, never decoded and encoded again."""
        ...


@dataclass(frozen=True, slots=True)
class SingleTurn:
    """The simplest environment: one prompt, one response. ``decode`` makes the text that rewards and people read."""

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
