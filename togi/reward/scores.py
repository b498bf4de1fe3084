"""The protocol of reward sources; a group as the call of functions and servers, and their answer as scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from togi.errors import RewardError
from togi.reward.wire import Answer, Call
from togi.sample import Outcome, Rollout, Score

# The protocol of every reward source. Advantages, clipping and filtering are elsewhere (``togi.algo``).


class Reward(Protocol):
    """Scores finished rollouts, always a whole group (all samples of one prompt) in one call."""

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        """One ``Score`` per rollout, in the order of ``group``. Calls for different groups may overlap.

        A source that failed, timed out or returned something that is not a number gives the outcome error. Raises RewardError for
        permanent faults: a function that cannot be loaded, a server that stays down.
        """
        ...

    async def close(self) -> None:
        """Release processes and connections. The source cannot be used afterwards."""
        ...


def as_call(group: Sequence[Rollout], response: Callable[[Rollout], str]) -> Call:
    """The group as lists. A query is the prompt's text plus ``response`` of the rollout.

    Raises RewardError for a label that is not a JSON value.
    """
    for rollout in group[:1]:  # all have the same prompt
        if (problem := _json_problem(rollout.prompt.label)) is not None:
            raise RewardError(
                f"The label of prompt {rollout.prompt.id!r} is not a JSON value ({problem}); "
                "point --label_key at a field of texts, numbers, lists or objects."
            )
    optional: dict[str, list[str] | list[int]] = {
        "responses": [rollout.response_text for rollout in group],
        "datasources": [rollout.prompt.datasource for rollout in group],
        "finish_reasons": [rollout.finish_reason.value for rollout in group],
    }
    if all(rollout.response_tokens for rollout in group):  # togi iterate has texts only
        optional["response_lengths"] = [len(rollout.response_tokens) for rollout in group]
    return Call(
        queries=[rollout.prompt.text + response(rollout) for rollout in group],
        prompts=[rollout.prompt.text for rollout in group],
        labels=[rollout.prompt.label for rollout in group],
        optional=optional,
    )


def as_scores(answer: Answer, component: str, shown_as: str, count: int) -> list[Score]:
    """One score per query. ``component``: the name of the reward beside the answer's own components.

    Raises RewardError if one of those has the same name.
    """
    if component in answer.components:
        raise RewardError(
            f"{shown_as} returned a log named {component!r}, which is the name of the reward itself; use another name."
        )
    return [_score(answer, index, component, shown_as) for index in range(count)]


def failed(count: int, message: str) -> list[Score]:
    """The scores of a group whose call failed."""
    return [Score(Outcome.ERROR, message=message)] * count


def first_error(scores: Sequence[Score]) -> str | None:
    """The message of the first error among ``scores``, or None."""
    return next((score.message for score in scores if score.outcome is Outcome.ERROR), None)


def without_errors(scores: Sequence[Score]) -> list[Score]:
    """``scores`` if none of them is an error. Raises RewardError with the message of the first error."""
    if (message := first_error(scores)) is not None:
        raise RewardError(message)
    return list(scores)


def _score(answer: Answer, index: int, component: str, shown_as: str) -> Score:
    logs = {name: values[index] for name, values in answer.components.items()}
    components = {name: value for name, value in logs.items() if value is not None}
    reward = answer.rewards[index]
    if reward is None:
        return Score(Outcome.ABSTAIN, components=components, message=f"{shown_as} abstained.")
    assert math.isfinite(reward), "every number was checked"
    return Score(Outcome.SCORE, value=reward, components={component: reward, **components})


def _json_problem(value: Any) -> str | None:
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        return str(error)
    return None
