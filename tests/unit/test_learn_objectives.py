"""The objectives on outputs chosen by hand: pairing, alignment, metrics, refusals; and that a step goes the right way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.learn_tools import CPU, critic, policy
from tests.objective_cases import BAD, GOOD, VOCAB, pairs, responses, steps, teacher, verdicts
from tests.objective_tools import LOG2, LOG3, double, history, learner, pair, row, summary
from tests.tiny import tiny_model
from togi.config.choices import Divergence, RewardLoss
from togi.data.packing import pack
from togi.errors import ConfigError
from togi.learn.objective import Objective, SFTObjective
from togi.learn.scorer import Scorer
from togi.methods import preference
from togi.methods.kd_objective import DistillationObjective
from togi.methods.kto_objective import KTOObjective
from togi.methods.preference import DPOObjective, PairwiseRewardObjective
from togi.methods.prm_objective import StepRewardObjective
from togi.model.attention import SEGMENTS
from togi.model.policy import Needs, Outputs, PolicyModel
from togi.parallel.process import World
from togi.sample import Sample


def stock_logits(model: PolicyModel, tokens: np.ndarray) -> Tensor:
    """Logits after each token of one sequence, with Transformers' own attention: [L, V]."""
    model.hf.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model.hf(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0]
    model.hf.set_attn_implementation(SEGMENTS)
    return logits


# ---- by hand


def test_sft_is_a_token_mean_with_its_perplexity():
    batch = pack([row(3, "a", {}), row(2, "b", {})], share_prefix=False)
    objective, outputs = SFTObjective(), Outputs(double(-LOG2, -LOG2, -4 * LOG2))
    assert objective.count(batch) == 3
    assert objective.loss(outputs, batch).sum.item() == pytest.approx(6 * LOG2)
    assert summary(objective, outputs, batch) == {"loss": pytest.approx(2 * LOG2), "perplexity": pytest.approx(4.0)}
    assert objective.summary({"loss": 1e4})["perplexity"] == math.inf


@pytest.mark.parametrize("share_prefix", [False, True])
def test_pairs_follow_the_list_that_was_packed(share_prefix):
    batch = pack([*pair("a", 2, 1), *pair("b", 1, 2)], share_prefix=share_prefix)
    assert batch.segments.is_plain != share_prefix
    assert [side.tolist() for side in preference.pairs(batch)] == [[0, 2], [1, 3]]
    assert batch.values["chosen"].tolist() == [1, 0, 1, 0] and DPOObjective().count(batch) == 2


def test_a_torn_pair_is_a_defect():
    first, second = pair("a", 2, 1), pair("b", 1, 2)
    for samples in (first[:1], [first[0], second[0]], [first[1], first[0]]):
        with pytest.raises(AssertionError, match="pair"):
            DPOObjective().count(pack(samples, share_prefix=False))


def test_reward_model_by_hand():
    batch = pack([*pair("a", 1, 1, margin=LOG3), *pair("b", 1, 1)], share_prefix=False)
    outputs = Outputs(scores_N=double(2 * LOG3, 0.0, 0.0, LOG3))
    plain, margin = PairwiseRewardObjective(), PairwiseRewardObjective(use_margin=True)
    assert plain.count(batch) == 2
    assert margin.loss(outputs, batch).sum.item() == pytest.approx(math.log(4 / 3) + math.log(4), abs=1e-7)
    expected = (math.log(10 / 9) + math.log(4)) / 2
    assert summary(plain, outputs, batch) == pytest.approx(
        {
            "loss": expected,
            "accuracy": 0.5,
            "reward/chosen": LOG3,
            "reward/rejected": LOG3 / 2,
            "reward/margin": LOG3 / 2,
        }
    )
    logexp = summary(PairwiseRewardObjective(RewardLoss.LOGEXP), outputs, batch)
    assert logexp["loss"] == pytest.approx(expected)
    tie = Outputs(scores_N=torch.ones(4))
    assert summary(plain, tie, batch)["accuracy"] == 0.0


def test_bfloat16_scores_are_compared_in_float32():
    model = critic().bfloat16()
    outputs = model(pack(pairs(1), share_prefix=False), Needs(scores=True))
    assert outputs.scores_N.dtype == torch.float32


def test_dpo_by_hand():
    # chosen: policy (-1 + a) twice, reference -1 twice; rejected: policy and reference -1
    batch = pack(pair("a", 2, 1), share_prefix=False)
    a = 5 * LOG3
    outputs = Outputs(double(-1 + a, -1 + a, -1.0))
    objective = DPOObjective(beta=0.1, nll_loss_coef=0.5)
    assert objective.count(batch) == 1
    assert summary(objective, outputs, batch) == pytest.approx(
        {
            "loss": math.log(4 / 3) + 0.5 * (1 - a),
            "chosen_nll": 1 - a,
            "accuracy": 1.0,
            "reward/chosen": LOG3,
            "reward/rejected": 0.0,
            "reward/margin": LOG3,
        }
    )
    assert summary(DPOObjective(beta=0.1, ipo=True), outputs, batch)["loss"] == pytest.approx((2 * a - 5) ** 2)


def test_kto_by_hand():
    values = {"mismatched": 0.0, "kl_estimate": 1.0}
    rows = [
        row(3, "a", {**values, "desirable": 1.0}, [-1.0, -2.0]),
        row(2, "b", {**values, "desirable": 0.0}, [-1.0]),
        row(2, "c", {**values, "desirable": 0.0}, [-1.0]),
    ]
    batch = pack(rows, share_prefix=False)
    # d = 1 + 2 log 3, 1 + 2 log 3, 1 - 2 log 3; beta (d - KL) = log 3, log 3, -log 3
    outputs = Outputs(double(0.0, -2 + 2 * LOG3, 2 * LOG3, -2 * LOG3))
    objective = KTOObjective(beta=0.5, desirable_weight=2.0, undesirable_weight=1.0)
    assert objective.count(batch) == 3
    assert summary(objective, outputs, batch) == pytest.approx(
        {
            "loss": (2 / 4 + 3 / 4 + 1 / 4) / 3,
            "accuracy": 2 / 3,
            "kl/estimate": 1.0,
            "reward/chosen": 0.5 + LOG3,
            "reward/rejected": 0.5,
            "reward/margin": LOG3,
        }
    )
    one_kind = summary(objective, Outputs(double(0.0, 0.0)), pack(rows[1:], share_prefix=False))
    assert math.isnan(one_kind["reward/chosen"]) and math.isnan(one_kind["reward/margin"])


def test_mismatched_rows_are_never_trained_on():
    batch = pack([row(2, "a", {"desirable": 0.0, "mismatched": 1.0, "kl_estimate": 0.0}, [-1.0])], share_prefix=False)
    with pytest.raises(AssertionError, match="KL estimate only"):
        KTOObjective().count(batch)


def test_soft_labels_by_hand():
    mask = np.array([False, True, True])
    sample = Sample(np.arange(3), mask, 0, "a", {"labels": np.array([np.nan, 0.75, 0.125], dtype=np.float32)})
    batch = pack([sample], share_prefix=False)
    # softmax of (log 3, 0) is (3/4, 1/4): right for 0.75, wrong for 0.125
    outputs = Outputs(next_logits_KR=double(LOG3, 0.0, LOG3, 0.0).view(2, 2))
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    crossed = -0.125 * math.log(0.75) - 0.875 * math.log(0.25)
    objective = StepRewardObjective((GOOD, BAD), soft=True)
    assert summary(objective, outputs, batch) == pytest.approx({"loss": (entropy + crossed) / 2, "accuracy": 0.5})


def test_step_rewards_are_predicted_at_the_placeholder_itself():
    """What follows the placeholder, or the label, cannot change the prediction; the placeholder can."""
    model = policy(dtype=torch.float64).eval()
    sample = steps(number=1)[0]
    first = int(np.flatnonzero(sample.loss_mask)[0])

    def prediction(tokens: np.ndarray) -> float:
        batch = pack([dataclasses.replace(sample, tokens=tokens)], share_prefix=False)
        with torch.no_grad():
            return model(batch, Needs(next_logits=(GOOD, BAD))).next_logits_KR[0, 0].item()

    base, after, at = (sample.tokens.copy() for _ in range(3))
    after[first + 1] = (after[first + 1] + 1) % 256
    at[first] = (at[first] + 1) % 256
    assert prediction(after) == pytest.approx(prediction(base), abs=1e-12)
    assert abs(prediction(at) - prediction(base)) > 1e-3
    assert prediction(base) == pytest.approx(stock_logits(model, base)[first, GOOD].item(), abs=1e-6)


def test_label_hits_are_where_the_label_is_the_likeliest_token():
    model = policy(dtype=torch.float64).eval()
    sample = steps(number=1)[0]
    places = np.flatnonzero(sample.loss_mask)
    logits = stock_logits(model, sample.tokens)
    labels = np.full(len(sample.tokens), np.nan, dtype=np.float32)
    labels[places] = [logits[place].argmax().item() for place in places]
    labels[places[0]] = (labels[places[0]] + 1) % VOCAB
    batch = pack([dataclasses.replace(sample, streams={"labels": labels})], share_prefix=False)
    objective = StepRewardObjective()
    metrics = summary(objective, objective.forward(model, batch), batch)
    assert metrics["accuracy"] == pytest.approx((len(places) - 1) / len(places))


def test_the_first_response_token_is_distilled_and_the_last_has_no_successor():
    """The divergence is on the distributions that the cross-entropy uses, one for each token in the loss."""
    model, master = policy(dtype=torch.float64).eval(), teacher()
    sample = responses(1)[0]
    own, theirs = (stock_logits(m, sample.tokens).log_softmax(-1) for m in (model, master))
    with torch.no_grad():
        outputs = DistillationObjective(master, VOCAB).forward(model, pack([sample], share_prefix=False))
    before = np.flatnonzero(sample.loss_mask) - 1
    assert before[0] == sample.prompt_length - 1
    expected = (theirs[before].exp() * (theirs[before] - own[before])).sum(-1)
    torch.testing.assert_close(outputs.divergence_K, expected, rtol=1e-5, atol=1e-6)


# ---- refusals


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (lambda: PairwiseRewardObjective(RewardLoss.LOGEXP, use_margin=True), "--margin_loss"),
        (lambda: DPOObjective(beta=0.0), "--beta"),
        (lambda: DPOObjective(label_smoothing=0.5), "--label_smoothing"),
        (lambda: DPOObjective(label_smoothing=0.1, ipo=True), "--ipo"),
        (lambda: KTOObjective(beta=-1.0), "--beta"),
        (lambda: KTOObjective(undesirable_weight=-1.0), "--undesirable_loss_weight"),
        (lambda: StepRewardObjective(soft=True), "--reward_tokens"),
        (lambda: StepRewardObjective((1, 2, 3), soft=True), "--reward_tokens"),
        (lambda: StepRewardObjective((1, 1)), "--reward_tokens"),
        (lambda: DistillationObjective(policy(), VOCAB, kd_coef=1.5), "--kd_coef"),
    ],
)
def test_what_the_settings_refuse_is_a_defect(make: Callable[[], Objective], flag: str):
    with pytest.raises(AssertionError, match=flag):
        make()


def test_a_teacher_of_another_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="--teacher_model predicts 300 tokens and --pretrain 299"):
        DistillationObjective(policy(), VOCAB - 1)


def test_a_label_outside_the_reward_tokens_is_a_defect():
    batch = pack(steps(number=1), share_prefix=False)
    with pytest.raises(AssertionError, match="reward tokens"):
        StepRewardObjective((1, 2)).count(batch)


# ---- a few steps go the right way


def scored(model: nn.Module, samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the model's own log-probs as the reference's: the policy starts where the reference is."""
    logprobs = Scorer(model, World.solo(CPU)).logprobs([pack(samples, share_prefix=False)])
    return [with_ref(sample, own) for sample, own in zip(samples, logprobs, strict=True)]


def with_ref(sample: Sample, logprobs: np.ndarray) -> Sample:
    stream = np.full(len(sample.tokens), np.nan, dtype=np.float32)
    stream[sample.loss_mask] = logprobs
    return dataclasses.replace(sample, streams={"ref_logprobs": stream})


def test_sft_lowers_its_loss():
    run = history(learner(policy(), SFTObjective()), responses())
    assert run[-1]["loss"] < run[0]["loss"] - 0.5
    assert run[0]["perplexity"] == pytest.approx(math.exp(run[0]["loss"]))


def test_reward_model_learns_its_pairs():
    run = history(learner(critic(), PairwiseRewardObjective()), pairs(6))
    assert run[-1]["accuracy"] == 1.0 > run[0]["accuracy"]
    assert run[-1]["reward/margin"] > run[0]["reward/margin"] + 0.5


@pytest.mark.parametrize("objective", [DPOObjective(), DPOObjective(label_smoothing=0.1), DPOObjective(ipo=True)])
def test_dpo_starts_at_zero_and_raises_the_margin(objective):
    model = policy()
    run = history(learner(model, objective), scored(model, pairs(4)))
    assert run[0]["reward/margin"] == pytest.approx(0.0, abs=1e-5)
    assert run[0]["loss"] == pytest.approx(25.0 if objective.ipo else LOG2, abs=1e-3)
    assert run[-1]["reward/margin"] > 0.1
    assert run[-1]["accuracy"] == 1.0


def test_kto_moves_desirable_rows_up_and_undesirable_ones_down():
    model = policy()
    rows = [dataclasses.replace(s, values={**s.values, "kl_estimate": 0.0}) for s in verdicts()]
    run = history(learner(model, KTOObjective(beta=0.1)), scored(model, rows))
    assert run[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    assert run[-1]["reward/chosen"] > 0.05
    assert run[-1]["reward/rejected"] < -0.05
    assert run[-1]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("objective", "soft"),
    [
        (StepRewardObjective(), False),
        (StepRewardObjective((GOOD, BAD)), False),
        (StepRewardObjective((GOOD, BAD), soft=True), True),
    ],
)
def test_step_rewards_learn_their_labels(objective, soft):
    run = history(learner(policy(), objective), steps(soft=soft), 12)
    assert run[-1]["loss"] < run[0]["loss"] - 0.1
    assert run[-1]["accuracy"] > max(0.8, run[0]["accuracy"])


@pytest.mark.parametrize("kind", list(Divergence))
def test_distillation_moves_the_student_towards_the_teacher(kind):
    """Also with a teacher of another width, which no weight is compared with."""
    hf = tiny_model(seed=7, hidden_size=32)
    hf.set_attn_implementation(SEGMENTS)
    master = PolicyModel(hf).requires_grad_(False).eval()
    before = [parameter.clone() for parameter in master.parameters()]
    model = policy()
    run = history(learner(model, DistillationObjective(master, model.vocabulary, 1.0, kind)), responses())
    assert run[0]["loss"] == pytest.approx(run[0]["kl/teacher"])
    assert run[-1]["kl/teacher"] < 0.8 * run[0]["kl/teacher"]
    assert all(torch.equal(one, other) for one, other in zip(before, master.parameters(), strict=True))
