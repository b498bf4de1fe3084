"""Rewards from a scalar model that runs elsewhere.

This module converts rollouts to token ids and scalars to ``Score``, and standardises. The callable owns the model, its
devices, its head and its micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from togi.errors import RewardError
from togi.sample import Outcome, Rollout, Score

ScoreTokens = Callable[[Sequence[Sequence[int]]], Awaitable[Sequence[float]]]


@dataclass(frozen=True, slots=True)
class Standardization:
    """``(r - mean) / std`` with the numbers in a reward model's config (``--normalize_reward``)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise RewardError(
                f"The reward model's config has mean {self.mean} and std {self.std}, which cannot standardise rewards; "
                "drop --normalize_reward or store finite numbers with std > 0."
            )

    def __call__(self, reward: float) -> float:
        return (reward - self.mean) / self.std


class LocalModelReward:
    """The scalar of a reward model at the last token of prompt + response.

    ``score_tokens``: maps token id sequences to one float each. ``component``: the name of the score in logs.
    """

    def __init__(
        self,
        score_tokens: ScoreTokens,
        standardization: Standardization | None = None,
        component: str = "reward_model",
    ) -> None:
        self._score_tokens = score_tokens
        self._standardize = Standardization() if standardization is None else standardization
        self._component = component

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        """One score per rollout; an error where the model's output is not finite."""
        sequences = [rollout.prompt.tokens + rollout.response_tokens for rollout in group]
        rewards = await self._score_tokens(sequences)
        assert len(rewards) == len(group), "score_tokens must return one float per sequence"
        return [self._as_score(float(reward), rollout) for reward, rollout in zip(rewards, group, strict=True)]

    def _as_score(self, reward: float, rollout: Rollout) -> Score:
        if not math.isfinite(reward):
            message = (
                f"{self._component} gave {reward} for a sample of prompt {rollout.prompt.id!r} "
                f"(response: {rollout.response_text[:80]!r}); check the model's weights and its number format."
            )
            return Score(Outcome.ERROR, message=message)
        value = self._standardize(reward)
        return Score(Outcome.SCORE, value=value, components={self._component: value})

    async def close(self) -> None:
        """Nothing to release: the owner of the callable stops the model."""
