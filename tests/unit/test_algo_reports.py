"""Engine-trainer mismatch, pass@k and standard errors: numbers by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from togi.algo.best_of_n import Estimate, expected_best, mean_with_error, reported_ks
from togi.algo.policy import chosen_experts, mismatch, router_disagreement


def test_mismatch_by_hand():
    # ratios 2, 1, 1/2
    report = mismatch(
        torch.tensor([-2.0, -1.0, -0.5]), torch.tensor([-2.0, -1.0, -0.5]) + torch.tensor([2.0, 1, 0.5]).log()
    )
    assert report.abs_log_ratio_mean == pytest.approx(2 * math.log(2) / 3, rel=1e-6)
    assert report.ratio_mean == pytest.approx(3.5 / 3, rel=1e-6)
    assert report.ratio_p99 == report.ratio_max == pytest.approx(2, rel=1e-6)
    # mean of r - 1 - log r: (1 - log 2 + 0 - 1/2 + log 2) / 3
    assert report.kl == pytest.approx(0.5 / 3, rel=1e-5)


def test_mismatch_of_equal_logprobs_is_zero():
    logprobs = -torch.rand(100)
    report = mismatch(logprobs, logprobs.clone())
    assert (report.abs_log_ratio_mean, report.ratio_mean, report.ratio_p99, report.kl) == (0.0, 1.0, 1.0, 0.0)


def test_p99_is_a_rank_and_extremes_are_not_clipped():
    # log ratios 1..1000 in thousandths and one of 200, where float32 exp would overflow
    trainer = torch.cat([torch.arange(1, 1000) / 1000, torch.tensor([200.0])])
    report = mismatch(torch.zeros(1000), trainer)
    assert report.ratio_p99 == pytest.approx(math.exp(0.990), rel=1e-6)
    assert report.ratio_max == pytest.approx(math.exp(200), rel=1e-6)


def test_mismatch_kl_is_the_divergence_of_the_engine_from_the_trainer():
    engine, trainer = (torch.log_softmax(torch.tensor(x), -1) for x in ([0.3, 1.0, -0.5], [0.0, 0.7, 0.4]))
    exact = float((engine.exp() * (engine - trainer)).sum())
    tokens = torch.multinomial(engine.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    report = mismatch(engine[tokens], trainer[tokens])
    assert report.kl == pytest.approx(exact, rel=0.02)
    assert report.ratio_mean == pytest.approx(1, abs=0.01)


def test_router_disagreement_by_hand():
    """Two tokens, two layers, two of four experts: of 8 choices the engine did not make one, then two. Order does not count."""
    trainer = torch.tensor([[[0, 1], [2, 3]], [[1, 2], [0, 3]]])
    engine = torch.tensor([[[1, 0], [2, 1]], [[0, 3], [3, 0]]])
    assert router_disagreement(engine, trainer) == 3 / 8
    assert router_disagreement(trainer.flip(-1), trainer) == 0


def test_a_router_chooses_the_highest_logits():
    layers = [torch.tensor([[0.1, 3.0, 2.0], [5.0, -1.0, 0.0]]), torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 2.0]])]
    assert chosen_experts(layers, 2).tolist() == [[[1, 2], [0, 1]], [[0, 2], [2, 1]]]


def pass_at_k(n, c, k):
    """pass@k from n samples of which c are right: the expected best of rewards 0 and 1."""
    return expected_best([1.0] * c + [0.0] * (n - c), k)


def test_pass_at_k_by_hand():
    # 5 samples, 2 right: of the 10 pairs the 3 without a right one fail
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 2, 4) == 1.0
    assert pass_at_k(5, 0, 3) == 0.0
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


def test_pass_at_k_equals_enumeration():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_the_expected_best_by_hand():
    # of the pairs of 1, 2, 5 the greatest are 2, 5, 5
    assert expected_best([5, 1, 2], 2) == pytest.approx(4)
    assert expected_best([5, 1, 2], 1) == pytest.approx(8 / 3)
    assert expected_best([5, 1, 2], 3) == 5


def test_the_expected_best_equals_enumeration_and_pass_at_k():
    values = [0.3, -1.0, 0.3, 2.5, 0.0]
    for k in range(1, 6):
        draws = list(itertools.combinations(values, k))
        assert expected_best(values, k) == pytest.approx(sum(map(max, draws)) / len(draws), abs=1e-12)
        for right in range(6):
            assert pass_at_k(5, right, k) == pytest.approx(1 - math.comb(5 - right, k) / math.comb(5, k))


def test_reported_ks():
    assert [reported_ks(n) for n in (1, 2, 3, 4, 10)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 8, 10]]


def test_pass_at_k_refuses_k_above_n():
    with pytest.raises(AssertionError, match="undefined"):
        pass_at_k(4, 2, 8)


def test_mean_and_standard_error_by_hand():
    # mean 2.5, unbiased variance 5/3, standard error sqrt(5/12)
    assert mean_with_error([1, 2, 3, 4]) == Estimate(2.5, pytest.approx(math.sqrt(5 / 12)), 4)
    single = mean_with_error([0.0])
    assert (single.mean, single.count) == (0.0, 1)
    assert math.isnan(single.standard_error)
