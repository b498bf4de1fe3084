"""Rewards from a user's Python function: a file (``--reward_func``, ``--remote_rm_url``) or a callable (Python API).

Signature: ``reward_func(queries, prompts, labels, **kwargs)``, sync or async, called with a whole group (all samples of one
prompt). The three arguments are lists of equal length; a query is prompt text + response text. ``responses``, ``datasources``,
``finish_reasons`` and ``response_lengths`` (in tokens; not in togi iterate) are passed as keyword arguments if the
function accepts them. For return values see ``returned``.

The function runs in worker processes (``pool``); several groups are scored at the same time. A failed call makes every
sample of its group an error, never a score of zero. It is retried ``retries`` times if the failure may be transient.
"""

from __future__ import annotations

import base64
import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from togi.config.choices import BUILTIN, Verifier
from togi.errors import RewardError
from togi.reward.pool import CallLimits, WorkerPool
from togi.reward.scores import as_call, as_scores, failed, without_errors
from togi.reward.wire import NO_INDEX, Answer, Call, Complaint, Load, LoadKind, encode
from togi.sample import Rollout, Score

FUNCTION_NAME = "reward_func"
SHOWN_CHARACTERS = 80
DEFAULT = CallLimits()

logger = logging.getLogger(__name__)


class FunctionReward:
    """A reward function in a pool of worker processes. Create it with ``from_file`` or ``from_callable``.

    ``component``: the name of the reward in the logs, beside "scores" and the function's own logs. The processes start in the
    constructor: call ``check`` before loading models, and ``close`` at the end.
    """

    def __init__(self, load: Load, shown_as: str, limits: CallLimits, component: str) -> None:
        self._shown_as = shown_as
        self._retries = limits.retries
        self._component = component
        self._is_closed = False
        self._pool = WorkerPool(load, limits)

    @classmethod
    def from_file(cls, path: str | Path, limits: CallLimits = DEFAULT, component: str = "function") -> FunctionReward:
        """The ``reward_func`` of a Python file. Raises RewardError if there is no such file."""
        file = Path(path).expanduser().absolute()
        if file.suffix != ".py" or not file.is_file():
            raise RewardError(
                f"The reward function file {path} is not an existing .py file; "
                "give --reward_func (or --remote_rm_url) the path of one."
            )
        load = Load(LoadKind.FILE, str(file), FUNCTION_NAME)
        return cls(load, f"{FUNCTION_NAME} in {path}", limits, component)

    @classmethod
    def from_verifier(
        cls, verifier: Verifier, settings: Mapping[str, str], limits: CallLimits = DEFAULT, component: str = "function"
    ) -> FunctionReward:
        """A built-in function. ``settings``: its keyword arguments."""
        load = Load(LoadKind.MODULE, f"togi.reward.verifiers.{verifier}", FUNCTION_NAME, settings)
        return cls(load, f"{BUILTIN}{verifier}", limits, component)

    @classmethod
    def from_callable(
        cls, function: Callable[..., Any], limits: CallLimits = DEFAULT, component: str = "function"
    ) -> FunctionReward:
        """A Python function. Raises RewardError if it cannot be sent to a worker process."""
        shown_as = f"{_name(function)} in {_file(function)}"
        return cls(_load_callable(function, shown_as), shown_as, limits, component)

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        """One score per rollout, in order; all of them errors if the last try failed too.

        Raises RewardError if the function cannot be loaded or the pool is closed.
        """
        return await self._score(group, self._retries)

    async def check(self, group: Sequence[Rollout]) -> list[Score]:
        """Import the function, call it once, and return its scores. Raises RewardError for every failure.

        Two rollouts are enough to tell one number per sample from one number for all.
        """
        return without_errors(await self._score(group, 0))

    async def answer(self, call: Call) -> Answer | Complaint:
        """The result of one call, without retries."""
        return await self._pool.run(encode(call))

    @property
    def is_built_in(self) -> bool:
        """Whether the function is built in."""
        return self._shown_as.startswith(BUILTIN)

    @property
    def shown_as(self) -> str:
        """The name of the function in messages."""
        return self._shown_as

    async def _score(self, group: Sequence[Rollout], retries: int) -> list[Score]:
        assert group, "a group has at least one rollout"
        call = as_call(group, lambda rollout: rollout.response_text)
        reply = await self.answer(call)
        # Retry only what may pass by itself; a wrong return value would come again.
        for retry in range(retries):
            if isinstance(reply, Answer) or not reply.is_transient or self._is_closed:
                break
            logger.warning("%s Try %d of %d follows.", self._sentence(reply, group), retry + 1, retries)
            reply = await self.answer(call)
        if isinstance(reply, Answer):
            return as_scores(reply, self._component, self._shown_as, len(group))
        sentence = self._sentence(reply, group)
        # A function that cannot be loaded fails for every group, so it ends the run.
        if self._is_closed or not reply.during_call:
            raise RewardError(sentence)
        return failed(len(group), sentence)

    async def close(self) -> None:
        """Kill and reap the worker processes. Calls in flight end with a RewardError."""
        self._is_closed = True
        self._pool.close()

    @property
    def worker_pids(self) -> list[int]:
        """The current process ids of the workers."""
        return self._pool.pids

    def _sentence(self, complaint: Complaint, group: Sequence[Rollout]) -> str:
        prompt = f"prompt {group[0].prompt.id!r}"
        where = f" (scoring {prompt})" if complaint.during_call else ""
        if complaint.index != NO_INDEX:
            rollout = group[complaint.index]
            start = rollout.response_text[:SHOWN_CHARACTERS]
            where = f" for sample {complaint.index} of {prompt} (response: {start!r})"
        return f"{self._shown_as} {complaint.what}{where}; {complaint.advice}."


def _load_callable(function: Callable[..., Any], shown_as: str) -> Load:
    """Load the function by name if a worker can import it under that name, else by value."""
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
