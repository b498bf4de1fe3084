import dataclasses
import math

import numpy as np
import pytest
import torch

from tests.learn_tools import (
    CPU,
    critic,
    gradients,
    learner,
    max_difference,
    objective,
    packs,
    policy,
    rollouts,
    scheduled,
    solo,
    weights,
)
from togi.config.choices import Aggregation, Scheduler
from togi.errors import RunError
from togi.learn.learner import Divergence, Learner, StepOutcome
from togi.learn.objective import PolicyObjective, ValueObjective
from togi.learn.scorer import Scorer, dummy_batch, nothing
from togi.model.policy import Needs
from togi.parallel import frozen, trainable
from togi.parallel.backend import BackendOptions
from togi.parallel.process import World


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_any_split_into_micro_batches_gives_the_same_gradient(aggregation: Aggregation) -> None:
    samples = rollouts(6)
    whole = gradients(samples, [6], aggregation)
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-4
    for sizes in ([1] * 6, [4, 2], [1, 5], [3, 2, 1]):
        assert max_difference(whole, gradients(samples, sizes, aggregation)) < 1e-10, sizes


def test_metrics_do_not_depend_on_the_split() -> None:
    samples = rollouts(6)
    first = solo(torch.float64).update(packs(samples, [6]))
    second = solo(torch.float64).update(packs(samples, [1, 3, 2]))
    assert first.metrics.keys() == second.metrics.keys()
    for name, value in first.metrics.items():
        assert second.metrics[name] == pytest.approx(value, rel=1e-9), name
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-9)
    assert first.count == second.count == sum(sample.loss_mask.sum() for sample in samples)


def test_without_old_logprobs_the_ratio_is_one() -> None:
    samples = [
        dataclasses.replace(sample, streams={"advantages": sample.streams["advantages"]}) for sample in rollouts(4)
    ]
    learner = solo()
    learner.objective = PolicyObjective(0.2, 0.2, Aggregation.TOKEN_MEAN)
    report = learner.update(packs(samples, [2, 2]))
    advantages = np.concatenate([sample.streams["advantages"][sample.loss_mask] for sample in samples])
    assert report.metrics["policy/loss"] == pytest.approx(-advantages.mean(), abs=1e-6)
    assert report.metrics["policy/ratio_max"] == 1.0
    assert report.metrics["policy/ppo_kl"] == 0.0
    assert report.metrics["policy/clip_fraction"] == 0.0


def test_logprobs_come_back_in_the_callers_order_and_match_the_scorer() -> None:
    samples = rollouts(5)
    learner = solo()
    scorer = Scorer(learner.backend.module, learner.backend.world)
    one_by_one = [scorer.logprobs(packs([sample], [1]), 0.7)[0] for sample in samples]
    batches = packs(samples, [3, 2])
    together = scorer.logprobs(batches, 0.7)
    report = learner.update(batches)
    for sample, alone, scored, trained in zip(samples, one_by_one, together, report.logprobs, strict=True):
        assert len(alone) == sample.loss_mask.sum()
        np.testing.assert_allclose(scored, alone, atol=1e-5)
        np.testing.assert_allclose(trained, alone, atol=1e-5)


def test_an_empty_step_is_skipped_and_reported() -> None:
    learner = solo()
    before = weights(learner.backend)
    samples = [dataclasses.replace(s, loss_mask=np.zeros_like(s.loss_mask)) for s in rollouts(2)]
    for batches in ([], packs(samples, [2])):
        report = learner.update(batches)
        assert report.outcome is StepOutcome.SKIPPED_EMPTY
        assert math.isnan(report.grad_norm)
    assert learner.steps == 0
    assert max_difference(before, weights(learner.backend)) == 0.0


def test_a_gradient_that_is_not_finite_never_reaches_the_weights() -> None:
    learner = solo()
    before = weights(learner.backend)
    bad = rollouts(2)
    bad[1].streams["advantages"][bad[1].loss_mask] = np.nan
    report = learner.update(packs(bad, [1, 1]))
    assert report.outcome is StepOutcome.SKIPPED_NOT_FINITE
    assert not math.isfinite(report.grad_norm)
    assert learner.steps == 0
    assert max_difference(before, weights(learner.backend)) == 0.0
    good = learner.update(packs(rollouts(2), [2]))
    assert good.outcome is StepOutcome.UPDATED
    fresh = solo()
    fresh.update(packs(rollouts(2), [2]))
    assert max_difference(weights(fresh.backend), weights(learner.backend)) == 0.0


def test_a_run_ends_after_three_updates_in_a_row_without_a_finite_gradient(caplog: pytest.LogCaptureFixture) -> None:
    learner, diverged = solo(), Divergence("--actor_learning_rate")
    bad = rollouts(2)
    bad[1].streams["advantages"][bad[1].loss_mask] = np.nan
    good, bad = learner.update(packs(rollouts(2), [2])), learner.update(packs(bad, [2]))
    empty = learner.update([])
    diverged.watch(1, [bad, bad])
    diverged.watch(2, [good, bad])
    assert diverged.in_a_row == 1
    diverged.watch(3, [empty, bad])
    with pytest.raises(RunError) as error:
        diverged.watch(4, [bad, good])
    assert str(error.value) == (
        "Training has diverged: 3 updates in a row, the last of them in step 4, had a gradient that is not finite. Lower "
        "--actor_learning_rate or --max_norm, or look for extreme values in the data of these steps, and start again, or from "
        "an earlier checkpoint."
    )
    said = "update was skipped, as the gradient norm is nan"
    empty_said = "step 3: an update was skipped, as no token or row is in the loss"
    assert caplog.messages == [
        *(f"step {step}: an {said}" for step in (1, 1, 2)),
        empty_said,
        *(f"step {step}: an {said}" for step in (3, 4)),
    ]


def test_a_dummy_has_zero_loss_and_reaches_every_parameter() -> None:
    model = policy()
    nothing(objective().forward(model, dummy_batch())).backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) == 0.0 for p in model.parameters())
    model = critic()
    outputs = model(dummy_batch(), Needs(values=True, scores=True))
    loss = nothing(outputs)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and float(p.grad.abs().max()) == 0.0 for p in model.parameters())


def test_value_objective_reports_loss_and_explained_variance() -> None:
    samples = rollouts(5)
    backend = trainable(critic(), World.solo(CPU), BackendOptions(bf16=False))
    values = np.concatenate(Scorer(backend.module, backend.world).values(packs(samples, [5])))
    old, returns = (
        np.concatenate([s.streams[name][s.loss_mask] for s in samples]).astype(np.float64)
        for name in ("old_values", "returns")
    )
    held = old + np.clip(values - old, -0.2, 0.2)
    loss = 0.5 * np.maximum((values - returns) ** 2, (held - returns) ** 2).mean()
    report = Learner(backend, ValueObjective(0.2), scheduled(Scheduler.CONSTANT, 1e-3, 1), 1.0).update(
        packs(samples, [2, 3])
    )
    assert report.metrics["value/loss"] == pytest.approx(loss, rel=1e-5)
    assert report.metrics["value/mean"] == pytest.approx(values.mean(), rel=1e-5)
    assert report.metrics["value/explained_variance"] == pytest.approx(
        1 - np.var(returns - values) / np.var(returns), rel=1e-4
    )
    assert set(report.metrics) == {"value/loss", "value/mean", "value/return", "value/explained_variance"}


def test_scores_of_a_frozen_model_in_the_callers_order() -> None:
    model, alone = critic(), World.solo(CPU)
    samples = rollouts(4)
    scorer = Scorer(model, alone, frozen(model, alone, BackendOptions(bf16=False)))
    batches = packs(samples, [4])
    plain = scorer.scores(batches)
    np.testing.assert_allclose(plain, [scorer.scores(packs([s], [1]))[0] for s in samples], atol=1e-5)
    assert not any(p.requires_grad for p in model.parameters())


def test_small_rl_steps_move_bf16_weights_only_with_masters() -> None:
    """At lr 1e-6 Adam's step is far below bfloat16's spacing at most weights: rounding loses it, masters keep it."""
    batches = packs(rollouts(4), [4])
    with_masters = solo(bf16=True, lr=1e-6)
    before = weights(with_masters.backend)
    for _ in range(3):
        with_masters.update(batches)
    after = weights(with_masters.backend)
    used = [name for name in before if "norm" in name]
    assert all(bool((before[name] != after[name]).all()) for name in used)
    pure = policy(dtype=torch.bfloat16)
    without = learner(trainable(pure, World.solo(CPU), BackendOptions(bf16=False)), lr=1e-6)
    start = weights(without.backend)
    for _ in range(3):
        without.update(batches)
    end = weights(without.backend)
    assert all(torch.equal(start[name], end[name]) for name in used)
