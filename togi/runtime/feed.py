"""Where the RL loop takes its scored groups from: here by generating them, in ``replay`` from those of an earlier run.

``take`` generates with the present weights and returns when every group is scored: ``max_staleness = 0``, the synchronous
case. Groups are scored as they finish, while others still generate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from togi.data.loader import PromptLoader
from togi.reward.combine import ErrorLimit
from togi.reward.source import Reward
from togi.rollout.collect import collect_groups
from togi.rollout.environment import Environment, Generate
from togi.runtime.experience import ScoredGroup
from togi.sample import Prompt, Rollout

MAX_IN_FLIGHT = 4096


class Feed(Protocol):
    """What the loop asks: it does not know when or by whom groups were made."""

    async def take(self, loader: PromptLoader, count: int, samples: int, step: int) -> list[ScoredGroup]:
        """The groups of the next ``count`` prompts, ``samples`` rollouts each, in the loader's order, for ``step``."""
        ...


class RolloutFeed:
    """Prompts in, scored groups out. With ``seed`` every sample has a seed of its own, whatever the timing.

    ``max_errors``: the largest share of samples whose reward may fail.
    """

    def __init__(
        self, environment: Environment, generate: Generate, reward: Reward, seed: int | None, max_errors: float
    ) -> None:
        self._environment = environment
        self._generate = generate
        self._reward = reward
        self._seed = seed
        self._max_errors = max_errors

    async def take(self, loader: PromptLoader, count: int, samples: int, step: int) -> list[ScoredGroup]:
        """The groups of the next ``count`` prompts, ``samples`` rollouts each, in the loader's order."""
        return await self.run(loader.take(count), samples, f"step{step}")

    async def run(self, prompts: Sequence[Prompt], samples: int, name: str) -> list[ScoredGroup]:
        """Generate and score ``samples`` rollouts of each prompt, in order. ``name`` keeps group ids of calls apart.

        Raises RewardError when more rewards fail than are allowed.
        """
        limit = ErrorLimit(self._max_errors, len(prompts) * samples)
        places = {f"{name}/{place}/{prompt.id}": place for place, prompt in enumerate(prompts)}
        result: list[ScoredGroup | None] = [None] * len(prompts)

        async def score(group: Sequence[Rollout]) -> None:
            scores = await self._reward.score(group)
            limit.count(scores)
            result[places[group[0].group_id]] = ScoredGroup(tuple(group), tuple(scores))

        groups = collect_groups(
            zip(places, prompts, strict=True),
            self._environment,
            self._generate,
            n_samples=samples,
            max_in_flight=MAX_IN_FLIGHT,
            seed=self._seed,
        )
        scoring: list[asyncio.Task[None]] = []
        try:
            async for group in groups:
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
