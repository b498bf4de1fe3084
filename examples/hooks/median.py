"""An advantage estimator of one's own: each score against the median of its group, which one lucky answer cannot move.

    togi rl --advantage_estimator examples/hooks/median.py:median_baseline ...

What an estimator is given and what it returns: ``togi.learn.hooks``.
"""

from __future__ import annotations

from torch import Tensor


def median_baseline(rewards_N: Tensor, groups_N: Tensor, sequences_K: Tensor, penalties_K: Tensor) -> Tensor:
    """Reward less the (lower) median reward of the same prompt, at every token, less the token's KL penalty."""
    advantages_N = rewards_N.clone()
    for group in groups_N.unique():
        members_N = groups_N == group
        advantages_N[members_N] -= rewards_N[members_N].median()
    return advantages_N[sequences_K] - penalties_K
