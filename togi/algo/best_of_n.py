"""Choose among several answers to one prompt by their rewards, and estimate the expected best. Plain Python on rewards alone.

Best-of-n as in Stiennon et al., "Learning to summarize from human feedback", 2020 (rejection sampling); best and worst as
preference pairs: Dong et al., "RLHF Workflow", 2024; z-scores for conditional SFT: Hu et al., "Aligning Language Models
with Offline Learning from Human Feedback", 2023.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


def best(rewards: Sequence[float]) -> int:
    """The index of the greatest reward; the first among equals."""
    return max(range(len(rewards)), key=lambda i: rewards[i])


def best_and_worst(rewards: Sequence[float]) -> tuple[int, int] | None:
    """The indices of the greatest and the least reward, each the first among equals. None if all rewards are equal."""
    chosen = best(rewards)
    rejected = min(range(len(rewards)), key=lambda i: rewards[i])
    return None if rewards[chosen] == rewards[rejected] else (chosen, rejected)


def standardized(rewards: Sequence[float]) -> list[float]:
    """``(r - mean) / std`` with the unbiased standard deviation; all 0 if the rewards do not differ."""
    count = len(rewards)
    if count < 2:
        return [0.0] * count
    mean = math.fsum(rewards) / count
    std = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (count - 1))
    if max(rewards) == min(rewards) or std == 0:
        return [0.0] * count
    return [(reward - mean) / std for reward in rewards]


# Numbers for evaluation reports: pass@k and a mean with its standard error. Plain Python, no tensors.


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over ``count`` independent units and its standard error (NaN for one unit: unknown, not zero)."""

    mean: float
    standard_error: float
    count: int


def expected_best(values: Sequence[float], k: int) -> float:
    """The expected maximum of ``k`` values drawn without replacement: pass@k for any rewards.

    ``sum over i of C(i - 1, k - 1) / C(n, k) x the i-th smallest value``: the share of draws with that value as their maximum.
    For values 0 and 1 it is the unbiased pass@k of Chen et al. 2021 (arXiv 2107.03374); for ``k`` = n it is the maximum.
    The binomials are exact integers and cannot overflow. Needs ``1 <= k <= n``.
    """
    n = len(values)
    assert 1 <= k <= n, f"the best of {k} is undefined for {n} values"
    total = math.comb(n, k)
    return math.fsum(math.comb(i, k - 1) / total * value for i, value in enumerate(sorted(values)))


def reported_ks(n: int) -> list[int]:
    """The k of pass@k that are reported for ``n`` samples: 1, 2, 4, ... and n."""
    return sorted({*(1 << i for i in range(n.bit_length())), n})


def mean_with_error(values: Sequence[float]) -> Estimate:
    """The mean and its standard error, ``sqrt(unbiased variance / count)``.

    Units must be independent: with several samples of one prompt, give one number per prompt.
    """
    count = len(values)
    assert count > 0, "no values to average"
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count), count)
