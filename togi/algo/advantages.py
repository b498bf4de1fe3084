"""From one reward per sequence to one advantage per token: baselines, KL in the reward, returns, GAE, normalisation.

Pure functions on flat tensors. Not here: what a reward is; which samples take part (the caller leaves out those that must not
count in a baseline); reductions over processes (the caller merges ``Moments``).

Shape letters: K tokens in the loss, in order; N sequences; G groups. ``sequences_K`` (int64) holds the sequence of each
token in ascending runs; a sequence may have no token. ``groups_N`` (int64) holds the group id of each sequence: groups
may have any size and any order. Masked positions are not in these tensors, so nothing bootstraps from them, discounts across
them, or puts a reward on them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from togi.config.choices import AdvantageEstimator

STD_FLOOR = 1e-9
VARIANCE_FLOOR = 1e-8


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared distances from the mean of a set of numbers, in float64; ``merge`` joins sets."""

    count: int
    mean: float
    sum_squares: float

    @property
    def variance(self) -> float:
        """The biased variance; 0 for an empty set."""
        return self.sum_squares / self.count if self.count > 0 else 0.0

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together (Chan, Golub & LeVeque 1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        gap = other.mean - self.mean
        mean = self.mean + gap * other.count / count
        between = gap * gap * self.count * other.count / count
        return Moments(count, mean, self.sum_squares + other.sum_squares + between)


def advantages(
    estimator: AdvantageEstimator,
    rewards_N: Tensor,
    groups_N: Tensor,
    sequences_K: Tensor,
    *,
    reward_clip: tuple[float, float],
    kl_K: Tensor | None,
    kl_coef: float,
    values_K: Tensor | None,
    gamma: float,
    lam: float,
    no_std_norm: bool,
    turn_rewards_K: Tensor | None = None,
    turns_K: Tensor | None = None,
    turn_discount: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Advantages for the policy loss and returns for the value loss, of all tokens of one step, both [K].

    Advantages are normalised over all tokens given, if the estimator ``normalizes``.

    Order: baseline over groups, clip to ``reward_clip``, shaped scalar on the last token and -kl_coef * KL on each
    token, GAE or discounted sums, normalisation. ``kl_K`` is None if the KL is not in the reward. ``values_K`` is
    for gae and only for gae. ``gamma`` must be 1 for the estimators with groups, whose scalar must not depend on the length.
    ``lam`` is used by gae only.

    ``turn_rewards_K``: what of the rewards was given during an episode, at the token after which it came; None: all of it at the
    end. ``turns_K``: the turn of each token, counted from 0 in its sequence; ``turn_discount`` comes in addition to ``gamma``
    from the last token of a turn to the next. Estimators with groups compare the discounted sum of each episode and give it to
    all its tokens.
    """
    assert (values_K is not None) == (estimator is AdvantageEstimator.GAE), "values are for gae, and gae needs them"
    assert gamma == 1.0 or not estimator.uses_groups, f"{estimator} has no discount"
    assert reward_clip[0] <= reward_clip[1], "an empty reward clip range"
    discounts: float | Tensor = gamma
    if estimator.uses_groups:
        rewards_N = episode_returns(rewards_N, sequences_K, turn_rewards_K, turns_K, turn_discount)
        turn_rewards_K = None
    elif turn_discount != 1.0 and turns_K is not None:
        discounts = turn_discounts(sequences_K, turns_K, gamma, turn_discount)
    shaped_N = baselined_rewards(estimator, rewards_N, groups_N).clamp(*reward_clip)
    # What was given during the episode is not given at its end.
    if turn_rewards_K is not None:
        shaped_N = shaped_N.index_add(0, sequences_K, -turn_rewards_K)
    rewards_K = token_rewards(shaped_N, kl_K, kl_coef, sequences_K)
    if turn_rewards_K is not None:
        rewards_K = rewards_K + turn_rewards_K
    if values_K is not None:
        advantages_K, returns_K = gae(rewards_K, values_K, sequences_K, discounts, lam)
    else:
        advantages_K = returns_K = discounted_returns(rewards_K, sequences_K, discounts)
    if normalizes(estimator):
        advantages_K = normalize(advantages_K, mean_only=no_std_norm)
    return advantages_K, returns_K


def baselined_rewards(estimator: AdvantageEstimator, rewards_N: Tensor, groups_N: Tensor) -> Tensor:
    """The reward of each sequence - the baseline of its group (the samples of one prompt). Shape [N], dtype of the rewards.

    * rloo: R - mean of the others (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740).
    * reinforce_baseline, dr_grpo: R - group mean (REINFORCE++, arXiv 2501.03262; Dr. GRPO, arXiv 2503.20783).
    * group_norm: (R - group mean) / (group std + 1e-9), unbiased std (GRPO, arXiv 2402.03300).
    * gae, reinforce: R.

    A group of one has no baseline: every group estimator gives exactly 0, so the sequence trains nothing. A group of equal
    rewards gives exactly 0 as well. Every sequence counts in its group's baseline, even one without tokens.
    """
    assert rewards_N.shape == groups_N.shape, "one group id per reward"
    assert rewards_N.is_floating_point(), "rewards must be floating point numbers"
    assert bool(rewards_N.isfinite().all()), "a reward is not a finite number"
    if not estimator.uses_groups or rewards_N.numel() == 0:
        return rewards_N
    _, index_N, sizes_G = torch.unique(groups_N, return_inverse=True, return_counts=True)
    sizes_N = sizes_G[index_N].to(rewards_N.dtype)
    # Shifting a group does not change the result. Relative to the lowest reward, equal rewards are exact zeros. Their floating
    # point mean could be off by an ulp, which group_norm would blow up.
    lowest_G = rewards_N.new_empty(len(sizes_G)).scatter_reduce_(0, index_N, rewards_N, "amin", include_self=False)
    above_N = rewards_N - lowest_G[index_N]
    sums_N = _group_sums(above_N, index_N, len(sizes_G))
    if estimator is AdvantageEstimator.RLOO:
        others_N: Tensor = (sums_N - above_N) / (sizes_N - 1).clamp(min=1)
        return above_N - others_N
    centered_N: Tensor = above_N - sums_N / sizes_N
    if estimator is AdvantageEstimator.GROUP_NORM:
        variance_N: Tensor = _group_sums(centered_N.square(), index_N, len(sizes_G)) / (sizes_N - 1).clamp(min=1)
        centered_N = centered_N / (variance_N.sqrt() + STD_FLOOR)
    return centered_N


def token_rewards(rewards_N: Tensor, kl_K: Tensor | None, kl_coef: float, sequences_K: Tensor) -> Tensor:
    """-kl_coef * KL at every token, plus the sequence's scalar at its last token in the loss. Shape [K].

    ``kl_K``: one estimate per token in nats, or None for a reward without KL. A sequence without tokens gets no reward.
    """
    if sequences_K.numel() > 0:
        assert bool((sequences_K[1:] >= sequences_K[:-1]).all()), (
            "tokens of a sequence must be one run, in ascending order"
        )
        assert int(sequences_K[0]) >= 0 and int(sequences_K[-1]) < len(rewards_N), "a token of no sequence"
    assert kl_coef >= 0, "a KL coefficient below zero would reward distance from the reference"
    rewards_K = rewards_N.new_zeros(sequences_K.shape) if kl_K is None else -kl_coef * kl_K
    is_last_K = torch.ones_like(sequences_K, dtype=torch.bool)
    is_last_K[:-1] = sequences_K[:-1] != sequences_K[1:]
    last = is_last_K.nonzero().squeeze(-1)
    rewards_K[last] += rewards_N[sequences_K[last]].to(rewards_K.dtype)
    return rewards_K


def episode_returns(
    rewards_N: Tensor,
    sequences_K: Tensor,
    turn_rewards_K: Tensor | None,
    turns_K: Tensor | None,
    turn_discount: float,
) -> Tensor:
    """The discounted sum of each episode's rewards, ``sum_t d^t r_t`` over its turns t from 0. Shape [N].

    What was not given during the episode is a reward of its last turn. A discount of 1 gives ``rewards_N``.
    """
    if turn_discount == 1.0 or turns_K is None or turns_K.numel() == 0:
        return rewards_N
    last_N = torch.zeros(len(rewards_N), dtype=turns_K.dtype).scatter_reduce_(0, sequences_K, turns_K, "amax")
    given_K = torch.zeros(len(turns_K), dtype=rewards_N.dtype) if turn_rewards_K is None else turn_rewards_K
    at_end_N = rewards_N.index_add(0, sequences_K, -given_K)
    return (at_end_N * turn_discount**last_N).index_add(0, sequences_K, given_K * turn_discount**turns_K)


def turn_discounts(sequences_K: Tensor, turns_K: Tensor, gamma: float, turn_discount: float) -> Tensor:
    """The discount from each token to the next one of its sequence: ``gamma``, and across turns times the second. Shape [K]."""
    discounts_K = torch.full((len(sequences_K),), gamma, dtype=torch.float64)
    crosses_K = (sequences_K[:-1] == sequences_K[1:]) & (turns_K[:-1] != turns_K[1:])
    discounts_K[:-1][crosses_K] *= turn_discount
    return discounts_K


def discounted_returns(rewards_K: Tensor, sequences_K: Tensor, gamma: float | Tensor) -> Tensor:
    """``G_t = r_t + gamma * G_{t+1}`` within each sequence, in log2(longest sequence) passes over all tokens. Shape [K].

    After the pass with stride s, ``G_t`` covers the 2s tokens from t on (Hillis & Steele 1986). It needs no padding,
    and powers of ``gamma`` stay at most 1. Rounding errors grow with log L; those of a loop over time grow with L.
    ``gamma`` [K]: the discount from each token to the next.
    """
    assert rewards_K.shape == sequences_K.shape, "token streams differ in length"
    assert bool((torch.as_tensor(gamma) >= 0).all() and (torch.as_tensor(gamma) <= 1).all()), (
        "a discount must lie in [0, 1]"
    )
    sums_K, stride = rewards_K.clone(), 1
    # Of each token: the discount to the one that is ``stride`` later.
    products_K = gamma.clone() if isinstance(gamma, Tensor) else None
    while stride < len(sums_K):
        same = sequences_K[:-stride] == sequences_K[stride:]
        if not bool(same.any()):
            break
        factor = gamma**stride if products_K is None else products_K[:-stride]
        sums_K[:-stride] += factor * torch.where(same, sums_K[stride:], 0)
        if products_K is not None:
            products_K[:-stride] = products_K[:-stride] * products_K[stride:]
        stride *= 2
    return sums_K


def gae(
    rewards_K: Tensor, values_K: Tensor, sequences_K: Tensor, gamma: float | Tensor, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438): advantages and returns, both [K].

    ``delta_t = r_t + gamma V_{t+1} - V_t`` with ``V = 0`` after a sequence's last token,
    ``A_t = delta_t + gamma lam A_{t+1}``, ``return_t = A_t + V_t``. A time step is a token in the loss: tool
    output between two of them takes no time.
    """
    assert rewards_K.shape == values_K.shape == sequences_K.shape, "token streams differ in length"
    next_values_K = torch.zeros_like(values_K)
    next_values_K[:-1] = torch.where(sequences_K[:-1] == sequences_K[1:], values_K[1:], 0)
    deltas_K = rewards_K + gamma * next_values_K - values_K
    advantages_K = discounted_returns(deltas_K, sequences_K, gamma * lam)
    return advantages_K, advantages_K + values_K


def normalizes(estimator: AdvantageEstimator) -> bool:
    """Whether advantages are normalised over all tokens of the step (group_norm and dr_grpo define their own scale)."""
    return estimator not in (AdvantageEstimator.GROUP_NORM, AdvantageEstimator.DR_GRPO)


def normalize(advantages_K: Tensor, *, mean_only: bool) -> Tensor:
    """``normalize_by`` the tensor's own moments. Use it if all tokens of the step are in one tensor."""
    return normalize_by(advantages_K, moments(advantages_K), mean_only=mean_only)


def moments(advantages_K: Tensor) -> Moments:
    """The moments of one part of the step's tokens, computed in float64."""
    count = advantages_K.numel()
    if count == 0:
        return Moments(0, 0.0, 0.0)
    wide_K = advantages_K.detach().double()
    # Measured from the first token, so that the mean of equal numbers is that number exactly.
    mean = wide_K[0] + (wide_K - wide_K[0]).mean()
    return Moments(count, float(mean), float((wide_K - mean).square().sum()))


def normalize_by(advantages_K: Tensor, over: Moments, *, mean_only: bool) -> Tensor:
    """``(A - mean) / sqrt(max(variance, 1e-8))``, or ``A - mean``. Equal advantages become zero, never noise."""
    centered_K = advantages_K - over.mean
    return centered_K if mean_only else centered_K / math.sqrt(max(over.variance, VARIANCE_FLOOR))


def _group_sums(values_N: Tensor, index_N: Tensor, num_groups: int) -> Tensor:
    """Each sequence's group sum."""
    return values_N.new_zeros(num_groups).index_add_(0, index_N, values_N)[index_N]
