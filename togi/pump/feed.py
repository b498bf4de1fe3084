"""The source of scored groups for the RL loop: generated here, or read from an earlier run (``replay``).

``take`` generates with the current weights and returns when every group is scored (``max_staleness = 0``, synchronous). Groups
are scored as they finish, while others still generate.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Protocol

from togi.data.loader import PromptLoader
from togi.pump.experience import ScoredGroup
from togi.pump.filtering import GroupFilter
from togi.reward.combine import ErrorLimit, LengthPenalties
from togi.reward.scores import Reward
from togi.rollout.collect import collect_groups
from togi.rollout.environment import Environment, Generate
from togi.rollout.tasks import all_or_none
from togi.sample import Prompt, Rollout

MAX_IN_FLIGHT = 4096


class Feed(Protocol):
    """The interface of the loop, which does not know when or where groups are made."""

    async def take(self, loader: PromptLoader, count: int, samples: int, step: int) -> list[ScoredGroup]:
        """The groups of the next ``count`` prompts, ``samples`` rollouts each, in the loader's order, for ``step``."""
        ...


class RolloutFeed:
    """Turns prompts into scored groups. With ``seed`` every sample has its own seed, whatever the timing.

    ``max_errors``: the largest share of samples whose reward may fail. ``penalties`` None: no length penalty. ``filtering`` None:
    every group is kept.
    """

    def __init__(
        self,
        environment: Environment,
        generate: Generate,
        reward: Reward,
        seed: int | None,
        max_errors: float,
        penalties: LengthPenalties | None = None,
        filtering: GroupFilter | None = None,
    ) -> None:
        self._environment = environment
        self._generate = generate
        self._reward = reward
        self._seed = seed
        self._max_errors = max_errors
        self._penalties = penalties
        self._filtering = filtering

    async def take(self, loader: PromptLoader, count: int, samples: int, step: int) -> list[ScoredGroup]:
        """Scored groups of the next prompts, ``samples`` rollouts each, in the loader's order.

        Takes ``count`` prompts, or with filtering as many as it takes to keep ``count`` groups; fewer at the end of an
        episode. The result includes filtered groups. Raises RewardError if more rewards fail than allowed, and
        ConfigError if too few groups are kept.
        """
        if self._filtering is None:
            return await self.run(loader.take(count), samples, f"step{step}")
        return await self._fill(self._filtering, loader, count, samples, f"step{step}")

    async def run(self, prompts: Sequence[Prompt], samples: int, name: str) -> list[ScoredGroup]:
        """Generate and score ``samples`` rollouts of each prompt, in order. ``name``: keeps the group ids of calls apart.

        Raises RewardError if more rewards fail than allowed.
        """
        limit = ErrorLimit(self._max_errors, len(prompts) * samples)
        places = {f"{name}/{place}/{prompt.id}": place for place, prompt in enumerate(prompts)}
        result: list[ScoredGroup | None] = [None] * len(prompts)

        async def score(group: Sequence[Rollout]) -> None:
            result[places[group[0].group_id]] = await self._scored(group, limit)

        # Scoring starts as soon as a group is complete, in any order; results go to the place of their prompt.
        groups = self._collected(zip(places, prompts, strict=True), samples, MAX_IN_FLIGHT)
        scoring: list[asyncio.Task[None]] = []
        try:
            async for group in groups:
                scoring.append(asyncio.create_task(score(group)))
                for task in scoring:
                    if task.done():
                        task.result()  # raises at the first failed reward, not after the last rollout
            await asyncio.gather(*scoring)
        finally:
            for task in scoring:
                task.cancel()
        assert all(group is not None for group in result)
        return [group for group in result if group is not None]

    async def _fill(
        self, filtering: GroupFilter, loader: PromptLoader, count: int, samples: int, name: str
    ) -> list[ScoredGroup]:
        """All groups that it took to keep ``count`` of them, or as many as the rest of the episode gives.

        Each of ``count`` places tries one prompt after the other until a group is kept. A prompt is taken only after
        that many have failed, so the choice of prompts does not depend on timing, and no group is generated for nothing.
        """
        groups: dict[int, ScoredGroup] = {}
        limit = ErrorLimit(self._max_errors, 0)
        free = asyncio.Semaphore(max(1, MAX_IN_FLIGHT // samples))

        def source() -> Iterator[tuple[int, Prompt]]:
            taken, episode = 0, loader.episode
            while loader.episode == episode and loader.remaining > 0:
                filtering.check_budget(taken, sum(not group.filtered for group in groups.values()), count)
                limit.total += samples
                yield taken, loader.take(1)[0]
                taken += 1

        prompts = source()

        async def place() -> None:
            for number, prompt in prompts:
                async with free:
                    group = await self._one(prompt, f"{name}/{number}/{prompt.id}", samples, limit)
                groups[number] = group
                if not group.filtered:
                    return

        await all_or_none(place() for _ in range(count))
        return [groups[number] for number in sorted(groups)]

    async def _one(self, prompt: Prompt, group_id: str, samples: int, limit: ErrorLimit) -> ScoredGroup:
        [group] = [group async for group in self._collected([(group_id, prompt)], samples, samples)]
        return await self._scored(group, limit)

    def _collected(
        self, prompts: Iterable[tuple[str, Prompt]], samples: int, most: int
    ) -> AsyncIterator[Sequence[Rollout]]:
        """The groups of ``prompts`` (group id, prompt), as they finish; at most ``most`` rollouts at once."""
        return collect_groups(
            prompts, self._environment, self._generate, n_samples=samples, max_in_flight=most, seed=self._seed
        )

    async def _scored(self, group: Sequence[Rollout], limit: ErrorLimit) -> ScoredGroup:
        scores = await self._reward.score(group)
        limit.count(scores)
        # Filter on the reward itself; a length penalty would make equal rewards differ.
        filtered = self._filtering is not None and not self._filtering.keeps(scores)
        if self._penalties is not None:
            scores = self._penalties.applied(group, scores)
        return ScoredGroup(tuple(group), tuple(scores), filtered)
