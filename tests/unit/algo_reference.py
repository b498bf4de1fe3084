"""The formulas of online RL a second time: plain Python from the definitions, loops and exact fractions, no torch.

Independent on purpose: nothing here is imported from togi.
"""

from __future__ import annotations

import math
from fractions import Fraction


def baselined(estimator: str, rewards: list[float], groups: list[int]) -> list[float]:
    shaped = []
    for i, reward in enumerate(rewards):
        group = [Fraction(r) for r, g in zip(rewards, groups, strict=True) if g == groups[i]]
        others = [Fraction(r) for j, r in enumerate(rewards) if groups[j] == groups[i] and j != i]
        mean = sum(group) / len(group)
        if estimator in ("gae", "reinforce"):
            shaped.append(reward)
        elif not others:
            shaped.append(0.0)
        elif estimator == "rloo":
            shaped.append(float(Fraction(reward) - sum(others) / len(others)))
        elif estimator in ("reinforce_baseline", "dr_grpo"):
            shaped.append(float(Fraction(reward) - mean))
        elif estimator == "group_norm":
            variance = sum((r - mean) ** 2 for r in group) / (len(group) - 1)
            shaped.append(float(Fraction(reward) - mean) / (math.sqrt(variance) + 1e-9))
        else:
            raise AssertionError(estimator)
    return shaped


def split(stream: list[float], lengths: list[int]) -> list[list[float]]:
    """A flat stream as one list for each sequence."""
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    return [stream[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def token_rewards(scores: list[float], kls: list[list[float]], coef: float) -> list[list[float]]:
    out = []
    for score, kl in zip(scores, kls, strict=True):
        out.append([-coef * k + (score if t == len(kl) - 1 else 0.0) for t, k in enumerate(kl)])
    return out


def returns(rewards: list[float], gamma: float) -> list[float]:
    return [math.fsum(gamma ** (s - t) * rewards[s] for s in range(t, len(rewards))) for t in range(len(rewards))]


def gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    following = [*values, 0.0][1:]
    deltas = [r + gamma * w - v for r, v, w in zip(rewards, values, following, strict=True)]
    advantages = returns(deltas, gamma * lam)
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def normalized(advantages: list[float], mean_only: bool) -> list[float]:
    if not advantages:
        return []
    exact = [Fraction(a) for a in advantages]
    mean = sum(exact) / len(exact)
    scale = 1.0 if mean_only else max(float(sum((a - mean) ** 2 for a in exact) / len(exact)), 1e-8) ** -0.5
    return [float(a - mean) * scale for a in exact]


def advantages(
    estimator: str,
    scores: list[float],
    groups: list[int],
    kls: list[list[float]],
    values: list[list[float]],
    *,
    clip: tuple[float, float],
    coef: float,
    gamma: float,
    lam: float,
    mean_only: bool,
) -> tuple[list[float], list[float]]:
    """Everything composed; advantages and returns, flat."""
    shaped = [min(max(s, clip[0]), clip[1]) for s in baselined(estimator, scores, groups)]
    flat_advantages: list[float] = []
    flat_returns: list[float] = []
    for reward, value in zip(token_rewards(shaped, kls, coef), values, strict=True):
        if estimator == "gae":
            a, r = gae(reward, value, gamma, lam)
        else:
            a = r = returns(reward, gamma)
        flat_advantages += a
        flat_returns += r
    if estimator in ("gae", "reinforce", "rloo", "reinforce_baseline"):
        flat_advantages = normalized(flat_advantages, mean_only)
    return flat_advantages, flat_returns


def kl(lp: float, ref: float, estimator: str) -> float:
    d = lp - ref
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]


def policy(lp: float, old: float, a: float, low: float, high: float, dual: float | None) -> float:
    ratio = math.exp(min(max(lp - old, -20.0), 20.0))
    surrogate = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
    if dual is not None and a < 0:
        surrogate = max(surrogate, dual * a)
    return -surrogate


def value(v: float, old: float, ret: float, clip: float) -> float:
    held = old + min(max(v - old, -clip), clip)
    return 0.5 * max((v - ret) ** 2, (held - ret) ** 2)


def aggregate(aggregation: str, terms: list[list[float]], constant: float) -> float:
    """The loss of a whole step, terms given for each sequence."""
    if aggregation == "token_mean":
        return math.fsum(map(math.fsum, terms)) / sum(map(len, terms))
    if aggregation == "sequence_mean":
        means = [math.fsum(t) / len(t) for t in terms if t]
        return math.fsum(means) / len(means)
    return math.fsum(map(math.fsum, terms)) / (len(terms) * constant)
