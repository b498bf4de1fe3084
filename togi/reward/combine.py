"""Several reward sources as one: names, the weighted sum or mean of scores, length penalties. Not here: clipping."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from togi.config.choices import RewardCombination
from togi.config.rl import RLConfig
from togi.errors import RewardError
from togi.obs.names import RESERVED_COMPONENTS
from togi.reward.scores import Reward
from togi.sample import FinishReason, Outcome, Rollout, Score


@dataclass(frozen=True, slots=True)
class Term:
    """One source, the name under which it is logged, and its weight."""

    name: str
    source: Reward
    weight: float = 1.0


class CombinedReward:
    """Asks every source at the same time; the components of all are kept, unweighted.

    Of several sources each one's own logs are called name/log, so that no two can collide.
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
        """For example "0.5 x helpful + 1 x length"."""
        return " + ".join(f"{factor:g} x {term.name}" for factor, term in zip(self._factors, self.terms, strict=True))

    async def close(self) -> None:
        for term in self.terms:
            await term.source.close()


def combine(names: Sequence[str], factors: Sequence[float], parts: Sequence[Score]) -> Score:
    """One rollout's scores from several sources as one: sum over sources of factor x score.

    An error anywhere is an error; otherwise an abstention anywhere abstains: a sum that lacks a term cannot be compared
    with the complete sums of the same group.
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
    return Score(Outcome.SCORE, value=value, components=components)


def distinct_names(wanted: Sequence[str], reserved: Collection[str] = RESERVED_COMPONENTS) -> list[str]:
    """``wanted`` with a number behind every name that is reserved or wanted more than once."""
    counts = Counter(wanted)
    taken = {name for name in wanted if counts[name] == 1} | set(reserved)
    result = []
    for name in wanted:
        if counts[name] == 1 and name not in reserved:
            result.append(name)
            continue
        number = 1
        while f"{name}_{number}" in taken:
            number += 1
        taken.add(f"{name}_{number}")
        result.append(f"{name}_{number}")
    return result


@dataclass(slots=True)
class ErrorLimit:
    """How many samples of a rollout may have failed rewards: ``share`` of ``total``."""

    share: float
    total: int
    errors: int = 0

    def count(self, scores: Sequence[Score]) -> None:
        """Raise RewardError as soon as there are more errors than allowed."""
        failures = [score.message for score in scores if score.outcome is Outcome.ERROR]
        self.errors += len(failures)
        if failures and self.errors > self.share * self.total:
            raise RewardError(
                f"The reward of {self.errors} of {self.total} samples failed, above the allowed share of {self.share:g} "
                f"(--max_reward_errors, or 0 with --on_reward_error stop): {failures[0]}"
            )


# Length penalties as named parts of the reward, beside what its sources said.

OVERLONG = "overlong_penalty"
STOP_PROPERLY = "stop_properly_penalty"


@dataclass(frozen=True, slots=True)
class LengthPenalties:
    """``buffer`` None and ``coef`` None: no such penalty. ``limit``: tokens that a response may have."""

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
        """The scores with what each penalty adds as a component of its own; abstentions and errors stay as they are.

        A response that is cut off is first judged for that; what it loses for its length is then taken off, so that a
        coefficient near 0 does not make it milder.
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
        for name in parts:
            if name in score.components:
                raise RewardError(
                    f"The reward has a part named {name!r}, which is the name of a length penalty: use another name."
                )
        return replace(score, value=value, components={**score.components, **parts})


# What a response costs that comes near the length limit, or does not end by itself. Plain numbers.


def overlong_penalty(length: int, limit: int, buffer: int, factor: float) -> float:
    """What to add to the reward, from 0 to ``-factor``: the soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13).

    0 up to ``limit - buffer`` tokens, then ``factor (limit - buffer - length) / buffer``, at the limit and above ``-factor``.
    """
    assert 0 < buffer <= limit, "the buffer is the last part of the limit"
    return -factor * min(max(length - (limit - buffer), 0), buffer) / buffer


def stop_properly(reward: float, coef: float) -> float:
    """The reward of a response that the limit has cut off, after ProRL (arXiv 2505.24864).

    ``coef * reward`` for a coefficient from 0 to 1, ``coef`` itself for one below 0. A reward below 0 is made milder by the
    first, so give tasks with such rewards the second.
    """
    assert coef <= 1, "a response that is cut off must not gain"
    return coef * reward if coef >= 0 else coef
