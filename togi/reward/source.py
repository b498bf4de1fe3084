"""The one protocol of every source of rewards.

Here: what a source promises. Not here: how advantages are made of scores, clipping, filtering (``togi.algo``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from togi.sample import Rollout, Score


class Reward(Protocol):
    """Scores finished rollouts, always a whole group (all samples of one prompt) in one call."""

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        """One ``Score`` per rollout, in the order of ``group``. Calls for different groups may overlap.

        A source that failed, hung, or returned something that is not a number gives the outcome error. Raises RewardError
        for what cannot get better: a function that cannot be loaded, a server that stays away.
        """
        ...

    async def close(self) -> None:
        """Release processes and connections. The source cannot be used afterwards."""
        ...
