"""Advantages: numbers derived by hand, and a plain Python reference on random ragged groups."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit import algo_reference as ref
from togi.algo.advantages import (
    Moments,
    advantages,
    baselined_rewards,
    discounted_returns,
    gae,
    moments,
    normalize,
    normalize_by,
    normalizes,
    token_rewards,
)
from togi.config.choices import AdvantageEstimator as Est

GROUP_ESTIMATORS = [Est.RLOO, Est.REINFORCE_BASELINE, Est.GROUP_NORM, Est.DR_GRPO]
FAST = settings(max_examples=60, deadline=None, derandomize=True)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def runs(lengths: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))


def close(actual: Tensor, expected: list[float], atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=1e-9, atol=atol)


# Baselines. Groups are interleaved and ragged: group 7 has rewards 1, 0, 0, 1, group 3 has 2, 5, group 9 has 4 alone.
REWARDS = doubles(1, 2, 0, 0, 4, 5, 1)
GROUPS = ids(7, 3, 7, 7, 9, 3, 7)
ROOT = math.sqrt(3) / 2  # 0.5 / std, std = sqrt(4 * 0.25 / 3)
PAIR = 1 / math.sqrt(2)  # 1.5 / std, std = sqrt(2 * 2.25 / 1)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (Est.GAE, [1, 2, 0, 0, 4, 5, 1]),
        (Est.REINFORCE, [1, 2, 0, 0, 4, 5, 1]),
        (Est.RLOO, [2 / 3, -3, -2 / 3, -2 / 3, 0, 3, 2 / 3]),
        (Est.REINFORCE_BASELINE, [0.5, -1.5, -0.5, -0.5, 0, 1.5, 0.5]),
        (Est.DR_GRPO, [0.5, -1.5, -0.5, -0.5, 0, 1.5, 0.5]),
        (Est.GROUP_NORM, [ROOT, -PAIR, -ROOT, -ROOT, 0, PAIR, ROOT]),
    ],
)
def test_baselines_by_hand(estimator, expected):
    close(baselined_rewards(estimator, REWARDS, GROUPS), expected, atol=2e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_equal_rewards_and_groups_of_one_give_exact_zeros(estimator, size, dtype):
    # 0.1 is not a binary fraction: a mean of copies of it is off by an ulp, and group_norm would divide that by itself.
    rewards = torch.full((size,), 0.1, dtype=dtype)
    shaped = baselined_rewards(estimator, rewards, torch.full((size,), 5))
    assert shaped.dtype == dtype
    assert torch.count_nonzero(shaped) == 0


def test_a_reward_that_is_not_a_number_is_ours_to_catch():
    with pytest.raises(AssertionError, match="finite"):
        baselined_rewards(Est.RLOO, doubles(1, math.nan), ids(0, 0))


# Token rewards and returns.
def test_token_rewards_put_the_scalar_on_the_last_token_and_kl_on_each():
    # Sequence 1 has no token in the loss: its scalar goes nowhere.
    rewards = token_rewards(doubles(3, 100, -1), doubles(0.5, 1, 2, 4), 0.1, ids(0, 0, 0, 2))
    close(rewards, [-0.05, -0.1, 3 - 0.2, -1 - 0.4])
    close(token_rewards(doubles(3, 100, -1), None, 0.0, ids(0, 0, 0, 2)), [0, 0, 3, -1])


def test_token_rewards_refuse_scattered_sequences():
    with pytest.raises(AssertionError, match="one run"):
        token_rewards(doubles(1, 2), None, 0.0, ids(0, 1, 0))


def test_discounted_returns_by_hand():
    # 4; 2 + 0.5 * 4 = 4; 1 + 0.5 * 4 = 3, and the second sequence does not reach into the first.
    close(discounted_returns(doubles(1, 2, 4, 8, 16), ids(0, 0, 0, 1, 1), 0.5), [3, 4, 4, 16, 16])


def test_gae_by_hand():
    # deltas: 0 + .9 * .6 - .5 = .04, 0 + .9 * .7 - .6 = .03, 1 - .7 = .3; decay .72
    # A: .3, .03 + .72 * .3 = .246, .04 + .72 * .246 = .21712. Second sequence of one token: 2 - 5 = -3.
    adv, ret = gae(doubles(0, 0, 1, 2), doubles(0.5, 0.6, 0.7, 5), ids(0, 0, 0, 1), 0.9, 0.8)
    close(adv, [0.21712, 0.246, 0.3, -3])
    close(ret, [0.71712, 0.846, 1, 2])


def test_gae_with_lambda_one_is_return_minus_value():
    adv, ret = gae(doubles(1, 2, 4), doubles(7, 8, 9), ids(0, 0, 0), 1.0, 1.0)
    close(adv, [0, -2, -5])
    close(ret, [7, 6, 4])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_gae_of_long_sequences_equals_a_loop_over_time(dtype, tolerance):
    lengths = [20_000, 1, 0, 4_097, 3]
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, sum(lengths), dtype=torch.float64, generator=generator)
    adv, ret = gae(rewards.to(dtype), values.to(dtype), runs(lengths), 0.999, 0.99)
    loop: list[float] = []
    for r, v in zip(ref.split(rewards.tolist(), lengths), ref.split(values.tolist(), lengths), strict=True):
        later, back = 0.0, []
        for t in reversed(range(len(r))):
            after = v[t + 1] if t + 1 < len(v) else 0.0
            later = r[t] + 0.999 * after - v[t] + 0.999 * 0.99 * later
            back.append(later)
        loop += reversed(back)
    expected = torch.tensor(loop, dtype=torch.float64)
    scale = float(expected.abs().max())
    assert float((adv.double() - expected).abs().max()) < tolerance * scale
    assert float((ret.double() - expected - values).abs().max()) < tolerance * scale
    assert adv.dtype == ret.dtype == dtype


def test_a_broken_value_stays_in_its_own_sequence():
    adv, ret = gae(doubles(0, 1, 0, 1), doubles(0, 0, math.nan, 0), ids(0, 0, 1, 1), 1.0, 1.0)
    close(adv[:2], [1, 1])
    close(ret[:2], [1, 1])
    assert bool(adv[2].isnan()) and float(adv[3]) == 1


def test_an_undiscounted_terminal_reward_reaches_every_token_exactly():
    rewards = torch.zeros(30_000)
    rewards[-1] = 0.7
    assert torch.equal(
        discounted_returns(rewards, torch.zeros(30_000, dtype=torch.int64), 1.0), rewards[-1:].expand(30_000)
    )


# Normalisation.
def test_normalize_by_hand():
    # mean 2, biased variance (1 + 1 + 0 + 0) / 4 = 0.5
    root = math.sqrt(2)
    close(normalize(doubles(1, 3, 2, 2), mean_only=False), [-root, root, 0, 0])
    close(normalize(doubles(1, 3, 2, 2), mean_only=True), [-1, 1, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3])
def test_equal_advantages_become_exact_zeros(value, dtype):
    for mean_only in (True, False):
        out = normalize(torch.full((1001,), value, dtype=dtype), mean_only=mean_only)
        assert out.dtype == dtype
        assert torch.count_nonzero(out) == 0


def test_the_variance_floor_is_1e_minus_8():
    # variance 1e-12 is below the floor, so the scale is 1e4 and not 1e6
    close(normalize(doubles(-1e-6, 1e-6), mean_only=False), [-1e-2, 1e-2])


def test_which_estimators_normalize():
    assert [e for e in Est if normalizes(e)] == [Est.GAE, Est.REINFORCE, Est.RLOO, Est.REINFORCE_BASELINE]


@FAST
@given(st.lists(st.lists(st.integers(-99, 99), max_size=6), min_size=1, max_size=5), st.booleans())
def test_merged_moments_equal_the_moments_of_everything(parts, mean_only):
    tensors = [torch.tensor(part, dtype=torch.float64) / 7 for part in parts]
    total = Moments(0, 0.0, 0.0)
    for tensor in tensors:
        total = total.merge(moments(tensor))
    flat = torch.cat(tensors)
    split = torch.cat([normalize_by(tensor, total, mean_only=mean_only) for tensor in tensors])
    assert total.count == flat.numel()
    close(split, ref.normalized(flat.tolist(), mean_only), atol=1e-9)


# Everything composed.
def test_the_clip_range_comes_after_the_baseline():
    # rloo: 30 - 10 = 20 -> 10; 10 - 30 = -20 -> -10. Clipping first would give 0, 0. The mean over the three tokens,
    # 10, -10, -10, is -10/3, the biased variance 800/9.
    adv, ret = run(Est.RLOO, doubles(30, 10), ids(0, 0), ids(0, 1, 1))
    close(ret, [10, -10, -10])
    scale = math.sqrt(800 / 9)
    close(adv, [40 / 3 / scale, -20 / 3 / scale, -20 / 3 / scale])


def run(estimator, rewards, groups, sequences, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    settings_ = {
        "reward_clip": (-10.0, 10.0),
        "kl_K": None,
        "kl_coef": 0.0,
        "values_K": None,
        "gamma": 1.0,
        "lam": 1.0,
        "no_std_norm": False,
    }
    return advantages(estimator, rewards, groups, sequences, **(settings_ | changes))


def test_grpo_with_kl_in_the_reward_by_hand():
    # shaped +-1/sqrt(2) at the last tokens, -0.1 * KL at each, suffix sums, no global normalisation
    adv, ret = run(Est.GROUP_NORM, doubles(1, 0), ids(4, 4), ids(0, 0, 1), kl_K=doubles(1, 2, 3), kl_coef=0.1)
    close(adv, [PAIR - 0.3, PAIR - 0.2, -PAIR - 0.3], atol=2e-9)
    assert torch.equal(adv, ret)


def test_returns_are_not_normalized():
    adv, ret = run(Est.GAE, doubles(1, 3), ids(0, 1), ids(0, 1), values_K=doubles(0.5, 0.5))
    close(ret, [1, 3])
    close(adv, [-1, 1])  # raw 0.5, 2.5


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
def test_groups_have_no_discount(estimator):
    with pytest.raises(AssertionError, match="no discount"):
        run(estimator, doubles(1, 0), ids(0, 0), ids(0, 1), gamma=0.9)


def test_values_are_for_gae_and_only_for_gae():
    with pytest.raises(AssertionError, match="gae"):
        run(Est.GAE, doubles(1), ids(0), ids(0))
    with pytest.raises(AssertionError, match="gae"):
        run(Est.RLOO, doubles(1), ids(0), ids(0), values_K=doubles(1))


@pytest.mark.parametrize("estimator", list(Est))
def test_no_tokens_at_all(estimator):
    values = torch.empty(0) if estimator is Est.GAE else None
    adv, ret = run(estimator, torch.tensor([1.0, 2.0]), ids(0, 0), ids(), values_K=values)
    assert adv.shape == ret.shape == (0,)


def test_rewards_of_turns_by_hand():
    """Two turns of 2 and 1 tokens; 3 of the 5 came after the first. Values 0, so GAE with lambda 1 is the discounted sum."""
    step = doubles(5), ids(0), ids(0, 0, 0)
    turns = {"turn_rewards_K": doubles(0, 3, 0), "turns_K": ids(0, 0, 1)}
    plain = {"values_K": doubles(0, 0, 0), **turns}
    _, ret = run(Est.GAE, *step, **plain)
    close(ret, [5, 5, 2])
    # 0.5 from the first turn to the second, 0.9 from token to token: 2, 3 + 0.45 * 2, 0.9 * 3.9
    _, ret = run(Est.GAE, *step, **plain, gamma=0.9, turn_discount=0.5)
    close(ret, [3.51, 3.9, 2])
    _, ret = run(Est.REINFORCE, *step, **turns, turn_discount=0.5)
    close(ret, [4, 4, 2])
    # lambda 0: r + d V' - V
    adv, _ = run(
        Est.GAE, *step, **(plain | {"values_K": doubles(1, 2, 4)}), lam=0.0, turn_discount=0.5, no_std_norm=True
    )
    close(adv - adv[0], [0, 3 + 0.5 * 4 - 2 - 1, 2 - 4 - 1])  # 0 + 2 - 1 = 1 is the first


def test_groups_compare_the_discounted_sums_of_episodes():
    """3 after the first turn and 2 after the second are 3 + 0.5 * 2 = 4; 6 at the end of the third of three are 0.25 * 6."""
    step = doubles(5, 6), ids(0, 0), ids(0, 0, 0, 1, 1, 1)
    turns = {"turn_rewards_K": doubles(0, 3, 0, 0, 0, 0), "turns_K": ids(0, 0, 1, 0, 1, 2)}
    _, ret = run(Est.DR_GRPO, *step, **turns, turn_discount=0.5)
    close(ret, [1.25, 1.25, 1.25, -1.25, -1.25, -1.25])
    _, ret = run(Est.DR_GRPO, *step, **turns)
    close(ret, [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5])


@FAST
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    dice=st.randoms(use_true_random=False),
    gamma=st.sampled_from([0.5, 1.0]),
)
def test_discounts_of_tokens_equal_a_loop(lengths, dice, gamma):
    rewards, discounts = ([dice.randint(-9, 9) / 7 for _ in range(sum(lengths))] for _ in range(2))
    discounts = [gamma * abs(discount) / 9 for discount in discounts]
    expected, ends = [], set(torch.tensor(lengths).cumsum(0).tolist())
    for place in reversed(range(len(rewards))):
        after = 0.0 if place + 1 in ends else expected[-1]
        expected.append(rewards[place] + discounts[place] * after)
    close(discounted_returns(doubles(*rewards), runs(lengths), doubles(*discounts)), expected[::-1])


grid = st.integers(-60, 60).map(lambda i: i / 7)


@st.composite
def steps(draw):
    """Ragged groups of ragged sequences: scores, group ids, lengths and two token streams."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=9))
    n, k = len(lengths), sum(lengths)
    groups = draw(st.lists(st.sampled_from([-4, 0, 3, 10**12]), min_size=n, max_size=n))
    scores = draw(st.lists(grid, min_size=n, max_size=n))
    streams = [draw(st.lists(grid, min_size=k, max_size=k)) for _ in range(2)]
    return scores, groups, lengths, streams[0], streams[1]


@pytest.mark.parametrize("estimator", list(Est))
@FAST
@given(
    step=steps(),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    flag=st.booleans(),
)
def test_every_estimator_equals_the_reference(estimator, step, gamma, lam, flag):
    scores, groups, lengths, kls, values = step
    gamma = 1.0 if estimator.uses_groups else gamma
    adv, ret = run(
        estimator,
        doubles(*scores),
        ids(*groups),
        runs(lengths),
        reward_clip=(-2.0, 3.0),
        kl_K=doubles(*kls),
        kl_coef=0.3,
        values_K=doubles(*values) if estimator is Est.GAE else None,
        gamma=gamma,
        lam=lam,
        no_std_norm=flag,
    )
    expected_advantages, expected_returns = ref.advantages(
        estimator.value,
        scores,
        groups,
        ref.split(kls, lengths),
        ref.split(values, lengths),
        clip=(-2.0, 3.0),
        coef=0.3,
        gamma=gamma,
        lam=lam,
        mean_only=flag,
    )
    close(ret, expected_returns)
    # Sums that cancel to about 1e-16 are scaled by up to 1e4 in the normalisation.
    close(adv, expected_advantages, atol=1e-9)


@pytest.mark.parametrize("estimator", list(Est))
@FAST
@given(step=steps(), seed=st.integers(0, 2**16))
def test_baselines_follow_ids_not_positions(estimator, step, seed):
    scores, groups, *_ = step
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    rewards, group_ids = doubles(*scores), ids(*groups)
    straight = baselined_rewards(estimator, rewards, group_ids)
    renamed = torch.unique(group_ids, return_inverse=True)[1] * -3
    torch.testing.assert_close(baselined_rewards(estimator, rewards[order], renamed[order]), straight[order])
