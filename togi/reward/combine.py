"""The sum of several reward sources. Not here: weights and clipping."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from togi.errors import RewardError
from togi.reward.source import Reward
from togi.sample import Outcome, Rollout, Score


class SumReward:
    """Asks every source at the same time and adds their scores; the components of all sources are kept."""

    def __init__(self, sources: Sequence[Reward]) -> None:
        self._sources = tuple(sources)

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        """The sums, one per rollout. Raises RewardError as the sources do, and when two name a component alike."""
        columns = await asyncio.gather(*(source.score(group) for source in self._sources))
        return [add_scores(row) for row in zip(*columns, strict=True)]

    async def close(self) -> None:
        for source in self._sources:
            await source.close()


def add_scores(parts: Sequence[Score]) -> Score:
    """One rollout's scores from several sources as one.

    An error anywhere is an error; otherwise an abstention anywhere abstains: a sum that lacks a term cannot be compared
    with the complete sums of the same group.
    """
    components: dict[str, float] = {}
    for part in parts:
        for name, value in part.components.items():
            if name in components:
                raise RewardError(f"Two reward sources both name a component {name!r}; rename one of them.")
            components[name] = value
    message = " ".join(part.message for part in parts if part.message)
    for outcome in (Outcome.ERROR, Outcome.ABSTAIN):
        if any(part.outcome is outcome for part in parts):
            return Score(outcome, components=components, message=message)
    return Score(Outcome.SCORE, value=sum(part.value for part in parts), components=components)
