"""Choosing among several answers to one prompt by their rewards. Plain Python; who asks keeps the answers.

Best-of-n as in Stiennon et al., "Learning to summarize from human feedback", 2020 (rejection sampling); best and worst as
preference pairs: Dong et al., "RLHF Workflow", 2024; z-scores for conditional SFT: Hu et al., "Aligning Language Models
with Offline Learning from Human Feedback", 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def best(rewards: Sequence[float]) -> int:
    """The place of the greatest reward; the first of equals."""
    return max(range(len(rewards)), key=lambda i: rewards[i])


def best_and_worst(rewards: Sequence[float]) -> tuple[int, int] | None:
    """The places of the greatest and the least reward, each the first of its equals; None if all rewards are equal."""
    chosen = best(rewards)
    rejected = min(range(len(rewards)), key=lambda i: rewards[i])
    return None if rewards[chosen] == rewards[rejected] else (chosen, rejected)


def standardized(rewards: Sequence[float]) -> list[float]:
    """``(r - mean) / std`` with the unbiased standard deviation; all 0 where there is no spread to divide by."""
    count = len(rewards)
    if count < 2:
        return [0.0] * count
    mean = math.fsum(rewards) / count
    std = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (count - 1))
    if max(rewards) == min(rewards) or std == 0:
        return [0.0] * count
    return [(reward - mean) / std for reward in rewards]
