"""Aggregation: by hand, and any split of a step into micro-batches gives one loss and one gradient (float64)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit import algo_reference as ref
from togi.algo.kl import kl_estimate
from togi.algo.policy import count, policy_loss, token_weights, value_loss
from togi.config.choices import Aggregation, KLEstimator

FEATURES, VOCAB, CONSTANT = 3, 5, 16.0
FAST = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("aggregation", "weights", "denominator", "loss"),
    [
        (Aggregation.TOKEN_MEAN, [1, 1, 1, 1], 4, 10 / 4),
        (Aggregation.SEQUENCE_MEAN, [1 / 3, 1 / 3, 1 / 3, 1], 2, (2 + 4) / 2),
        (Aggregation.CONSTANT, [1, 1, 1, 1], 3 * 16, 10 / 48),
    ],
)
def test_aggregations_by_hand(aggregation, weights, denominator, loss):
    # Sequences of 3, 0 and 1 tokens with terms 1, 2, 3 and 4; the generation limit is 16.
    sequences, terms = torch.tensor([0, 0, 0, 2]), torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    weights_K = token_weights(aggregation, sequences, 3, dtype=torch.float64)
    torch.testing.assert_close(weights_K, torch.tensor(weights, dtype=torch.float64))
    divisor = count(aggregation, sequences, 3, CONSTANT)
    assert divisor == denominator
    assert float((weights_K * terms).sum()) / divisor == pytest.approx(loss)


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_a_micro_batch_without_tokens_adds_no_loss(aggregation):
    nothing = torch.empty(0, dtype=torch.int64)
    assert token_weights(aggregation, nothing, 2).sum() == 0
    assert count(aggregation, nothing, 2, CONSTANT) == (32 if aggregation is Aggregation.CONSTANT else 0)


def terms_of(kind: str, weights_FV: Tensor, data: dict[str, Tensor]) -> Tensor:
    """Per-token terms of a linear model: the first V columns are logits, the last one a value head."""
    outputs = data["features"] @ weights_FV
    logp_KV = torch.log_softmax(outputs[:, :VOCAB], -1)
    logprobs = logp_KV.gather(1, data["tokens"][:, None]).squeeze(1)
    if kind == "policy":
        return policy_loss(logprobs, data["old"], data["a"], clip_low=0.2, clip_high=0.28, dual_clip=2.0)[0]
    if kind == "value":
        return value_loss(outputs[:, VOCAB], data["v"], data["r"], 0.2)
    if kind == "entropy":
        return -(logp_KV.exp() * logp_KV).sum(-1)
    return kl_estimate(logprobs, data["ref"], KLEstimator(kind))


def step_data(lengths: list[int]) -> list[dict[str, Tensor]]:
    """Random data, one record for each sequence."""
    generator = torch.Generator().manual_seed(sum(lengths))
    out = []
    for length in lengths:
        old, a, v, r, rf = torch.randn(5, length, dtype=torch.float64, generator=generator)
        features = torch.randn(length, FEATURES, dtype=torch.float64, generator=generator)
        tokens = torch.randint(VOCAB, (length,), generator=generator)
        out.append({"old": old - 1.6, "a": a, "v": v, "r": r, "ref": rf - 1.6, "features": features, "tokens": tokens})
    return out


def loss_and_gradient(
    kind: str, aggregation: Aggregation, micro_batches: list[list[dict[str, Tensor]]]
) -> tuple[float, Tensor]:
    """What the learner does: add sums, gradients and counts over micro-batches, divide once."""
    weights_FV = torch.linspace(-1, 1, FEATURES * (VOCAB + 1), dtype=torch.float64).view(FEATURES, -1).requires_grad_()
    total, denominator = 0.0, 0.0
    for rows in micro_batches:
        data = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        sequences = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row["a"]) for row in rows]))
        weights_K = token_weights(aggregation, sequences, len(rows), dtype=torch.float64)
        part = (weights_K * terms_of(kind, weights_FV, data)).sum()
        part.backward()
        total += float(part.detach())
        denominator += count(aggregation, sequences, len(rows), CONSTANT)
    return total / denominator, weights_FV.grad / denominator


@pytest.mark.parametrize("kind", ["policy", "value", "k1", "k2", "k3", "entropy"])
@pytest.mark.parametrize("aggregation", list(Aggregation))
@FAST
@given(
    lengths=st.lists(st.integers(0, 12), min_size=2, max_size=9).filter(any),
    homes=st.lists(st.integers(0, 4), min_size=9, max_size=9),
    seed=st.integers(0, 999),
)
def test_any_split_into_micro_batches_gives_the_same_gradient(kind, aggregation, lengths, homes, seed):
    rows = step_data(lengths)
    whole_loss, whole_grad = loss_and_gradient(kind, aggregation, [rows])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = [[rows[i] for i in order if homes[i] == home] for home in range(5)]
    loss, grad = loss_and_gradient(kind, aggregation, [part for part in parts if part])
    assert loss == pytest.approx(whole_loss, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(grad, whole_grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("aggregation", list(Aggregation))
@FAST
@given(terms=st.lists(st.lists(st.integers(-9, 9), max_size=6), min_size=1, max_size=6).filter(any))
def test_aggregations_equal_the_reference(aggregation, terms):
    sequences = torch.repeat_interleave(torch.arange(len(terms)), torch.tensor([len(t) for t in terms]))
    flat = torch.tensor([x for t in terms for x in t], dtype=torch.float64)
    weights_K = token_weights(aggregation, sequences, len(terms), dtype=torch.float64)
    loss = float((weights_K * flat).sum()) / count(aggregation, sequences, len(terms), CONSTANT)
    assert loss == pytest.approx(ref.aggregate(aggregation.value, terms, CONSTANT), abs=1e-12)
