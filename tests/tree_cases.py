"""Samples that begin alike and samples that fork, and the same samples as plain rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tests.policy_cases import TEMPERATURE, surrogate
from togi.data.packing import pack
from togi.data.prefix_tree import paths
from togi.model.policy import Needs, PolicyModel
from togi.sample import Fork, Sample

STREAMS = ("advantages", "old_logprobs", "rollout_logprobs", "ref_logprobs", "old_values", "returns")


def alike(samples: Sequence[Sample], seed: int, words: int = 2) -> list[Sample]:
    """The same samples over so few tokens that rows of one group, and of several, have long common beginnings."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, words, 40)
    result = []
    for sample in samples:
        same = int(rng.integers(0, len(sample.tokens) + 1))
        tokens = np.where(np.arange(len(sample.tokens)) < same, common[: len(sample.tokens)], sample.tokens % words)
        result.append(replace(sample, tokens=tokens))
    return result


def episodes(number: int, seed: int, turns: int = 4) -> list[Sample]:
    """Two episodes of each prompt, of several turns: an observation, then an answer. A turn goes on from any token before it.

    Tokens are few, so that also branches and prompts begin alike. What is not in the loss is NaN.
    """
    rng = np.random.default_rng(seed)
    result = []
    for n in range(number):
        prompt = np.random.default_rng(seed + n // 2).integers(0, 3, 3)
        tokens, mask, forks = [*prompt], [False] * 3, []
        for turn in range(turns):
            if turn > 0 and rng.random() < 0.7:
                forks.append(Fork(len(tokens), int(rng.integers(0, len(tokens) - 1))))
            seen, answered = int(rng.integers(0, 3)), int(rng.integers(1, 4))
            tokens += rng.integers(0, 3, seen + answered).tolist()
            mask += [False] * seen + [True] * answered
        own = np.array(mask)
        drawn = {name: rng.uniform(-1, 1, len(own)) for name in STREAMS}
        drawn["advantages"][:] = rng.normal()
        # log-probs near those of a model that knows nothing of 256 tokens
        streams = {name: drawn[name] - 5.5 * name.endswith("logprobs") for name in STREAMS}
        masked = {name: np.where(own, stream, np.nan).astype(np.float32) for name, stream in streams.items()}
        result.append(Sample(np.array(tokens), own, 3, str(n // 2), masked, {"kl_coef": 0.125}, tuple(forks)))
    return result


def as_rows(sample: Sample) -> tuple[list[Sample], np.ndarray]:
    """Each row of an episode as a sample without forks. A token of several rows is in the loss of the first only.

    Also where the tokens in the loss of all rows, one after the other, are among those of the episode.
    """
    seen, rows, order = set[int](), [], list[int]()
    for path in paths(sample):
        new = np.array([place not in seen for place in path.tolist()])
        seen |= set(path.tolist())
        mask = sample.loss_mask[path] & new
        order += path[mask].tolist()
        streams = {name: stream[path] for name, stream in sample.streams.items()}
        prompt = int(np.flatnonzero(mask)[0]) if mask.any() else len(path)
        rows.append(Sample(sample.tokens[path], mask, min(prompt, 1), sample.group_id, streams, sample.values))
    places = np.searchsorted(np.flatnonzero(sample.loss_mask), order)
    return rows, places


def by_hand(kind: str, aggregation: str, model: PolicyModel, samples: Sequence[Sample]) -> Tensor:
    """The loss from the rows of each episode, each alone in the model: sums over rows, one ratio and one mean an episode."""
    per_episode = []
    for sample in samples:
        rows, places = as_rows(sample)
        packs = [pack([row], share_prefix=False) for row in rows]
        own = torch.cat([model(batch, Needs(logprobs=True), TEMPERATURE).logprobs_K for batch in packs])
        inner = {name: torch.from_numpy(stream[sample.loss_mask][places]) for name, stream in sample.streams.items()}
        per_episode.append(surrogate(kind, own, inner["old_logprobs"].double(), inner["advantages"].double()))
    if aggregation == "token_mean":
        return torch.cat(per_episode).mean()
    return torch.stack([terms.mean() for terms in per_episode]).mean()
