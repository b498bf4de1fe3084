"""Every objective with rows for it, and the same loss a second time from its definition.

The second time is naive on purpose: rows padded on the right, Transformers' own attention, logits of all tokens, one formula
each; nothing of it comes from togi. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from tests import policy_cases, tree_cases
from tests.learn_tools import critic, policy
from togi.batch import Batch
from togi.config.choices import Aggregation, CorrectionType, Divergence, PolicyLossType, RewardLoss
from togi.data.packing import pack
from togi.learn.objective import Objective, PolicyObjective, SFTObjective
from togi.methods.kd_objective import DistillationObjective
from togi.methods.kto_objective import KTOObjective
from togi.methods.preference import DPOObjective, ORPOObjective, PairwiseRewardObjective, SimPOObjective
from togi.methods.prm_objective import StepRewardObjective
from togi.obs.metrics import merge, reduced
from togi.sample import Sample

VOCAB = 300
GOOD, BAD = 43, 45
KL = 0.75


@dataclass(frozen=True)
class Rows:
    """The padded rows of a step, as the naive formulas want them: shape B, S."""

    tokens: Tensor
    attended: Tensor
    mask: Tensor
    streams: dict[str, Tensor]
    values: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    make: Callable[[], Objective]
    samples: Callable[[], list[Sample]]
    naive: Callable[[nn.Module, Rows], Tensor]
    model: Callable[[], nn.Module] = lambda: policy(dtype=torch.float64)
    unit: int = 1
    """How many rows stay together."""


# ---- rows


def _sample(rng: np.random.Generator, prompt: np.ndarray, length: int, group: str, values: dict[str, float]) -> Sample:
    tokens = np.concatenate([prompt, rng.integers(0, 256, length)])
    mask = np.arange(len(tokens)) >= len(prompt)
    ref = np.where(mask, rng.uniform(-6.5, -5.0, len(tokens)), np.nan).astype(np.float32)
    return Sample(tokens, mask, len(prompt), group, {"ref_logprobs": ref}, values)


def responses(number: int = 6, seed: int = 0) -> list[Sample]:
    """Rows of one or two turns: the second turn's question is not in the loss."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(number):
        prompt = rng.integers(0, 256, int(rng.integers(2, 5)))
        sample = _sample(rng, prompt, int(rng.integers(3, 9)), str(i), {})
        mask = sample.loss_mask.copy()
        if i % 2 == 1:
            mask[len(prompt) + 1 : len(prompt) + 2] = False
        samples.append(replace(sample, loss_mask=mask, streams={}))
    return samples


def pairs(number: int = 4, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(number):
        prompt, margin = rng.integers(0, 256, int(rng.integers(2, 6))), float(rng.uniform(0, 1))
        for chosen in (1.0, 0.0):
            values = {"chosen": chosen, "margin": margin}
            samples.append(_sample(rng, prompt, int(rng.integers(1, 7)), str(i), values))
    return samples


def verdicts(number: int = 6, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(number):
        values = {"desirable": float(i % 3 > 0), "mismatched": 0.0, "kl_estimate": KL}
        samples.append(_sample(rng, rng.integers(0, 256, 3), int(rng.integers(1, 7)), str(i), values))
    return samples


def steps(soft: bool = False, number: int = 5, seed: int = 0) -> list[Sample]:
    """Two or three placeholders a row, one of them its last token."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(number):
        length = int(rng.integers(8, 12))
        mask = np.zeros(length, dtype=bool)
        mask[[3, 5, length - 1][i % 2 :]] = True
        labels = rng.uniform(0, 1, length) if soft else rng.choice([GOOD, BAD], length)
        streams = {"labels": np.where(mask, labels, np.nan).astype(np.float32)}
        samples.append(Sample(rng.integers(0, 256, length), mask, 0, str(i), streams))
    return samples


# ---- the definitions


def padded(samples: Sequence[Sample]) -> Rows:
    size = max(len(sample.tokens) for sample in samples)

    def fill(rows: Sequence[np.ndarray], value: float) -> Tensor:
        return torch.from_numpy(np.stack([np.pad(r, (0, size - len(r)), constant_values=value) for r in rows]))

    first = samples[0]
    return Rows(
        fill([s.tokens for s in samples], 0),
        fill([np.ones(len(s.tokens), dtype=np.int64) for s in samples], 0),
        fill([s.loss_mask for s in samples], False),
        {name: fill([s.streams[name] for s in samples], math.nan).double() for name in first.streams},
        {name: torch.tensor([s.values[name] for s in samples], dtype=torch.float64) for name in first.values},
    )


def full_logp(model: nn.Module, rows: Rows) -> Tensor:
    """Log-probs over the vocabulary after each token: [B, S, V]."""
    model.hf.set_attn_implementation("eager")
    logits = model.hf(input_ids=rows.tokens, attention_mask=rows.attended, use_cache=False).logits
    return logits.log_softmax(-1)


def token_logp(model: nn.Module, rows: Rows) -> Tensor:
    """The log-prob of each token, 0 where it is not in the loss: [B, S]."""
    logp = full_logp(model, rows)[:, :-1].gather(2, rows.tokens[:, 1:, None])[:, :, 0]
    return torch.where(rows.mask[:, 1:], logp, 0.0)


def ratios(model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """S_policy - S_ref and S_policy of each row."""
    own = token_logp(model, rows).sum(1)
    ref = torch.where(rows.mask, rows.streams["ref_logprobs"], 0.0).sum(1)
    return own - ref, own


def naive_sft(model: nn.Module, rows: Rows) -> Tensor:
    return -token_logp(model, rows).sum() / rows.mask.sum()


def naive_rm(margin: bool) -> Callable[[nn.Module, Rows], Tensor]:
    def loss(model: nn.Module, rows: Rows) -> Tensor:
        model.hf.set_attn_implementation("eager")
        states = model.hf.base_model(input_ids=rows.tokens, attention_mask=rows.attended, use_cache=False)
        last = rows.attended.sum(1) - 1
        scores = model.hf.score(states.last_hidden_state[torch.arange(len(last)), last])[:, 0]
        gap = scores[0::2] - scores[1::2] - (rows.values["margin"][0::2] if margin else 0.0)
        return torch.log(1 + torch.exp(-gap)).mean()

    return loss


def naive_dpo(kind: str) -> Callable[[nn.Module, Rows], Tensor]:
    def loss(model: nn.Module, rows: Rows) -> Tensor:
        ratio, own = ratios(model, rows)
        h, beta = ratio[0::2] - ratio[1::2], 0.1
        right, wrong = torch.log(torch.sigmoid(beta * h)), torch.log(torch.sigmoid(-beta * h))
        if kind == "ipo":
            return ((h - 1 / (2 * beta)) ** 2).mean()
        if kind == "cdpo":
            return (-0.8 * right - 0.2 * wrong).mean()
        if kind == "nll":
            return (-right - 0.3 * own[0::2] / rows.mask.sum(1)[0::2]).mean()
        return -right.mean()

    return loss


def mean_logp(model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """The mean log-prob of the tokens of the chosen and of the rejected responses."""
    means = token_logp(model, rows).sum(1) / rows.mask.sum(1)
    return means[0::2], means[1::2]


def naive_simpo(model: nn.Module, rows: Rows) -> Tensor:
    chosen, rejected = mean_logp(model, rows)
    return -torch.log(torch.sigmoid(2.5 * (chosen - rejected) - 1.25)).mean()


def naive_orpo(model: nn.Module, rows: Rows) -> Tensor:
    chosen, rejected = mean_logp(model, rows)
    odds = [torch.exp(mean) / (1 - torch.exp(mean)) for mean in (chosen, rejected)]
    return (-chosen - 0.3 * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))).mean()


def naive_kto(model: nn.Module, rows: Rows) -> Tensor:
    gap = 0.2 * (ratios(model, rows)[0] - KL)
    good = rows.values["desirable"] == 1
    return torch.where(good, 1.5 * (1 - torch.sigmoid(gap)), 0.5 * (1 - torch.sigmoid(-gap))).mean()


def naive_steps(kind: str) -> Callable[[nn.Module, Rows], Tensor]:
    def loss(model: nn.Module, rows: Rows) -> Tensor:
        logp, labels = full_logp(model, rows)[rows.mask], rows.streams["labels"][rows.mask]
        if kind == "vocabulary":
            return nn.functional.nll_loss(logp, labels.long())
        two = logp[:, [GOOD, BAD]].log_softmax(-1)
        p = labels if kind == "soft" else (labels == GOOD).double()
        return -(p * two[:, 0] + (1 - p) * two[:, 1]).mean()

    return loss


def teacher() -> nn.Module:
    return policy(seed=7, dtype=torch.float64).requires_grad_(False).eval()


def naive_distillation(reverse: bool) -> Callable[[nn.Module, Rows], Tensor]:
    def loss(model: nn.Module, rows: Rows) -> Tensor:
        own = full_logp(model, rows)[:, :-1][rows.mask[:, 1:]]
        theirs = full_logp(teacher(), rows)[:, :-1][rows.mask[:, 1:]]
        entropy = nn.functional.nll_loss(own, rows.tokens[:, 1:][rows.mask[:, 1:]])
        one, other = (own, theirs) if reverse else (theirs, own)
        return 0.6 * entropy + 0.4 * (one.exp() * (one - other)).sum(-1).mean()

    return loss


def some_generated(number: int = 6) -> list[Sample]:
    """``responses`` of which the student wrote three."""
    return [replace(sample, values={"generated": float(i in (1, 2, 5))}) for i, sample in enumerate(responses(number))]


def naive_on_policy(model: nn.Module, rows: Rows) -> Tensor:
    """Cross-entropy and divergence on data, the divergence alone on the student's own rows; one mean over all tokens."""
    losses = []
    for b in range(len(rows.tokens)):
        one = Rows(rows.tokens[b : b + 1], rows.attended[b : b + 1], rows.mask[b : b + 1], {}, {})
        where = one.mask[:, 1:]
        own, theirs = (full_logp(each, one)[:, :-1][where] for each in (model, teacher()))
        divergence = (own.exp() * (own - theirs)).sum(-1)
        entropy = -own.gather(1, one.tokens[:, 1:][where][:, None])[:, 0]
        losses.append(divergence if rows.values["generated"][b] == 1 else 0.6 * entropy + 0.4 * divergence)
    return torch.cat(losses).mean()


def scalar() -> nn.Module:
    return critic().double()


def gspo_of_episodes() -> Objective:
    return PolicyObjective(
        0.2,
        0.3,
        Aggregation.SEQUENCE_MEAN,
        PolicyLossType.GSPO,
        policy_cases.DUAL,
        temperature=policy_cases.TEMPERATURE,
    )


CASES: dict[str, Case] = {
    "episodes": Case(
        gspo_of_episodes,
        lambda: tree_cases.episodes(6, 1),
        lambda model, _: tree_cases.by_hand("gspo", "sequence_mean", model, tree_cases.episodes(6, 1)),
    ),
    "sft": Case(SFTObjective, responses, naive_sft),
    "rm": Case(PairwiseRewardObjective, pairs, naive_rm(margin=False), scalar, unit=2),
    "rm_margin": Case(lambda: PairwiseRewardObjective(use_margin=True), pairs, naive_rm(margin=True), scalar, unit=2),
    "rm_logexp": Case(
        lambda: PairwiseRewardObjective(RewardLoss.LOGEXP), pairs, naive_rm(margin=False), scalar, unit=2
    ),
    "dpo": Case(DPOObjective, pairs, naive_dpo("dpo"), unit=2),
    "cdpo": Case(lambda: DPOObjective(label_smoothing=0.2), pairs, naive_dpo("cdpo"), unit=2),
    "ipo": Case(lambda: DPOObjective(ipo=True), pairs, naive_dpo("ipo"), unit=2),
    "dpo_nll": Case(lambda: DPOObjective(nll_loss_coef=0.3), pairs, naive_dpo("nll"), unit=2),
    "simpo": Case(lambda: SimPOObjective(2.5, 1.25), pairs, naive_simpo, unit=2),
    "orpo": Case(lambda: ORPOObjective(0.3), pairs, naive_orpo, unit=2),
    "kto": Case(lambda: KTOObjective(0.2, 1.5, 0.5), verdicts, naive_kto),
    "prm_vocabulary": Case(StepRewardObjective, steps, naive_steps("vocabulary")),
    "prm_tokens": Case(lambda: StepRewardObjective((GOOD, BAD)), steps, naive_steps("hard")),
    "prm_soft": Case(
        lambda: StepRewardObjective((GOOD, BAD), soft=True), lambda: steps(soft=True), naive_steps("soft")
    ),
    "kd_forward": Case(lambda: DistillationObjective(teacher(), VOCAB), responses, naive_distillation(reverse=False)),
    "kd_reverse": Case(
        lambda: DistillationObjective(teacher(), VOCAB, kind=Divergence.REVERSE),
        responses,
        naive_distillation(reverse=True),
    ),
    "kd_on_policy": Case(
        lambda: DistillationObjective(teacher(), VOCAB, kind=Divergence.REVERSE), some_generated, naive_on_policy
    ),
    "policy_ppo": Case(
        policy_cases.objective(PolicyLossType.PPO), policy_cases.rollout_pairs, policy_cases.naive("ppo"), unit=2
    ),
    "policy_gspo": Case(
        policy_cases.objective(PolicyLossType.GSPO),
        lambda: policy_cases.rollout_pairs(one_advantage=True),
        policy_cases.naive("gspo"),
        unit=2,
    ),
    "policy_gspo_engine": Case(
        policy_cases.objective(PolicyLossType.GSPO, engine=True),
        lambda: policy_cases.rollout_pairs(one_advantage=True),
        policy_cases.naive("gspo", base="rollout_logprobs"),
        unit=2,
    ),
    "policy_cispo": Case(
        policy_cases.objective(PolicyLossType.CISPO), policy_cases.rollout_pairs, policy_cases.naive("cispo"), unit=2
    ),
    "policy_tis": Case(
        policy_cases.objective(PolicyLossType.PPO, correction=CorrectionType.TIS),
        policy_cases.rollout_pairs,
        policy_cases.naive("ppo", correction="tis"),
        unit=2,
    ),
    "policy_icepop_first_update": Case(
        policy_cases.objective(PolicyLossType.PPO, correction=CorrectionType.ICEPOP),
        policy_cases.first_updates,
        policy_cases.naive("ppo", correction="icepop"),
        unit=2,
    ),
    "policy_seq_mask": Case(
        policy_cases.objective(PolicyLossType.CISPO, correction=CorrectionType.SEQ_MASK_TIS),
        policy_cases.rollout_pairs,
        policy_cases.naive("cispo", correction="seq-mask-tis"),
        unit=2,
    ),
}


# ---- one step


@dataclass(frozen=True)
class Step:
    loss: float
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(case: Case, batches: Sequence[Batch]) -> Step:
    """The step as the learner computes it: counts first, then sums divided by them."""
    objective, model = case.make(), case.model()
    count = sum(objective.count(batch) for batch in batches)
    total, parts = 0.0, []
    for batch in batches:
        loss = objective.loss(objective.forward(model, batch), batch)
        (loss.sum / count).backward()
        total += float(loss.sum.detach()) / count
        parts.append(loss.metrics)
    return Step(total, gradients(model), objective.summary(reduced(merge(parts))))


def split(case: Case, units: Sequence[int], share_prefix: bool = False) -> list[Batch]:
    """The rows of a case as micro-batches of so many units each."""
    samples, ends = case.samples(), np.cumsum(units) * case.unit
    assert ends[-1] == len(samples)
    sizes = [size * case.unit for size in units]
    return [pack(samples[end - n : end], share_prefix=share_prefix) for n, end in zip(sizes, ends, strict=True)]
