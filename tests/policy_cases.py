"""The policy objective with rows for it, and the same loss a second time from its definition, one row and one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from tests.learn_tools import policy
from togi.config.choices import Aggregation, CorrectionType, KLEstimator, PolicyLossType
from togi.learn.objective import EngineCorrection, PolicyObjective
from togi.sample import Sample

TEMPERATURE = 0.7
LOW, HIGH, DUAL = 0.2, 0.3, 1.4
# The KL coefficient travels with the samples as a float32, which holds this one exactly.
ENTROPY, KL_COEF = 0.3, 0.125
TRUST = (0.9, 1.15)


@cache
def rollout_pairs(one_advantage: bool = False, number: int = 4) -> list[Sample]:
    """Two responses to each prompt, some with tool output that is not in the loss; log-probs not far from the model's."""
    rng, model = np.random.default_rng(5), policy(dtype=torch.float64)
    samples = []
    for group in range(number):
        prompt = rng.integers(0, 256, int(rng.integers(2, 6)))
        for side in (0, 1):
            tokens = np.concatenate([prompt, rng.integers(0, 256, int(rng.integers(3, 9)))])
            mask = np.arange(len(tokens)) >= len(prompt)
            mask[len(prompt) + 1] = side == 0
            own = np.full(len(tokens), np.nan)
            with torch.no_grad():
                ids = torch.from_numpy(tokens)
                own[1:] = logp(model, ids)[:-1].gather(1, ids[1:, None])[:, 0].numpy()
            old = own + rng.normal(rng.normal(0, 0.2), 0.3, len(tokens))
            engine = old + rng.normal(rng.normal(0, 0.1), 0.2, len(tokens))
            advantages = np.full(len(tokens), rng.normal()) if one_advantage else rng.normal(size=len(tokens))
            ref = own + rng.normal(0, 0.3, len(tokens))
            streams = {"advantages": advantages, "old_logprobs": old, "rollout_logprobs": engine, "ref_logprobs": ref}
            masked = {name: np.where(mask, s, np.nan).astype(np.float32) for name, s in streams.items()}
            samples.append(Sample(tokens, mask, len(prompt), str(group), masked, {"kl_coef": KL_COEF}))
    return samples


def first_updates() -> list[Sample]:
    """Rows without old log-probs: those of the update's own forward take their place."""
    return [
        replace(s, streams={name: stream for name, stream in s.streams.items() if name != "old_logprobs"})
        for s in rollout_pairs()
    ]


def logp(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probs over the vocabulary after each token of one row, at the sampling temperature: L, V."""
    model.hf.set_attn_implementation("eager")
    return (model.hf(input_ids=ids[None], use_cache=False).logits[0] / TEMPERATURE).log_softmax(-1)


def objective(kind: PolicyLossType, *, correction: CorrectionType | None = None, engine: bool = False):
    """A factory of objectives with an entropy bonus and a KL in the loss."""

    def make() -> PolicyObjective:
        is_gspo = kind is PolicyLossType.GSPO
        return PolicyObjective(
            LOW,
            HIGH,
            Aggregation.SEQUENCE_MEAN if is_gspo else Aggregation.TOKEN_MEAN,
            kind=kind,
            dual_clip=None if kind is PolicyLossType.CISPO else DUAL,
            kl=KLEstimator.K3,
            entropy_coef=ENTROPY,
            correction=None if correction is None else EngineCorrection(correction, *TRUST),
            against_engine=engine,
            temperature=TEMPERATURE,
        )

    return make


def naive(
    kind: str, *, correction: str | None = None, base: str = "old_logprobs"
) -> Callable[[nn.Module, object], Tensor]:
    """The mean over tokens (gspo: over sequences) of surrogate - ENTROPY x entropy + KL_COEF x k3."""

    def loss(model: nn.Module, rows: object) -> Tensor:
        per_row = []
        for b in range(len(rows.tokens)):
            places = rows.mask[b].nonzero()[:, 0]
            full = logp(model, rows.tokens[b][: int(rows.attended[b].sum())])
            own = full[places - 1, rows.tokens[b][places]]
            stream = {name: values[b][places] for name, values in rows.streams.items()}
            stream.setdefault("old_logprobs", own.detach())
            kept, weights = trust(
                correction, stream["old_logprobs"] - stream["rollout_logprobs"] if correction else own
            )
            terms = surrogate(kind, own, stream[base], stream["advantages"])
            terms = torch.stack(
                [w * t if keep else 0.0 * own[0] for keep, w, t in zip(kept, weights, terms, strict=True)]
            )
            d = stream["ref_logprobs"] - own
            entropy = -(full.exp() * full).sum(-1)[places - 1]
            per_row.append(terms - ENTROPY * entropy + KL_COEF * (d.exp() - 1 - d))
        return torch.stack([t.mean() for t in per_row]).mean() if kind == "gspo" else torch.cat(per_row).mean()

    return loss


def trust(correction: str | None, log_ratio: Tensor) -> tuple[list[bool], list[float]]:
    """Whether each token of one row is kept, and its weight."""
    low, high = TRUST
    ratios = log_ratio.detach().exp().tolist()
    clipped = [min(max(w, low), high) for w in ratios]
    if correction is None:
        return [True] * len(ratios), [1.0] * len(ratios)
    if correction == "tis":
        return [True] * len(ratios), clipped
    if correction == "icepop":
        return [low <= w <= high for w in ratios], ratios
    geometric = float(np.prod(ratios) ** (1 / len(ratios)))
    return [low <= geometric <= high] * len(ratios), clipped


def surrogate(kind: str, own: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    ratio = (own - old).exp()
    if kind == "cispo":
        return -ratio.detach().clamp(1 - LOW, 1 + HIGH) * advantages * own
    if kind == "gspo":
        ratio = ratio.prod() ** (1 / len(own)) * torch.ones_like(own)
    least = torch.minimum(ratio * advantages, ratio.clamp(1 - LOW, 1 + HIGH) * advantages)
    return -torch.where(advantages < 0, torch.maximum(least, DUAL * advantages), least)
