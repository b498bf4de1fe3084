"""Metrics of a step's rollouts, and the rows that are stored. Pure functions of finished groups."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from togi.algo.best_of_n import expected_best, mean_with_error, reported_ks
from togi.algo.kl import kl_estimate
from togi.algo.mismatch import mismatch
from togi.config.choices import KLEstimator
from togi.learn.policy_objective import ADVANTAGES, OLD_LOGPROBS, REF_LOGPROBS, ROLLOUT_LOGPROBS
from togi.obs import names
from togi.obs.rollout_store import RolloutRow, Split
from togi.pump.experience import ScoredGroup, Trainable, gather
from togi.sample import FinishReason, Outcome, Sample, Score


@dataclass(frozen=True, slots=True)
class TokenDetails:
    """Values at the trained tokens of one rollout; empty where not computed."""

    trainer_logprobs: tuple[float, ...] = ()
    ref_logprobs: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class StepDetails:
    """``TokenDetails`` by (group, index in the group)."""

    by_place: Mapping[tuple[int, int], TokenDetails] = field(default_factory=dict)

    @classmethod
    def of(cls, items: Sequence[Trainable], samples: Sequence[Sample]) -> StepDetails:
        return cls({(item.group, item.index): _details(sample) for item, sample in zip(items, samples, strict=True)})


def rollout_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Rewards, components, lengths and group statistics of one step's groups."""
    pairs = [pair for group in groups for pair in zip(group.rollouts, group.scores, strict=True)]
    scores = [score for _, score in pairs]
    values = np.array([score.value for score in scores if score.outcome is Outcome.SCORE])
    lengths = np.array([len(rollout.response_tokens) for rollout, _ in pairs])
    # Means over samples, then within groups: a group of equal rewards has no advantage.
    spreads = [float(np.std(each)) for each in map(_values, groups) if len(each) > 1]
    metrics = {
        names.REWARD_MEAN: float(values.mean()) if len(values) > 0 else math.nan,
        names.REWARD_STD: float(values.std()) if len(values) > 0 else math.nan,
        names.REWARD_ABSTAINED: _share(scores, Outcome.ABSTAIN),
        names.REWARD_ERRORS: _share(scores, Outcome.ERROR),
        names.LENGTH_RESPONSE: float(lengths.mean()),
        names.LENGTH_PROMPT: float(np.mean([len(rollout.prompt.tokens) for rollout, _ in pairs])),
        names.LENGTH_TRUNCATED: float(np.mean([r.finish_reason is FinishReason.LENGTH for r, _ in pairs])),
    }
    if spreads:
        metrics[names.REWARD_GROUP_STD] = float(np.mean(spreads))
        metrics[names.GROUPS_ZERO_VARIANCE] = float(np.mean([spread == 0 for spread in spreads]))
    # Named parts of the reward, each over the samples that have it.
    components: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.components.items():
            components.setdefault(names.reward_component(name), []).append(value)
    return metrics | {name: float(np.mean(numbers)) for name, numbers in components.items()}


def filter_metrics(groups: Sequence[ScoredGroup], wanted: int) -> dict[str, float]:
    """How much dynamic filtering dropped, in groups. ``wanted``: the groups of a rollout."""
    return {
        names.GROUPS_DROPPED: float(np.mean([group.filtered for group in groups])),
        names.GROUPS_GENERATIONS: len(groups) / wanted,
    }


def trainer_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Engine against trainer, and policy against reference, from streams that training computes anyway."""
    engine_K, trainer_K = gather(samples, ROLLOUT_LOGPROBS), gather(samples, OLD_LOGPROBS)
    gap = mismatch(engine_K, trainer_K)
    metrics = {
        names.MISMATCH_MEAN_ABS: gap.abs_log_ratio_mean,
        names.MISMATCH_MEAN_RATIO: gap.ratio_mean,
        names.MISMATCH_P99_RATIO: gap.ratio_p99,
        names.MISMATCH_MAX_RATIO: gap.ratio_max,
        names.MISMATCH_K3: gap.kl,
    }
    if REF_LOGPROBS in samples[0].streams:
        kl_K = kl_estimate(trainer_K, gather(samples, REF_LOGPROBS), KLEstimator.K3)
        metrics[names.KL_REFERENCE] = float(kl_K.mean())
    return metrics


def eval_metrics(groups: Sequence[ScoredGroup], samples: int) -> dict[str, float]:
    """Mean reward with its standard error over prompts, and pass@k per data source, with ``samples`` responses per prompt."""
    metrics = _eval_of(groups)
    metrics[names.EVAL_LENGTH] = float(np.mean([len(r.response_tokens) for group in groups for r in group.rollouts]))
    truncated = [r.finish_reason is FinishReason.LENGTH for group in groups for r in group.rollouts]
    metrics[names.EVAL_TRUNCATED] = float(np.mean(truncated))
    for source in sorted({group.rollouts[0].prompt.datasource for group in groups}):
        own = [group for group in groups if group.rollouts[0].prompt.datasource == source]
        means = _eval_of(own)
        metrics[names.eval_of(source, "pass1")] = means[names.EVAL_REWARD]
        metrics[names.eval_of(source, "pass1_stderr")] = means[names.EVAL_REWARD_STDERR]
        # Groups in which every reward abstained or failed say nothing.
        rewards = [values for values in map(_values, own) if len(values) > 0]
        for k in reported_ks(samples)[1:]:
            # a group with abstentions may have fewer than k
            best = [expected_best(values.tolist(), min(k, len(values))) for values in rewards]
            metrics[names.eval_of(source, f"pass{k}")] = float(np.mean(best)) if best else math.nan
    return metrics


def rows(
    step: int, split: Split, groups: Sequence[ScoredGroup], details: StepDetails | None = None
) -> list[RolloutRow]:
    """The stored rows of a step, one per rollout, in order."""
    known = {} if details is None else details.by_place
    return [
        _row(step, split, group, index, known.get((place, index), TokenDetails()))
        for place, group in enumerate(groups)
        for index in range(len(group.rollouts))
    ]


def _row(step: int, split: Split, group: ScoredGroup, index: int, tokens: TokenDetails) -> RolloutRow:
    rollout, score = group.rollouts[index], group.scores[index]
    prompt = rollout.prompt
    return RolloutRow(
        step=step,
        group_id=rollout.group_id,
        prompt_id=prompt.id,
        sample_index=index,
        datasource=prompt.datasource,
        prompt_text=prompt.text,
        response_text=rollout.response_text,
        label=json.dumps(prompt.label, ensure_ascii=False),
        prompt_tokens=prompt.tokens,
        response_tokens=rollout.response_tokens,
        response_mask=rollout.response_mask,
        rollout_logprobs=rollout.response_logprobs,
        trainer_logprobs=tokens.trainer_logprobs,
        ref_logprobs=tokens.ref_logprobs,
        advantages=tokens.advantages,
        reward=score.value,
        components=dict(score.components),
        outcome=score.outcome,
        finish_reason=rollout.finish_reason,
        policy_version=rollout.policy_version,
        split=split,
        filtered=group.filtered,
    )


def _details(sample: Sample) -> TokenDetails:
    return TokenDetails(*(_trained(sample, name) for name in (OLD_LOGPROBS, REF_LOGPROBS, ADVANTAGES)))


def _trained(sample: Sample, name: str) -> tuple[float, ...]:
    return tuple(sample.streams[name][sample.loss_mask].tolist()) if name in sample.streams else ()


def _values(group: ScoredGroup) -> NDArray[np.float64]:
    return np.array([score.value for score in group.scores if score.outcome is Outcome.SCORE], dtype=np.float64)


def _share(scores: Sequence[Score], outcome: Outcome) -> float:
    return float(np.mean([score.outcome is outcome for score in scores]))


def _eval_of(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    means = [float(_values(group).mean()) for group in groups if len(_values(group)) > 0]
    if not means:  # the reward abstained on all of them: not measured is not 0
        return {names.EVAL_REWARD: math.nan, names.EVAL_REWARD_STDERR: math.nan}
    estimate = mean_with_error(means)
    return {names.EVAL_REWARD: estimate.mean, names.EVAL_REWARD_STDERR: estimate.standard_error}
