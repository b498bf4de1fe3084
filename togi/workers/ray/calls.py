"""Waiting for Ray workers: the first failure is raised, as an error that names the worker, without Ray's wrapping."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from togi.errors import RunError, UserError, WorkerError
from togi.rollout.tasks import all_or_none

W_co = TypeVar("W_co", covariant=True)
T = TypeVar("T")
P = ParamSpec("P")


class RayWorkers(Generic[W_co]):
    """``Workers`` in their own processes. ``who``: their name in errors."""

    def __init__(self, who: str, handles: Sequence[ActorHandle]) -> None:
        self.who, self.handles = who, tuple(handles)

    def __len__(self) -> int:
        return len(self.handles)

    async def call(
        self,
        index: int,
        method: Callable[Concatenate[W_co, P], Coroutine[Any, Any, T] | T],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> T:
        # Ray looks remote methods up by name.
        remote = getattr(self.handles[index], method.__name__).remote
        result: T = await result_of(remote(*arguments, **named), f"{self.who} {index}")
        return result


async def result_of(ref: ObjectRef, who: str) -> Any:
    """The result of one remote call. Raises the user's own error unchanged, anything else as WorkerError."""
    try:
        return await ref
    except RayTaskError as error:
        if isinstance(error.cause, UserError | RunError):
            raise error.cause from None
        raise WorkerError(f"{who} failed: {error.cause!r}\n{error}") from None
    except OutOfMemoryError:
        raise WorkerError(
            f"{who} was ended because the machine ran out of memory: lower --max_tokens_per_gpu, or add --gradient_checkpointing."
        ) from None
    except RayActorError as error:
        raise WorkerError(f"{who} died: {' '.join(str(error).split())}") from None


async def results_of(refs: Sequence[ObjectRef], who: str, arrived: Callable[[int], None] = lambda _: None) -> list[Any]:
    """The results of one call on several workers, in order. Raises at the first failure without waiting for the rest.

    ``arrived``: called with the place of each result as it arrives.
    """

    async def one(place: int, ref: ObjectRef) -> Any:
        result = await result_of(ref, f"{who} {place}")
        arrived(place)
        return result

    return await all_or_none(one(place, ref) for place, ref in enumerate(refs))
