"""Length penalties as named parts of the reward, beside what its sources said. The formulas are ``togi.algo.length_penalty``'s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from togi.algo.length_penalty import overlong_penalty, stop_properly
from togi.config.rl import RLConfig
from togi.errors import RewardError
from togi.sample import FinishReason, Outcome, Rollout, Score

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
