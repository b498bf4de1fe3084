"""From scored rollouts to samples with advantages: the work between generation and update, on the driver.

Shape letters: K trained tokens of all samples in order, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from togi.algo.advantages import advantages
from togi.algo.kl import kl_estimate
from togi.config.choices import KLEstimator, OnRewardError
from togi.config.hooks import Hook
from togi.config.rl import RLConfig
from togi.learn.hooks import load_estimator
from togi.learn.policy_objective import (
    ADVANTAGES,
    OLD_LOGPROBS,
    OLD_VALUES,
    REF_LOGPROBS,
    RETURNS,
    ROLLOUT_LOGPROBS,
)
from togi.sample import Outcome, Rollout, Sample, Score, with_streams


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """The rollouts of one prompt and their scores, in the same order. ``filtered``: the group is not trained on."""

    rollouts: tuple[Rollout, ...]
    scores: tuple[Score, ...]
    filtered: bool = False


@dataclass(frozen=True, slots=True)
class Trainable:
    """One rollout with a score and at least one token to train, and its place in the groups of the step."""

    rollout: Rollout
    score: Score
    group: int
    index: int


def trainable(groups: Sequence[ScoredGroup], on_error: OnRewardError) -> list[Trainable]:
    """The rollouts to train on: those with a score. If one abstains, the rest of its group stays.

    An error drops its whole group unless ``on_error`` is drop_sample.
    """
    dropped = {group for group, scored in enumerate(groups) if scored.filtered or takes_group(scored.scores, on_error)}
    return [
        Trainable(rollout, score, group, index)
        for group, scored in enumerate(groups)
        for index, (rollout, score) in enumerate(zip(scored.rollouts, scored.scores, strict=True))
        if group not in dropped and score.outcome is Outcome.SCORE and any(rollout.response_mask)
    ]


def takes_group(scores: Sequence[Score], on_error: OnRewardError) -> bool:
    """Whether an error among a group's scores drops the whole group."""
    return on_error is not OnRewardError.DROP_SAMPLE and any(score.outcome is Outcome.ERROR for score in scores)


def to_sample(item: Trainable) -> Sample:
    """A sample in the packed layout. The engine's logprobs become a stream with NaN where nothing was sampled."""
    rollout = item.rollout
    prompt = len(rollout.prompt.tokens)
    tokens = np.asarray(rollout.prompt.tokens + rollout.response_tokens, dtype=np.int64)
    mask = np.zeros(len(tokens), dtype=np.bool_)
    mask[prompt:] = rollout.response_mask
    logprobs = np.full(len(tokens), np.nan, dtype=np.float32)
    logprobs[prompt:] = rollout.response_logprobs
    return Sample(tokens, mask, prompt, rollout.group_id, {ROLLOUT_LOGPROBS: logprobs})


def with_advantages(
    items: Sequence[Trainable], samples: Sequence[Sample], config: RLConfig, kl_coef: float
) -> list[Sample]:
    """Advantages and returns over the whole step, so normalisation does not depend on ranks or micro-batches."""
    # Flat layout: all trained tokens of all samples in a row, each with the number of its sample.
    lengths = torch.tensor([int(sample.loss_mask.sum()) for sample in samples])
    sequences_K = torch.repeat_interleave(torch.arange(len(samples)), lengths)
    in_reward = config.uses_reference and not config.use_kl_loss
    # float64, since normalisation sums over a whole step.
    rewards_N = torch.tensor([item.score.value for item in items], dtype=torch.float64)
    groups_N = torch.tensor([item.group for item in items])
    ends = np.cumsum(lengths.numpy())[:-1]
    # The user's own estimator computes advantages only.
    if isinstance(config.advantage_estimator, Hook):
        penalties_K = kl_coef * _reference_kl(samples) if in_reward else torch.zeros(len(sequences_K)).double()
        estimated_K = load_estimator(config.advantage_estimator)(
            rewards_N=rewards_N, groups_N=groups_N, sequences_K=sequences_K, penalties_K=penalties_K
        )
        return with_streams(samples, {ADVANTAGES: np.split(estimated_K.numpy().astype(np.float32), ends)})
    result = advantages(
        config.advantage_estimator,
        rewards_N,
        groups_N,
        sequences_K,
        reward_clip=config.reward_clip_range,
        kl_K=_reference_kl(samples) if in_reward else None,
        kl_coef=kl_coef if in_reward else 0.0,
        values_K=gather(samples, OLD_VALUES) if config.uses_critic else None,
        gamma=config.gamma,
        lam=config.lambd,
        no_std_norm=config.no_advantage_std_norm,
    )
    # Back to one array per sample.
    per_sample = {
        name: np.split(flat_K.numpy().astype(np.float32), ends)
        for name, flat_K in ((ADVANTAGES, result.advantages_K), (RETURNS, result.returns_K))
    }
    return with_streams(samples, per_sample)


def gather(samples: Sequence[Sample], name: str) -> Tensor:
    """Stream ``name`` at all trained tokens of all samples, flat: shape (K), float64."""
    return torch.from_numpy(
        np.concatenate([sample.streams[name][sample.loss_mask] for sample in samples]).astype(np.float64)
    )


def _reference_kl(samples: Sequence[Sample]) -> Tensor:
    return kl_estimate(gather(samples, OLD_LOGPROBS), gather(samples, REF_LOGPROBS), KLEstimator.K1)
