"""A policy loss of one's own: SPO (arXiv 2401.16025), which pulls the ratio back where PPO only stops pushing it.

    togi rl --policy_loss_type examples/hooks/spo.py:spo ...

What a loss is given and what it returns: ``togi.learn.hooks``.
"""

from __future__ import annotations

from torch import Tensor


def spo(logprobs_K: Tensor, old_logprobs_K: Tensor, advantages_K: Tensor, clip_high: float) -> Tensor:
    """``-(r A - |A| (r - 1)^2 / (2 eps))`` a token, with ``r`` the ratio and ``eps`` the upper clip."""
    ratio_K = (logprobs_K - old_logprobs_K).exp()
    return -(ratio_K * advantages_K - advantages_K.abs() * (ratio_K - 1) ** 2 / (2 * clip_high))
