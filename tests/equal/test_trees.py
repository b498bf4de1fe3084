"""What samples have in common, laid out once = every row alone: losses, gradients, metrics; episodes with forks by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.learn_tools import critic, policy, solo, weights
from tests.objective_cases import CASES, Step, gradients, run
from tests.tiny import tiny_model
from tests.tree_cases import alike, as_rows, by_hand, episodes
from togi.batch import Batch
from togi.config.architectures import MIXTURES
from togi.config.choices import AdvantageEstimator, Aggregation, CorrectionType, KLEstimator, PolicyLossType
from togi.config.parse import build
from togi.config.rl import RLConfig
from togi.data.packing import in_order, pack, pack_all, pack_stats
from togi.env.trace import Trace
from togi.learn.objective import EngineCorrection, Objective, PolicyObjective, ValueObjective
from togi.learn.scorer import Scorer
from togi.model.attention import SEGMENTS
from togi.model.policy import Needs, PolicyModel
from togi.obs.metrics import merge, reduced
from togi.parallel.process import World
from togi.pump.experience import ScoredGroup, to_sample, with_advantages
from togi.sample import FinishReason, Generation, Outcome, Prompt, Sample, Score, with_streams

CPU = torch.device("cpu")
# RMS norms and rotary tables compute in float32 inside the model, hence not to 1e-15.
TOLERANCE = 2e-6
some_seeds = settings(deadline=None, max_examples=2, derandomize=True)


def assert_same(one: Step, other: Step) -> None:
    assert one.loss == pytest.approx(other.loss, rel=TOLERANCE, abs=TOLERANCE)
    assert one.gradients.keys() == other.gradients.keys()
    largest = max(float(g.abs().max()) for g in other.gradients.values())
    assert largest > 1e-6, "nothing to compare"
    for name, gradient in one.gradients.items():
        assert float((gradient - other.gradients[name]).abs().max()) < 10 * TOLERANCE * largest, name
    assert one.metrics == pytest.approx(other.metrics, rel=1e-5, abs=2e-5, nan_ok=True)


@pytest.mark.parametrize("name", CASES)
@some_seeds
@given(st.integers(0, 10**6))
def test_common_beginnings_change_no_objective(name: str, seed: int) -> None:
    """Every method: rows of one group and of several begin alike, also inside of responses that are in the loss of both."""
    case = CASES[name]
    samples = alike(case.samples(), seed)
    shared, plain = (pack(samples, share_prefix=share) for share in (True, False))
    assert shared.num_tokens < plain.num_tokens and plain.segments.is_plain == (name != "episodes")
    assert_same(run(case, [shared]), run(case, [plain]))


def step(objective: Objective, model: torch.nn.Module, batches: Sequence[Batch]) -> Step:
    count = sum(objective.count(batch) for batch in batches)
    total, parts = 0.0, []
    for batch in batches:
        loss = objective.loss(objective.forward(model, batch), batch)
        (loss.sum / count).backward()
        total += float(loss.sum.detach()) / count
        parts.append(loss.metrics)
    found = Step(total, gradients(model), objective.summary(reduced(merge(parts))))
    model.zero_grad()
    return found


LOSSES = [
    (kind, aggregation, correction)
    for kind, aggregation in product((PolicyLossType.PPO, PolicyLossType.GSPO, PolicyLossType.CISPO), Aggregation)
    for correction in (None, CorrectionType.SEQ_MASK_TIS)
]


def surrogates(kind: PolicyLossType, aggregation: Aggregation, correction: CorrectionType | None) -> PolicyObjective:
    trust = None if correction is None else EngineCorrection(correction, 0.7, 1.4)
    dual = None if kind is PolicyLossType.CISPO else 1.4
    return PolicyObjective(
        0.2, 0.3, aggregation, kind, dual, 8.0, KLEstimator.K3, 0.3, trust, temperature=0.7, against_engine=False
    )


@some_seeds
@given(st.integers(0, 10**6))
def test_forks_change_no_policy_loss(seed: int) -> None:
    """One pack with everything shared, one without, and micro-batches of both: the same losses and gradients."""
    samples, model = episodes(6, seed), policy(dtype=torch.float64)
    layouts = [[pack(samples, share_prefix=True)], [pack(samples, share_prefix=False)]]
    layouts += [pack_all(samples, max_tokens=30, max_sequences=None, share_prefix=share) for share in (True, False)]
    assert len(layouts[2]) > 1 and layouts[0][0].num_tokens < layouts[1][0].num_tokens
    for kind, aggregation, correction in LOSSES:
        objective = surrogates(kind, aggregation, correction)
        one, *others = (step(objective, model, batches) for batches in layouts)
        for other in others:
            assert_same(other, one)


@some_seeds
@given(st.integers(0, 10**6))
def test_forks_change_no_value_loss(seed: int) -> None:
    samples, model = episodes(6, seed), critic().double()
    shared, plain = (step(ValueObjective(0.2), model, [pack(samples, share_prefix=share)]) for share in (True, False))
    assert_same(shared, plain)


@pytest.mark.parametrize(
    ("kind", "aggregation"),
    [("ppo", "token_mean"), ("ppo", "sequence_mean"), ("gspo", "sequence_mean"), ("cispo", "token_mean")],
)
@pytest.mark.parametrize("share", [True, False])
def test_an_episode_is_one_sequence_whatever_its_rows(kind: str, aggregation: str, share: bool) -> None:
    samples, model = episodes(4, 7), policy(dtype=torch.float64)
    assert all(sample.forks for sample in samples)
    dual = None if kind == "cispo" else 1.4
    objective = PolicyObjective(0.2, 0.3, Aggregation(aggregation), PolicyLossType(kind), dual, temperature=0.7)
    ours = step(objective, model, [pack(samples, share_prefix=share)])
    loss = by_hand(kind, aggregation, model, samples)
    loss.backward()
    assert ours.loss == pytest.approx(loss.item(), rel=TOLERANCE)
    for name, gradient in gradients(model).items():
        assert float((gradient - ours.gradients[name]).abs().max()) < 1e-5, name


def test_scores_come_back_by_the_tokens_of_each_sample() -> None:
    """Log-probs and values of every token in the loss, in the sample's own order, from packs that share and cut."""
    samples = [*episodes(6, 3), *alike(episodes(4, 4, turns=1), 5)]
    scorers = Scorer(policy(dtype=torch.float64), World.solo(CPU)), Scorer(critic().double(), World.solo(CPU))
    batches = pack_all(samples, max_tokens=40, max_sequences=None, share_prefix=True)
    assert len(batches) > 1 and sum(pack_stats(batch).saved_share > 0 for batch in batches) > 1
    for found, alone in (
        (in_order(batches, scorers[0].logprobs(batches)), scorers[0].logprobs),
        (in_order(batches, scorers[1].values(batches)), scorers[1].values),
    ):
        for sample, values in zip(samples, found, strict=True):
            rows, places = as_rows(sample)
            wanted = np.concatenate([alone([pack([row], share_prefix=False)])[0] for row in rows])
            np.testing.assert_allclose(values[places], wanted, rtol=1e-5, atol=1e-6)
    scores = in_order(batches, scorers[1].scores(batches))
    wanted = [scorers[1].scores([pack(as_rows(sample)[0][-1:], share_prefix=False)])[0] for sample in samples]
    np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", ["llama", "mistral", "mixtral"])
def test_a_deep_tree_of_an_architecture(arch: str) -> None:
    """Windows shorter than the rows, and a router: each episode's balance loss is over its tokens, each once."""
    hf = tiny_model(arch, dtype=torch.float64, **({"sliding_window": 5} if arch == "mistral" else {}))
    hf.set_attn_implementation(SEGMENTS)
    if arch in MIXTURES:
        hf.set_experts_implementation("eager")  # the default, grouped_mm, has no float64
    samples, model = episodes(4, 11), PolicyModel(hf).train()
    needs = Needs(logprobs=True, entropy=True, balance=arch == "mixtral")
    results = []
    for batch in (pack(samples, share_prefix=True), pack(samples, share_prefix=False)):
        outputs = model(batch, needs, 0.7)
        total = (outputs.logprobs_K * outputs.logprobs_K.detach().cos()).sum() + outputs.entropy_K.sum()
        (total + outputs.balance_N.sum()).backward()
        results.append((outputs.logprobs_K, outputs.balance_N, gradients(model)))
        model.zero_grad()
    for one, other in zip(results[0][:2], results[1][:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in results[1][2].values())
    for name, gradient in results[0][2].items():
        assert float((gradient - results[1][2][name]).abs().max()) < 1e-5 * largest, name


def test_two_steps_of_training_with_and_without_the_tree() -> None:
    samples = episodes(6, 2)
    found = []
    for share in (True, False):
        learner = solo(dtype=torch.float64)
        batches = pack_all(samples, max_tokens=60, max_sequences=None, share_prefix=share)
        reports = [learner.update(batches) for _ in range(2)]
        found.append((weights(learner.backend), reports[-1]))
    assert found[0][1].packed.tokens < found[1][1].packed.tokens
    assert found[0][1].packed.unshared_tokens == found[1][1].packed.unshared_tokens
    assert found[0][1].grad_norm == pytest.approx(found[1][1].grad_norm, rel=1e-5)
    for name, tensor in found[0][0].items():
        torch.testing.assert_close(tensor, found[1][0][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimator", AdvantageEstimator)
def test_no_estimator_knows_of_forks(estimator: AdvantageEstimator) -> None:
    """Advantages of an episode are those of its tokens in their order; the sample keeps its forks, and packs share them."""
    config = build(RLConfig, {"advantage_estimator": estimator.value, "n_samples_per_prompt": 2}, {}).config
    groups, samples = list[ScoredGroup](), list[Sample]()
    rng = np.random.default_rng(3)
    for group in range(2):
        prompt, rollouts = Prompt(str(group), (1, 2, group), ""), []
        for _ in range(2):
            trace, context = Trace(prompt), [1, 2, group]
            for _ in range(3):
                words = rng.integers(0, 9, 4).tolist()
                trace.add(context, Generation(tuple(words), (-1.0,) * 4, FinishReason.STOP, (0,) * 4))
                context += [*words[2:], 5]  # what the policy wrote first is left out, so the next request forks
            rollouts.append(trace.rollout(str(group), "", FinishReason.STOP))
            numbers = {name: [rng.normal(size=12)] for name in ("old_logprobs", "ref_logprobs", "old_values")}
            samples += with_streams([to_sample(rollouts[-1])], numbers)
        scores = tuple(Score(Outcome.SCORE, float(rng.normal())) for _ in rollouts)
        groups.append(ScoredGroup(tuple(rollouts), scores))
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    flat = [replace(sample, forks=()) for sample in samples]
    found, expected = (with_advantages(groups, places, given, config, 0.1) for given in (samples, flat))
    assert all(len(sample.forks) == 2 for sample in found)
    wanted = np.concatenate([sample.streams["advantages"][sample.loss_mask] for sample in expected])
    for share in (True, False):
        assert pack(found, share_prefix=share).streams["advantages"].tolist() == wanted.tolist()
