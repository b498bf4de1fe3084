"""Scores by a reward model of this process, for ``togi infer``, ``togi check`` and ``togi serve-rm``."""

from __future__ import annotations

from collections.abc import Sequence

from togi.data.packing import in_order, pack_all
from togi.learn.scorer import Scorer
from togi.model.policy import ScalarModel
from togi.reward.scores import Standardization
from togi.workers.worker_group import as_sample


def token_scores(
    scorer: Scorer, sequences: Sequence[Sequence[int]], max_tokens: int, max_sequences: int | None = None
) -> list[float]:
    """The score at the last token of each sequence. Packs without padding have at most so many tokens and sequences."""
    samples = [as_sample(tokens) for tokens in sequences]
    packs = pack_all(samples, max_tokens=max_tokens, max_sequences=max_sequences, share_prefix=False)
    scores: list[float] = in_order(packs, scorer.scores(packs).tolist())
    return scores


def standardization_of(model: ScalarModel, *, normalize: bool) -> Standardization:
    """By the statistics in the model's config with ``--normalize_reward``, else none."""
    return Standardization(model.reward_mean, model.reward_std) if normalize else Standardization()
