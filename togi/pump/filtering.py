"""Which groups teach something: dynamic sampling of DAPO (Yu et al. 2025, arXiv 2503.14476, section 3.2).

A group that all solve or none solves has no advantages, so its place goes to another prompt's. Here is the judgement;
``feed`` replaces, one for one, so that there are never more groups than a rollout trains on and nothing is left over.
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
    """Keeps a group with ``low < mean reward < high``. ``most``: groups generated for each one wanted, at most."""

    low: float
    high: float
    most: int
    on_error: OnRewardError

    @classmethod
    def of(cls, config: RLConfig) -> GroupFilter | None:
        """What ``--dynamic_filtering`` asks for; None without it."""
        low, high = config.dynamic_filtering_reward_range
        if not config.dynamic_filtering:
            return None
        return cls(low, high, config.dynamic_filtering_max_generations, config.on_reward_error)

    def keeps(self, scores: Sequence[Score]) -> bool:
        """Judge a group by the scores it has; one that could not be trained on is not kept either."""
        rewards = [score.value for score in scores if score.outcome is Outcome.SCORE]
        if not rewards or takes_group(scores, self.on_error):
            return False
        # Measured from the lowest reward, equal rewards have exactly that mean: rounding cannot push it off an end.
        lowest = min(rewards)
        mean = lowest + math.fsum(reward - lowest for reward in rewards) / len(rewards)
        return self.low < mean < self.high

    def check_budget(self, generated: int, kept: int, wanted: int) -> None:
        """Raise ConfigError when one more group would be too many. ``kept`` of those ``generated`` so far are in."""
        if generated >= self.most * wanted:
            raise ConfigError(
                f"--dynamic_filtering kept only {kept} of {generated} groups and the rollout needs {wanted}: give prompts that "
                f"are solved sometimes, widen --dynamic_filtering_reward_range {self.low:g} {self.high:g}, or raise "
                f"--dynamic_filtering_max_generations {self.most}."
            )
