"""The protocol of reward sources; a group as the call of functions and servers, and their answer as scores.

Several reward sources as one: names, the weighted sum or mean of scores, length penalties. Clipping is elsewhere.

Rewards from a scalar model that runs elsewhere.

This module converts rollouts to token ids and scalars to ``Score``, and standardises. The callable owns the model, its
devices, its head and its micro-batches.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol

from togi.config.choices import OnRewardError, RewardCombination
from togi.config.rl import RLConfig
from togi.errors import RewardError
from togi.obs.names import RESERVED_COMPONENTS
from togi.reward.wire import Answer, Call
from togi.sample import FinishReason, Outcome, Rollout, Score

# The protocol of every reward source. Advantages, clipping and filtering are elsewhere (``togi.algo``).


class Reward(Protocol):
    """Scores finished rollouts, always a whole group (all samples of one prompt) in one call."""

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        """One ``Score`` per rollout, in the order of ``group``. Calls for different groups may overlap.

        A source that failed, timed out or returned something that is not a number gives the outcome error. Raises RewardError for
        permanent faults: a function that cannot be loaded, a server that stays down.
        """

    async def close(self) -> None:
        """Release processes and connections. The source cannot be used afterwards."""


def as_call(group: Sequence[Rollout], response: Callable[[Rollout], str]) -> Call:
    """The group as lists. A query is the prompt's text plus ``response`` of the rollout."""
    call: Call = {
        "queries": [rollout.prompt.text + response(rollout) for rollout in group],
        "prompts": [rollout.prompt.text for rollout in group],
        "labels": [rollout.prompt.label for rollout in group],
        "responses": [rollout.response_text for rollout in group],
        "datasources": [rollout.prompt.datasource for rollout in group],
        "finish_reasons": [rollout.finish_reason.value for rollout in group],
    }
    call["response_lengths"] = [len(rollout.response_tokens) for rollout in group]
    return call


def as_scores(answer: Answer, component: str, shown_as: str, count: int) -> list[Score]:
    """One score per query. ``component``: the name of the reward beside the answer's own components.

    Raises RewardError if one of those has the same name.
    """
    if component in answer and component != "rewards":
        raise RewardError(
            f"{shown_as} returned a log named {component!r}, which is the name of the reward itself; use another name."
        )
    return [_score(answer, index, component, shown_as) for index in range(count)]


def failed(count: int, message: str) -> list[Score]:
    """The scores of a group whose call failed."""
    return [Score(Outcome.ERROR, message=message)] * count


def without_errors(scores: Sequence[Score]) -> list[Score]:
    """``scores`` if none of them is an error. Raises RewardError with the message of the first error."""
    for score in scores:
        if score.outcome is Outcome.ERROR:
            raise RewardError(score.message)
    return list(scores)


def _score(answer: Answer, index: int, component: str, shown_as: str) -> Score:
    logs = {name: values[index] for name, values in answer.items() if name != "rewards"}
    components = {name: value for name, value in logs.items() if value is not None}
    reward = answer["rewards"][index]
    if reward is None:
        return Score(Outcome.ABSTAIN, components=components, message=f"{shown_as} abstained.")
    assert math.isfinite(reward), "every number was checked"
    return Score(Outcome.SCORE, value=reward, components={component: reward, **components})


ScoreTokens = Callable[[Sequence[Sequence[int]]], Awaitable[Sequence[float]]]


@dataclass(frozen=True, slots=True)
class Standardization:
    """``(r - mean) / std`` with the numbers in a reward model's config (``--normalize_reward``)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise RewardError(
                f"The reward model's config has mean {self.mean} and std {self.std}, which cannot standardise rewards; "
                "drop --normalize_reward or store finite numbers with std > 0."
            )

    def __call__(self, reward: float) -> float:
        return (reward - self.mean) / self.std


class LocalModelReward:
    """The scalar of a reward model at the last token of prompt + response.

    ``score_tokens``: maps token id sequences to one float each. ``component``: the name of the score in logs.
    """

    def __init__(
        self, score_tokens: ScoreTokens, standardization: Standardization | None = None, component: str = "reward_model"
    ) -> None:
        self._score_tokens, self._component = score_tokens, component
        self._standardize = Standardization() if standardization is None else standardization

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        """One score per rollout; an error where the model's output is not finite."""
        sequences = [rollout.row for rollout in group]
        rewards = await self._score_tokens(sequences)
        assert len(rewards) == len(group), "score_tokens must return one float per sequence"
        return [self._as_score(float(reward), rollout) for reward, rollout in zip(rewards, group, strict=True)]

    def _as_score(self, reward: float, rollout: Rollout) -> Score:
        if not math.isfinite(reward):
            message = (
                f"{self._component} gave {reward} for a sample of prompt {rollout.prompt.id!r} "
                f"(response: {rollout.response_text[:80]!r}); check the model's weights and its number format."
            )
            return Score(Outcome.ERROR, message=message)
        value = self._standardize(reward)
        return Score(Outcome.SCORE, value=value, components={self._component: value})

    async def close(self) -> None:
        """Nothing to release: the owner of the callable stops the model."""


@dataclass(frozen=True, slots=True)
class Term:
    """One source, its name in the logs, and its weight."""

    name: str
    source: Reward
    weight: float = 1.0


class CombinedReward:
    """Calls every source concurrently. Keeps the components of all sources, unweighted.

    With several sources the logs of each are named name/log, so that no two collide.
    """

    def __init__(self, terms: Sequence[Term], how: RewardCombination = RewardCombination.SUM) -> None:
        names = [term.name for term in terms]
        assert len(set(names)) == len(names), "two sources have one name"
        self.terms = tuple(terms)
        divisor = sum(term.weight for term in terms) if how is RewardCombination.MEAN else 1.0
        self._factors = [term.weight / divisor for term in terms]

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        """The combined scores, one per rollout. Raises RewardError as the sources do."""
        columns = await asyncio.gather(*(term.source.score(group) for term in self.terms))
        names = [term.name for term in self.terms]
        return [combine(names, self._factors, row) for row in zip(*columns, strict=True)]

    @property
    def formula(self) -> str:
        """The weighted sum in words, for example "0.5 x helpful + 1 x length"."""
        return " + ".join(f"{factor:g} x {term.name}" for factor, term in zip(self._factors, self.terms, strict=True))

    async def close(self) -> None:
        for term in self.terms:
            await term.source.close()


def combine(names: Sequence[str], factors: Sequence[float], parts: Sequence[Score]) -> Score:
    """Combine one rollout's scores from several sources: sum over sources of factor x score.

    An error in any source is an error. Otherwise an abstention in any source abstains: a sum that lacks a term cannot be
    compared with the complete sums of the same group.
    """
    components = {
        key if key == name or len(names) == 1 else f"{name}/{key}": value
        for name, part in zip(names, parts, strict=True)
        for key, value in part.components.items()
    }
    message = " ".join(part.message for part in parts if part.message)
    for outcome in (Outcome.ERROR, Outcome.ABSTAIN):
        if any(part.outcome is outcome for part in parts):
            return Score(outcome, components=components, message=message)
    value = sum(factor * part.value for factor, part in zip(factors, parts, strict=True))
    turns = tuple(
        (place, factor * reward) for factor, part in zip(factors, parts, strict=True) for place, reward in part.turns
    )
    return Score(Outcome.SCORE, value=value, components=components, turns=turns)


def distinct_names(wanted: Sequence[str], reserved: Collection[str] = RESERVED_COMPONENTS) -> list[str]:
    """``wanted`` with a number appended to every name that is reserved or occurs more than once."""
    counts = Counter(wanted)
    taken = {name for name in wanted if counts[name] == 1} | set(reserved)
    result = []
    for name in wanted:
        free = name
        if counts[name] > 1 or name in reserved:
            free = next(numbered for number in count(1) if (numbered := f"{name}_{number}") not in taken)
            taken.add(free)
        result.append(free)
    return result


@dataclass(slots=True)
class ErrorLimit:
    """The number of samples of a rollout whose reward may fail: ``share`` of ``total``."""

    share: float
    total: int
    errors: int = 0

    def count(self, scores: Sequence[Score]) -> None:
        """Count the errors. Raises RewardError as soon as there are more than allowed."""
        failures = [score.message for score in scores if score.outcome is Outcome.ERROR]
        self.errors += len(failures)
        if failures and self.errors > self.share * self.total:
            raise RewardError(
                f"The reward of {self.errors} of {self.total} samples failed, above the allowed share of {self.share:g} "
                f"(--max_reward_errors, or 0 with --on_reward_error stop): {failures[0]}"
            )


def takes_group(scores: Sequence[Score], on_error: OnRewardError) -> bool:
    """Whether an error among a group's scores drops the whole group."""
    return on_error is not OnRewardError.DROP_SAMPLE and any(score.outcome is Outcome.ERROR for score in scores)


# Length penalties are named parts of the reward, beside the components of its sources.

OVERLONG = "overlong_penalty"
STOP_PROPERLY = "stop_properly_penalty"


@dataclass(frozen=True, slots=True)
class LengthPenalties:
    """Penalties for long responses. ``buffer`` or ``coef`` None: no such penalty. ``limit``: tokens of a response at most."""

    limit: int
    buffer: int | None
    factor: float
    coef: float | None

    @classmethod
    def of(cls, config: RLConfig) -> LengthPenalties:
        return cls(
            config.generate_max_len,
            config.overlong_buffer_len,
            config.overlong_penalty_factor,
            config.stop_properly_penalty_coef,
        )

    def applied(self, group: Sequence[Rollout], scores: Sequence[Score]) -> list[Score]:
        """The scores with each penalty added as a component; abstentions and errors stay as they are.

        The penalty for truncation multiplies the reward first; the penalty for length is subtracted after it, so that a
        coefficient near 0 does not weaken it.
        """
        return [
            self._applied(rollout, score) if score.outcome is Outcome.SCORE else score
            for rollout, score in zip(group, scores, strict=True)
        ]

    def _applied(self, rollout: Rollout, score: Score) -> Score:
        parts: dict[str, float] = {}
        value = score.value
        if self.coef is not None:
            cut_off = rollout.finish_reason is FinishReason.LENGTH
            value = stop_properly(value, self.coef) if cut_off else value
            parts[STOP_PROPERLY] = value - score.value
        if self.buffer is not None:
            parts[OVERLONG] = overlong_penalty(len(rollout.response_tokens), self.limit, self.buffer, self.factor)
            value += parts[OVERLONG]
        for name in parts.keys() & score.components:
            raise RewardError(f"The reward has a part named {name!r}, as a length penalty is: use another name.")
        return replace(score, value=value, components={**score.components, **parts})


# The two penalty formulas, on plain numbers.


def overlong_penalty(length: int, limit: int, buffer: int, factor: float) -> float:
    """The amount to add to the reward, from 0 to ``-factor``: soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13).

    0 up to ``limit - buffer`` tokens, then ``factor (limit - buffer - length) / buffer``, and ``-factor`` at and above the limit.
    """
    assert 0 < buffer <= limit, "the buffer is the last part of the limit"
    return -factor * min(max(length - (limit - buffer), 0), buffer) / buffer


def stop_properly(reward: float, coef: float) -> float:
    """The reward of a truncated response, after ProRL (arXiv 2505.24864).

    ``coef * reward`` for a coefficient from 0 to 1; ``coef`` itself for one below 0. The first would make a negative
    reward milder, so use the second for tasks with negative rewards.
    """
    assert coef <= 1, "a response that is cut off must not gain"
    return coef * reward if coef >= 0 else coef
