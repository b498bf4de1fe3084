"""Where the RL loop takes its scored groups from.

``take`` generates with the present weights and returns when every group is scored: ``max_staleness = 0``, the synchronous
case. Groups are scored as they finish, while others still generate.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence

from togi.data.loader import PromptLoader
from togi.reward.source import Reward
from togi.rollout.collect import collect
from togi.rollout.environment import Environment
from togi.runtime.experience import ScoredGroup
from togi.sample import Generation, Prompt, Rollout, Sampling

Generate = Callable[[Sequence[int], Sampling], Awaitable[Generation]]
MAX_GROUPS_IN_FLIGHT = 1024


class RolloutFeed:
    """Prompts in, scored groups out."""

    def __init__(self, environment: Environment, generate: Generate, reward: Reward) -> None:
        self._environment = environment
        self._generate = generate
        self._reward = reward

    async def take(self, loader: PromptLoader, count: int, samples: int, step: int) -> list[ScoredGroup]:
        """The groups of the next ``count`` prompts, ``samples`` rollouts each, in the loader's order."""
        return await self.run(loader.take(count), samples, f"step{step}")

    async def run(self, prompts: Sequence[Prompt], samples: int, name: str) -> list[ScoredGroup]:
        """Generate and score ``samples`` rollouts of each prompt, in order. ``name`` keeps group ids of calls apart."""
        places = {f"{name}/{place}/{prompt.id}": place for place, prompt in enumerate(prompts)}
        result: list[ScoredGroup | None] = [None] * len(prompts)

        async def score(group: Sequence[Rollout]) -> None:
            scores = await self._reward.score(group)
            result[places[group[0].group_id]] = ScoredGroup(tuple(group), tuple(scores))

        named = list(zip(places, prompts, strict=True))
        scoring: list[asyncio.Task[None]] = []
        try:
            async for group in collect(self._environment, named, self._generate, samples):
                scoring.append(asyncio.create_task(score(group)))
                for task in scoring:
                    if task.done():
                        task.result()  # a reward that failed stops the run at once, not after the last rollout
            await asyncio.gather(*scoring)
        finally:
            for task in scoring:
                task.cancel()
        assert all(group is not None for group in result)
        return [group for group in result if group is not None]


def sample_seed(*parts: object) -> int:
    """A seed for one sample that depends only on what it is, so that a run repeats whatever engine serves it."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")
