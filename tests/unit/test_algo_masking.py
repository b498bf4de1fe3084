"""What is masked is never read: garbage in masked slots of samples leaves every result bit-identical."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from togi.algo.advantages import advantages
from togi.algo.kl import kl_estimate
from togi.algo.policy import cispo_loss, correction, count, gspo_loss, mismatch, policy_loss, token_weights, value_loss
from togi.batch import Batch
from togi.config.choices import AdvantageEstimator, Aggregation, CorrectionType, KLEstimator
from togi.data.packing import pack
from togi.sample import Sample

# 1: in the loss. Prompts, tool output in the middle and at the end, and one sequence with nothing in the loss.
MASKS = ("0011", "00110011000", "000", "0111", "0010100")
GROUPS = torch.tensor([0, 0, 0, 1, 1])
REWARDS = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0])
STREAMS = ("logprobs", "old", "ref", "values", "old_values", "rollout")


def batch(fill: float) -> Batch:
    generator, samples = np.random.default_rng(1), []
    for text, reward in zip(MASKS, REWARDS.tolist(), strict=True):
        mask = np.array([c == "1" for c in text])
        streams = {n: np.where(mask, generator.normal(size=len(mask)), fill).astype(np.float32) for n in STREAMS}
        samples.append(Sample(np.zeros(len(mask), dtype=np.int64), mask, 0, "g", streams, {"reward": reward}))
    return pack(samples, share_prefix=False)


def advantages_of(packed: Batch, estimator: AdvantageEstimator) -> tuple[Tensor, Tensor]:
    is_gae = estimator is AdvantageEstimator.GAE
    kl_K = kl_estimate(packed.streams["old"], packed.streams["ref"], KLEstimator.K3)
    return advantages(
        estimator,
        packed.values["reward"],
        GROUPS,
        packed.target_sequences_K,
        reward_clip=(-10.0, 10.0),
        kl_K=kl_K,
        kl_coef=0.1,
        values_K=packed.streams["old_values"] if is_gae else None,
        gamma=0.9 if not estimator.uses_groups else 1.0,
        lam=0.8,
        no_std_norm=False,
    )


def losses(packed: Batch, advantages_K: Tensor, returns_K: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each per-token term as a function of the model's output at the tokens in the loss."""
    own, bounds = (packed.target_sequences_K, packed.num_sequences), {"clip_low": 0.2, "clip_high": 0.3}
    terms: dict[str, Callable[[Tensor], Tensor]] = {
        "policy": lambda x: policy_loss(
            x, packed.streams["old"], advantages_K, clip_low=0.2, clip_high=0.3, dual_clip=2.0
        )[0],
        "gspo": lambda x: gspo_loss(x, packed.streams["old"], advantages_K, *own, **bounds, dual_clip=2.0)[0],
        "cispo": lambda x: cispo_loss(x, packed.streams["old"], advantages_K, **bounds)[0],
        "value": lambda x: value_loss(x, packed.streams["old_values"], returns_K, 0.2),
    }
    for kind in set(CorrectionType) - {CorrectionType.RATIO}:
        trust = correction(kind, packed.streams["old"], packed.streams["rollout"], *own, low=0.2, high=2.0)
        terms[kind] = lambda x, trust=trust: trust.select(x * advantages_K)
    for estimator in KLEstimator:
        terms[estimator] = lambda x, e=estimator: kl_estimate(x, packed.streams["ref"], e)
    return terms


@pytest.mark.parametrize("estimator", list(AdvantageEstimator))
@pytest.mark.parametrize("fill", [math.nan, 1e9, math.inf])
def test_garbage_in_masked_slots_changes_no_bit(estimator, fill):
    clean, dirty = batch(0.0), batch(fill)
    expected, actual = advantages_of(clean, estimator), advantages_of(dirty, estimator)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert bool(expected[0].isfinite().all())
    for name in losses(clean, *expected):
        for aggregation in Aggregation:
            assert_same(name, aggregation, (clean, *expected), (dirty, *actual))


def assert_same(
    name: str, aggregation: Aggregation, clean: tuple[Batch, Tensor, Tensor], dirty: tuple[Batch, Tensor, Tensor]
) -> None:
    results = []
    for packed, advantages_K, returns_K in (clean, dirty):
        source = packed.streams["values" if name == "value" else "logprobs"].clone().requires_grad_()
        sequences_K, num = packed.target_sequences_K, packed.num_sequences
        terms_K = losses(packed, advantages_K, returns_K)[name](source)
        loss = (token_weights(aggregation, sequences_K, num) * terms_K).sum()
        (loss / count(aggregation, sequences_K, num, 8)).backward()
        results.append((loss.detach(), source.grad))
    (loss, grad), (dirty_loss, dirty_grad) = results
    assert bool(loss.isfinite()) and torch.count_nonzero(grad) > 0
    assert torch.equal(dirty_loss, loss)
    assert torch.equal(dirty_grad, grad)


@pytest.mark.parametrize("fill", [math.nan, 1e9, -math.inf])
def test_mismatch_reads_only_tokens_in_the_loss(fill):
    clean, dirty = batch(0.0), batch(fill)
    reports = [mismatch(packed.streams["rollout"], packed.streams["old"]) for packed in (clean, dirty)]
    assert reports[0] == reports[1]
    assert math.isfinite(reports[0].kl)


def test_time_does_not_pass_in_tool_output():
    # Sequence 1 has two tokens, five masked ones of tool output, two tokens: the discount counts four steps.
    packed = batch(math.nan)
    returns_K = advantages_of(packed, AdvantageEstimator.REINFORCE)[1]
    kl_K = kl_estimate(packed.streams["old"], packed.streams["ref"], KLEstimator.K3)
    chosen = packed.target_sequences_K == 1
    a, b, c, d = (-0.1 * kl_K[chosen]).tolist()
    d += float(REWARDS[1])
    expected = a + 0.9 * b + 0.81 * c + 0.729 * d
    assert float(returns_K[chosen][0]) == pytest.approx(expected, rel=1e-5)
