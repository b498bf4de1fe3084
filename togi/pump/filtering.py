"""Filter groups that teach nothing: dynamic sampling of DAPO (Yu et al. 2025, arXiv 2503.14476, section 3.2).

A group whose answers are all right or all wrong has zero advantages, so another prompt's group replaces it. This module decides;
``feed`` replaces one for one, so there are never more kept groups than a rollout trains on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from togi.config.choices import OnRewardError
from togi.config.rl import RLConfig
from togi.errors import ConfigError
from togi.pump.experience import takes_group
from togi.sample import Outcome, Score


@dataclass(frozen=True, slots=True)
class GroupFilter:
    """Keeps a group with ``low < mean reward < high``. ``most``: the largest number of groups generated per wanted group."""

    low: float
    high: float
    most: int
    on_error: OnRewardError

    @classmethod
    def of(cls, config: RLConfig) -> GroupFilter | None:
        """The filter of ``--dynamic_filtering``; None without it."""
        low, high = config.dynamic_filtering_reward_range
        if not config.dynamic_filtering:
            return None
        return cls(low, high, config.dynamic_filtering_max_generations, config.on_reward_error)

    def keeps(self, scores: Sequence[Score]) -> bool:
        """Whether a group is kept, by the scores that it has. A group that cannot be trained on is not kept."""
        rewards = [score.value for score in scores if score.outcome is Outcome.SCORE]
        if not rewards or takes_group(scores, self.on_error):
            return False
        # Measured from the lowest reward, the mean of equal rewards is exact: rounding cannot move it across a limit.
        lowest = min(rewards)
        mean = lowest + math.fsum(reward - lowest for reward in rewards) / len(rewards)
        return self.low < mean < self.high

    def check_budget(self, generated: int, kept: int, wanted: int) -> None:
        """Raise ConfigError if one more group would exceed the limit. ``kept``: how many of ``generated`` were kept."""
        if generated >= self.most * wanted:
            raise ConfigError(
                f"--dynamic_filtering kept only {kept} of {generated} groups and the rollout needs {wanted}: give prompts that "
                f"are solved sometimes, widen --dynamic_filtering_reward_range {self.low:g} {self.high:g}, or raise "
                f"--dynamic_filtering_max_generations {self.most}."
            )
