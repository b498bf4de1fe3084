"""Numbers for evaluation reports: pass@k and a mean with its standard error. Plain Python, no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over ``count`` independent units and its standard error (NaN for one unit: unknown, not zero)."""

    mean: float
    standard_error: float
    count: int


def expected_best(values: Sequence[float], k: int) -> float:
    """The expected greatest of ``k`` of the values, drawn without replacement: pass@k for any rewards.

    ``sum over i of C(i - 1, k - 1) / C(n, k) x the i-th smallest``, since so many of the draws have that one as their greatest.
    For values 0 and 1 it is the unbiased pass@k of Chen et al. 2021 (arXiv 2107.03374); for ``k`` = n the greatest of all.
    Exact integers, so no overflow. Needs ``1 <= k <= n``.
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
