"""Rewards from a user's Python function: a file (``--reward_func``, ``--remote_rm_url``) or a callable (Python API).

Signature: ``reward_func(queries, prompts, labels, **kwargs)``, sync or async, called with a whole group (all samples of
one prompt). The three arguments are lists of equal length; a query is prompt text + response text. ``responses``,
``datasources`` and ``finish_reasons`` are given as keyword arguments when the function accepts them. What may be
returned: see ``returned``.

The function runs in worker processes (``pool``); several groups are scored at the same time. In this release every
failure stops the run with a RewardError after ``retries`` more tries: a failure is never a score of zero.
"""

from __future__ import annotations

import base64
import inspect
import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from togi.errors import RewardError
from togi.reward.pool import CallLimits, WorkerPool
from togi.reward.wire import NO_INDEX, OPTIONAL_ARGUMENTS, Answer, Call, Complaint, Load, LoadKind, encode
from togi.sample import Outcome, Rollout, Score

FUNCTION_NAME = "reward_func"
SHOWN_CHARACTERS = 80
DEFAULT = CallLimits()

logger = logging.getLogger(__name__)


class FunctionReward:
    """A reward function in a pool of worker processes. Make it with ``from_file`` or ``from_callable``.

    ``component`` is the name under which the reward is logged beside "scores" and the function's own logs.
    The processes start in the constructor: call ``check`` before loading models, and ``close`` at the end.
    """

    def __init__(self, load: Load, shown_as: str, limits: CallLimits, component: str) -> None:
        self._shown_as = shown_as
        self._retries = limits.retries
        self._component = component
        self._pool = WorkerPool(load, limits)

    @classmethod
    def from_file(cls, path: str | Path, limits: CallLimits = DEFAULT, component: str = "function") -> FunctionReward:
        """The ``reward_func`` of a Python file. Raises RewardError when there is no such file."""
        file = Path(path).expanduser().absolute()
        if file.suffix != ".py" or not file.is_file():
            raise RewardError(
                f"The reward function file {path} is not an existing .py file; "
                "give --reward_func (or --remote_rm_url) the path of one."
            )
        load = Load(LoadKind.FILE, str(file), FUNCTION_NAME)
        return cls(load, f"{FUNCTION_NAME} in {path}", limits, component)

    @classmethod
    def from_callable(
        cls, function: Callable[..., Any], limits: CallLimits = DEFAULT, component: str = "function"
    ) -> FunctionReward:
        """A Python function. Raises RewardError when it cannot be sent to a worker process."""
        shown_as = f"{_name(function)} in {_file(function)}"
        return cls(_load_callable(function, shown_as), shown_as, limits, component)

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        """One score per rollout, in order. Raises RewardError when the last try failed too."""
        assert group, "a group has at least one rollout"
        frame = self._request(group)
        reply = await self._pool.run(frame)
        for retry in range(self._retries):
            if isinstance(reply, Answer):
                break
            logger.warning("%s Try %d of %d follows.", self._sentence(reply, group), retry + 1, self._retries)
            reply = await self._pool.run(frame)
        if isinstance(reply, Complaint):
            raise RewardError(self._sentence(reply, group))
        return self._scores(reply, len(group))

    async def check(self, group: Sequence[Rollout]) -> None:
        """Import the function and call it once for real. Raises RewardError as ``score`` does.

        Two rollouts are enough to tell a number for each from a number for all.
        """
        await self.score(group)

    async def close(self) -> None:
        """Kill and reap the worker processes. Calls in flight end with a RewardError."""
        self._pool.close()

    @property
    def worker_pids(self) -> list[int]:
        """The process ids of the workers as of now."""
        return self._pool.pids

    def _request(self, group: Sequence[Rollout]) -> bytes:
        responses = [rollout.response_text for rollout in group]
        datasources = [rollout.prompt.datasource for rollout in group]
        finish_reasons = [rollout.finish_reason.value for rollout in group]
        call = Call(
            queries=[rollout.prompt.text + rollout.response_text for rollout in group],
            prompts=[rollout.prompt.text for rollout in group],
            labels=[rollout.prompt.label for rollout in group],
            optional=dict(zip(OPTIONAL_ARGUMENTS, (responses, datasources, finish_reasons), strict=True)),
        )
        try:
            return encode(call)
        except (TypeError, ValueError) as error:
            bad = next(rollout.prompt for rollout in group if not _is_json(rollout.prompt.label))
            raise RewardError(
                f"The label of prompt {bad.id!r} is not a JSON value ({error}); "
                "point --label_key at a field of texts, numbers, lists or objects."
            ) from error

    def _scores(self, reply: Answer, count: int) -> list[Score]:
        if self._component in reply.components:
            raise RewardError(
                f"{self._shown_as} returned a log named {self._component!r}, which is the name of the reward itself; "
                "use another name."
            )
        return [self._score(reply, index) for index in range(count)]

    def _score(self, reply: Answer, index: int) -> Score:
        logs = {name: values[index] for name, values in reply.components.items()}
        components = {name: value for name, value in logs.items() if value is not None}
        reward = reply.rewards[index]
        if reward is None:
            return Score(Outcome.ABSTAIN, components=components, message=f"{self._shown_as} abstained.")
        assert math.isfinite(reward), "the worker checks every number"
        return Score(Outcome.SCORE, value=reward, components={self._component: reward, **components})

    def _sentence(self, complaint: Complaint, group: Sequence[Rollout]) -> str:
        prompt = f"prompt {group[0].prompt.id!r}"
        where = f" (scoring {prompt})" if complaint.during_call else ""
        if complaint.index != NO_INDEX:
            rollout = group[complaint.index]
            start = rollout.response_text[:SHOWN_CHARACTERS]
            where = f" for sample {complaint.index} of {prompt} (response: {start!r})"
        return f"{self._shown_as} {complaint.what}{where}; {complaint.advice}."


def _load_callable(function: Callable[..., Any], shown_as: str) -> Load:
    """By name when a worker can import it under that name, by value otherwise."""
    name = _name(function)
    module = sys.modules.get(function.__module__ or "") if inspect.isfunction(function) else None
    if module is not None and module.__name__ != "__main__" and _lookup(module, name) is function:
        return Load(LoadKind.MODULE, module.__name__, name)
    try:
        import cloudpickle  # type: ignore[import-untyped]
    except ImportError as error:
        raise RewardError(
            f"{shown_as} cannot be imported by name in a worker process and cloudpickle is not installed; "
            "move it to the top level of a module, give its file to --reward_func, or pip install cloudpickle."
        ) from error
    try:
        pickled = cloudpickle.dumps(function)
    except Exception as error:  # pickling runs the user's own __reduce__ methods
        raise RewardError(
            f"{shown_as} cannot be sent to a worker process ({error}); "
            "move it to the top level of a module or give its file to --reward_func."
        ) from error
    return Load(LoadKind.PICKLE, base64.b64encode(pickled).decode(), name)


def _lookup(module: ModuleType, qualname: str) -> object:
    found: object = module
    for part in qualname.split("."):
        if part not in vars(found):
            return None
        found = vars(found)[part]
    return found


def _name(function: Callable[..., Any]) -> str:
    return function.__qualname__ if inspect.isroutine(function) else type(function).__qualname__


def _file(function: Callable[..., Any]) -> str:
    try:
        return inspect.getfile(function if inspect.isroutine(function) else type(function))
    except (TypeError, OSError):  # written in C, or typed into an interactive session
        return "an unknown file"


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
