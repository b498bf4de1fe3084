"""From scored rollouts to samples with advantages: the work between generation and update, on the driver.

Shape letters: K trained tokens of all samples in order, N samples.

Filter groups that teach nothing: dynamic sampling of DAPO (Yu et al. 2025, arXiv 2503.14476, section 3.2).

A group whose answers are all right or all wrong has zero advantages, so another prompt's group replaces it. This module decides;
``feed`` replaces one for one, so there are never more kept groups than a rollout trains on.

Metrics of a step's rollouts, and the rows that are stored. Pure functions of finished groups.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from togi.algo.advantages import advantages
from togi.algo.best_of_n import expected_best, mean_with_error, reported_ks
from togi.algo.kl import kl_estimate
from togi.algo.policy import mismatch
from togi.config.choices import KLEstimator, OnRewardError
from togi.config.fields import Hook
from togi.config.rl import RLConfig
from togi.errors import ConfigError
from togi.learn import objective as streams
from togi.learn.hooks import load_estimator
from togi.obs import names
from togi.obs.rollout_store import Row
from togi.reward.scores import takes_group
from togi.sample import FinishReason, Outcome, Prompt, Rollout, Sample, Score, with_streams


@dataclass(frozen=True, slots=True)
class GroupFilter:
    """Keeps a group with ``low < mean reward < high``. ``most``: the largest number of groups generated per wanted group."""

    low: float
    high: float
    most: int
    on_error: OnRewardError

    @classmethod
    def of(cls, config: RLConfig) -> GroupFilter | None:
        """The filter of ``--dynamic_filtering``; None without it."""
        if not config.dynamic_filtering:
            return None
        low, high = config.dynamic_filtering_reward_range
        return cls(low, high, config.dynamic_filtering_max_generations, config.on_reward_error)

    def keeps(self, scores: Sequence[Score]) -> bool:
        """Whether a group is kept, by the scores that it has. A group that cannot be trained on is not kept."""
        rewards: list[float] = _values(scores).tolist()
        if not rewards or takes_group(scores, self.on_error):
            return False
        # Measured from the lowest reward, the mean of equal rewards is exact: rounding cannot move it across a limit.
        lowest = min(rewards)
        mean = lowest + math.fsum(reward - lowest for reward in rewards) / len(rewards)
        return self.low < mean < self.high

    def check_budget(self, generated: int, kept: int, wanted: int) -> None:
        """Raise ConfigError if one more group would exceed the limit. ``kept``: how many of ``generated`` were kept."""
        if generated >= self.most * wanted:
            raise ConfigError(
                f"--dynamic_filtering kept only {kept} of {generated} groups and the rollout needs {wanted}: give prompts that "
                f"are solved sometimes, widen --dynamic_filtering_reward_range {self.low:g} {self.high:g}, or raise "
                f"--dynamic_filtering_max_generations {self.most}."
            )


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """The rollouts of one prompt and their scores, in the same order. ``filtered``: the group is not trained on."""

    rollouts: tuple[Rollout, ...]
    scores: tuple[Score, ...]
    filtered: bool = False


Place = tuple[int, int]
"""Of a rollout in the groups of a step: (group, index in the group)."""


def trainable(groups: Sequence[ScoredGroup], on_error: OnRewardError) -> list[Place]:
    """The places of the rollouts to train on: those with a score and at least one token to train.

    If a rollout's reward abstains, the rest of its group stays. An error drops its whole group unless ``on_error`` is drop_sample.
    """
    return [
        (place, index)
        for place, group in enumerate(groups)
        if not group.filtered and not takes_group(group.scores, on_error)
        for index, (rollout, score) in enumerate(zip(group.rollouts, group.scores, strict=True))
        if score.outcome is Outcome.SCORE and any(rollout.response_mask)
    ]


def to_sample(rollout: Rollout) -> Sample:
    """A sample in the packed layout. The engine's logprobs become a stream with NaN where nothing was sampled."""
    prompt = len(rollout.prompt.tokens)
    tokens = np.asarray(rollout.prompt.tokens + rollout.response_tokens, dtype=np.int64)
    mask = np.zeros(len(tokens), dtype=np.bool_)
    mask[prompt:] = rollout.response_mask
    logprobs = np.full(len(tokens), np.nan, dtype=np.float32)
    logprobs[prompt:] = rollout.response_logprobs
    return Sample(tokens, mask, prompt, rollout.group_id, {streams.ROLLOUT_LOGPROBS: logprobs}, forks=rollout.forks)


def with_advantages(
    groups: Sequence[ScoredGroup], places: Sequence[Place], samples: Sequence[Sample], config: RLConfig, kl_coef: float
) -> list[Sample]:
    """Advantages and returns over the whole step, so normalisation does not depend on ranks or micro-batches.

    ``places``: those of the samples in ``groups``.
    """
    # Flat layout: all trained tokens of all samples in a row, each with the number of its sample.
    lengths = torch.tensor([int(sample.loss_mask.sum()) for sample in samples])
    sequences_K = torch.repeat_interleave(torch.arange(len(samples)), lengths)
    in_reward = config.uses_reference and not config.use_kl_loss
    # float64, since normalisation sums over a whole step.
    rewards_N = torch.tensor([groups[group].scores[index].value for group, index in places], dtype=torch.float64)
    groups_N = torch.tensor([group for group, _ in places])
    ends = np.cumsum(lengths.numpy())[:-1]
    # The user's own estimator computes advantages only.
    if isinstance(config.advantage_estimator, Hook):
        penalties_K = kl_coef * _reference_kl(samples) if in_reward else torch.zeros(len(sequences_K)).double()
        estimated_K = load_estimator(config.advantage_estimator)(
            rewards_N=rewards_N, groups_N=groups_N, sequences_K=sequences_K, penalties_K=penalties_K
        )
        # Advantages are constants, in whatever precision and place the function has them.
        advantages_K = estimated_K.detach().to("cpu", torch.float64).numpy()
        return with_streams(samples, {streams.ADVANTAGES: np.split(advantages_K.astype(np.float32), ends)})
    flat_K = advantages(
        config.advantage_estimator,
        rewards_N,
        groups_N,
        sequences_K,
        reward_clip=config.reward_clip_range,
        kl_K=_reference_kl(samples) if in_reward else None,
        kl_coef=kl_coef if in_reward else 0.0,
        values_K=gather(samples, streams.OLD_VALUES) if config.uses_critic else None,
        gamma=config.gamma,
        lam=config.lambd,
        no_std_norm=config.no_advantage_std_norm,
    )
    # Back to one array per sample.
    per_sample = {
        name: np.split(each_K.numpy().astype(np.float32), ends)
        for name, each_K in zip((streams.ADVANTAGES, streams.RETURNS), flat_K, strict=True)
    }
    return with_streams(samples, per_sample)


def without_stale(samples: Sequence[Sample], ages: Sequence[NDArray[np.int64]], most: int) -> list[Sample]:
    """The samples with tokens older than ``most`` updates out of the loss; rewards and advantages stay as they are.

    ``ages``: of each sample's response tokens (``ages``).
    """
    result = []
    for sample, age in zip(samples, ages, strict=True):
        mask = sample.loss_mask.copy()
        mask[sample.prompt_length :] &= age <= most
        result.append(replace(sample, loss_mask=mask))
    return result


def ages(groups: Sequence[ScoredGroup], places: Sequence[Place], version: int) -> list[NDArray[np.int64]]:
    """The ages of the response tokens at these places in updates, if weights ``version`` are trained on them."""
    return [version - np.asarray(groups[group].rollouts[index].versions, dtype=np.int64) for group, index in places]


def staleness_metrics(places: Sequence[Place], ages: Sequence[NDArray[np.int64]], most: int) -> dict[str, float]:
    """How old the tokens of a step are. ``most``: tokens that are older are not trained on."""
    oldest = [int(age.max()) for age in ages]
    of_group = dict[int, int]()
    for (group, _), age in zip(places, oldest, strict=True):
        of_group[group] = max(age, of_group.get(group, 0))
    every = np.concatenate(ages)
    return {
        names.STALENESS_TOKEN: float(every.mean()),
        names.STALENESS_TOKEN_MAX: float(every.max()),
        names.STALENESS_RESPONSE: float(np.mean(oldest)),
        names.STALENESS_GROUP: float(np.mean(list(of_group.values()))),
        names.STALENESS_SPREAD: float(np.mean([age.max() - age.min() for age in ages])),
        names.STALENESS_MASKED: float((every > most).mean()),
    }


def mini_batches(samples: Sequence[Sample], config: RLConfig, step: int) -> list[list[Sample]]:
    """Batches of ``--train_batch_size`` samples, one per optimizer step. Groups are shuffled anew in each epoch.

    A single update on all samples is not shuffled: its order does not matter, and results can be read in the order of samples.
    """
    size, batches = config.train_batch_size, list[list[Sample]]()
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    for epoch in range(config.max_epochs):
        order = list(groups.values())
        if len(samples) > size or config.max_epochs > 1:
            random.Random(f"{config.seed}/{step}/{epoch}").shuffle(order)
        flat = [sample for group in order for sample in group]
        batches += [flat[i : i + size] for i in range(0, len(flat), size)]
    return batches


def gather(samples: Sequence[Sample], name: str) -> Tensor:
    """Stream ``name`` at all trained tokens of all samples, flat: shape (K), float64."""
    return torch.from_numpy(
        np.concatenate([sample.streams[name][sample.loss_mask] for sample in samples]).astype(np.float64)
    )


def _reference_kl(samples: Sequence[Sample]) -> Tensor:
    return kl_estimate(gather(samples, streams.OLD_LOGPROBS), gather(samples, streams.REF_LOGPROBS), KLEstimator.K1)


def rollout_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Rewards, components, lengths and group statistics of one step's groups."""
    pairs = [pair for group in groups for pair in zip(group.rollouts, group.scores, strict=True)]
    scores = [score for _, score in pairs]
    values = _values(scores)
    lengths = np.array([len(rollout.response_tokens) for rollout, _ in pairs])
    # Means over samples, then within groups: a group of equal rewards has no advantage.
    spreads = [float(np.std(each)) for group in groups if len(each := _values(group.scores)) > 1]
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
    for name in dict.fromkeys(name for score in scores for name in score.components):
        parts = [score.components[name] for score in scores if name in score.components]
        metrics[names.reward_component(name)] = float(np.mean(parts))
    return metrics


def filter_metrics(groups: Sequence[ScoredGroup], wanted: int) -> dict[str, float]:
    """How much dynamic filtering dropped, in groups. ``wanted``: the groups of a rollout."""
    return {
        names.GROUPS_DROPPED: float(np.mean([group.filtered for group in groups])),
        names.GROUPS_GENERATIONS: len(groups) / wanted,
    }


def trainer_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Engine against trainer, and policy against reference, from streams that training computes anyway."""
    engine_K, trainer_K = gather(samples, streams.ROLLOUT_LOGPROBS), gather(samples, streams.OLD_LOGPROBS)
    gap = mismatch(engine_K, trainer_K)
    metrics = {
        names.MISMATCH_MEAN_ABS: gap.abs_log_ratio_mean,
        names.MISMATCH_MEAN_RATIO: gap.ratio_mean,
        names.MISMATCH_P99_RATIO: gap.ratio_p99,
        names.MISMATCH_MAX_RATIO: gap.ratio_max,
        names.MISMATCH_K3: gap.kl,
    }
    if streams.REF_LOGPROBS in samples[0].streams:
        kl_K = kl_estimate(trainer_K, gather(samples, streams.REF_LOGPROBS), KLEstimator.K3)
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
        rewards = [values for group in own if len(values := _values(group.scores)) > 0]
        for k in reported_ks(samples)[1:]:
            # a group with abstentions may have fewer than k
            best = [expected_best(values.tolist(), min(k, len(values))) for values in rewards]
            metrics[names.eval_of(source, f"pass{k}")] = float(np.mean(best)) if best else math.nan
    return metrics


def rows(groups: Sequence[ScoredGroup], trained: Mapping[Place, Sample] | None = None) -> list[Row]:
    """The stored rows of a step, one per rollout, in order. ``trained``: the samples, whose streams are stored too."""
    known = trained or {}
    return [
        _row(group, index, known.get((place, index)))
        for place, group in enumerate(groups)
        for index in range(len(group.rollouts))
    ]


def group_of(rows: Sequence[Row]) -> ScoredGroup:
    """The group whose rows these are (``rows``). Messages of failed rewards are not stored."""
    first = rows[0]
    label, tokens = json.loads(first["label"]), tuple(first["prompt_tokens"])
    prompt = Prompt(first["prompt_id"], tokens, first["prompt_text"], label, first["datasource"])
    rollouts = []
    for row in rows:
        tokens, mask, logprobs = (tuple(row[name]) for name in ("response_tokens", "response_mask", "rollout_logprobs"))
        reason, versions = FinishReason(row["finish_reason"]), tuple(row["versions"])
        rollouts.append(
            Rollout(prompt, row["group_id"], tokens, mask, logprobs, row["response_text"], reason, versions)
        )
    scores = tuple(Score(Outcome(row["outcome"]), row["reward"], row["components"]) for row in rows)
    return ScoredGroup(tuple(rollouts), scores, first["filtered"])


def _row(group: ScoredGroup, index: int, sample: Sample | None) -> Row:
    rollout, score = group.rollouts[index], group.scores[index]
    prompt, count = rollout.prompt, len(rollout.response_tokens)
    stored = {
        "trainer_logprobs": streams.OLD_LOGPROBS,
        "ref_logprobs": streams.REF_LOGPROBS,
        "advantages": streams.ADVANTAGES,
    }
    columns = {name: _of_response(sample, stream) for name, stream in stored.items()}
    assert all(len(stream) in (0, count) for stream in columns.values()), "response streams differ in length"
    return {
        "group_id": rollout.group_id,
        "prompt_id": prompt.id,
        "sample_index": index,
        "datasource": prompt.datasource,
        "prompt_text": prompt.text,
        "response_text": rollout.response_text,
        "label": json.dumps(prompt.label, ensure_ascii=False),
        "prompt_tokens": prompt.tokens,
        "response_tokens": rollout.response_tokens,
        "response_mask": rollout.response_mask,
        "rollout_logprobs": rollout.response_logprobs,
        **columns,
        "reward": score.value,
        "components": dict(score.components),
        "outcome": score.outcome,
        "finish_reason": rollout.finish_reason,
        "policy_version": rollout.policy_version,
        "versions": rollout.versions,
        "filtered": group.filtered,
    }


def _of_response(sample: Sample | None, name: str) -> tuple[float, ...]:
    """The values of a stream, NaN where a token is not trained on. Empty for a rollout that is not, or a stream not computed."""
    if sample is None or name not in sample.streams:
        return ()
    return tuple(sample.streams[name][sample.prompt_length :].tolist())


def _values(scores: Iterable[Score]) -> NDArray[np.float64]:
    return np.array([score.value for score in scores if score.outcome is Outcome.SCORE], dtype=np.float64)


def _share(scores: Sequence[Score], outcome: Outcome) -> float:
    return float(np.mean([score.outcome is outcome for score in scores]))


def _eval_of(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    means = [float(values.mean()) for group in groups if len(values := _values(group.scores)) > 0]
    if not means:  # the reward abstained on all of them: not measured is not 0
        return {names.EVAL_REWARD: math.nan, names.EVAL_REWARD_STDERR: math.nan}
    estimate = mean_with_error(means)
    return {names.EVAL_REWARD: estimate.mean, names.EVAL_REWARD_STDERR: estimate.standard_error}
