"""The loss of KTO and its KL estimate, which is over the whole optimizer step.

Values of a row: ``desirable``, ``mismatched``, ``kl_estimate``. Stream: ``ref_logprobs``. Shape letters: K tokens in the loss, N
rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from togi.algo.preference import kto_kl_estimate, kto_loss
from togi.batch import Batch
from togi.errors import DataError
from togi.learn.objective import Loss, Objective, token_metrics
from togi.learn.scorer import Scorer
from togi.methods.preference import log_ratios
from togi.methods.training import Dealer, WithReference
from togi.model.policy import Needs, Outputs
from togi.obs import names
from togi.sample import Sample

DESIRABLE = "desirable"
MISMATCHED = "mismatched"
KL_ESTIMATE = "kl_estimate"


@dataclass(frozen=True, slots=True)
class KTOObjective(Objective):
    """KTO (``togi.algo.preference.kto_loss``), a mean over the rows of the step.

    It needs one number before any loss: the KL estimate of the whole step. So a step has three parts: score mismatched
    copies of its rows with policy and reference, merge the sums of all ranks in
    ``togi.algo.preference.kto_kl_estimate``, and write the number into the value ``kl_estimate`` of every row.
    Mismatched copies are never trained on.

    Metrics: loss, the estimate, the implicit rewards ``beta (S_policy - S_ref)`` of desirable and undesirable rows
    (under the names of chosen and rejected) and their difference, and accuracy: desirable rows above the estimate,
    undesirable ones below.
    """

    beta: float = 0.01
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        assert self.beta > 0, "--beta must be above 0"
        weights = (self.desirable_weight, self.undesirable_weight)
        assert min(weights) >= 0, "--desirable_loss_weight and --undesirable_loss_weight cannot be negative"

    @property
    def needs(self) -> Needs:
        return Needs(logprobs=True)

    def judge(self, outputs: Outputs, batch: Batch) -> Tensor:
        return self.beta * log_ratios(outputs, batch)

    def count(self, batch: Batch) -> float:
        assert not bool(batch.host.values[MISMATCHED].any()), "mismatched rows are for the KL estimate only"
        return float(batch.num_sequences)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        ratios_N, number = log_ratios(outputs, batch), batch.num_sequences
        desirable_N, kl_N = batch.values[DESIRABLE] == 1, batch.values[KL_ESTIMATE]
        total = kto_loss(
            ratios_N,
            desirable_N,
            kl_N,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        ).sum()
        # Metrics, per kind of row. How many there are of each is counted on the host.
        ratios_N = ratios_N.detach()
        right_N = torch.where(desirable_N, ratios_N > kl_N, ratios_N < kl_N)
        sums = {names.LOSS: total, names.ACCURACY: right_N.sum(), names.KL_ESTIMATE: kl_N.sum()}
        metrics = token_metrics(sums, number, {})
        good = int((batch.host.values[DESIRABLE] == 1).sum())
        kinds = ((names.REWARD_CHOSEN, desirable_N, good), (names.REWARD_REJECTED, ~desirable_N, number - good))
        for name, rows_N, rows in kinds:
            rewards_N = torch.where(rows_N, self.beta * ratios_N, 0.0)
            metrics |= token_metrics({name: rewards_N.sum()}, rows, {})
        return Loss(total, metrics)

    def summary(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add the difference of the mean rewards; NaN in a step with only one kind of row."""
        return {**values, names.REWARD_MARGIN: values[names.REWARD_CHOSEN] - values[names.REWARD_REJECTED]}


@dataclass(frozen=True, slots=True)
class WithKL:
    """The preparation of KTO: adds ``ref_logprobs`` and the KL estimate of the whole step, from mismatched pairs of its rows."""

    dealer: Dealer
    reference: Scorer
    policy: Scorer

    def __call__(self, samples: Sequence[Sample], seed: int) -> list[Sample]:
        kl = self._estimate(mismatched(samples, seed))
        mine = WithReference(self.dealer, self.reference)(samples, seed)
        return [replace(sample, values={**sample.values, KL_ESTIMATE: kl}) for sample in mine]

    def _estimate(self, mismatches: Sequence[Sample]) -> float:
        """The KL estimate: logprobs of this rank's mismatched answers, gathered from all ranks."""
        mine = self.dealer.share(mismatches)
        own = [self.dealer.logprobs(scorer, mine) for scorer in (self.policy, self.reference)]
        # float64 sums: the estimate is a difference of two long sums.
        sums = [[float(row.sum(dtype=np.float64)) for row in rows] for rows in own]
        parts = self.dealer.world.gather_shares("KL estimate", sums)
        policy, reference = ([total for part in parts for total in part[which]] for which in (0, 1))
        return kto_kl_estimate(policy, reference)


def mismatched(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """For each row its prompt with the answer of a row with another prompt, drawn uniformly.

    The mean log-ratio of policy and reference on such pairs is KTO's estimate of their KL divergence (Ethayarajh et al.,
    "KTO: Model Alignment as Prospect Theoretic Optimization", 2024, section 4.1). ``samples`` must be the rows of the whole
    optimizer step, so that the estimate does not depend on how they are split. Copies keep the ``group_id`` of the prompt's
    row and share its prompt. Answers are truncated so that no copy is longer than the longest row, which bounds memory.
    Raises DataError if all prompts are equal.
    """
    prompts = [sample.tokens[: sample.prompt_length].tobytes() for sample in samples]
    if len(set(prompts)) < 2:
        raise DataError(
            f"A batch of {len(samples)} rows has only one distinct prompt, but KTO estimates a KL divergence from "
            "answers to other prompts: raise --train_batch_size, or mix the data."
        )
    longest = max(len(sample.tokens) for sample in samples)
    # The seed and the rows alone decide the draw, so every rank draws the same.
    generator = np.random.default_rng(seed)
    others = {prompt: [i for i, other in enumerate(prompts) if other != prompt] for prompt in set(prompts)}
    drawn = [others[prompt][int(generator.integers(len(others[prompt])))] for prompt in prompts]
    return [_joined(sample, samples[i], longest) for sample, i in zip(samples, drawn, strict=True)]


def _joined(prompt: Sample, answer: Sample, longest: int) -> Sample:
    """The prompt of one row with the answer of another, truncated to ``longest`` tokens."""
    start = prompt.prompt_length
    tokens = np.concatenate([prompt.tokens[:start], answer.tokens[answer.prompt_length :]])[:longest]
    mask = np.concatenate([prompt.loss_mask[:start], answer.loss_mask[answer.prompt_length :]])[:longest]
    mask[:1] = False
    return replace(prompt, tokens=tokens, loss_mask=mask, streams={}, values={"desirable": 0.0, "mismatched": 1.0})
