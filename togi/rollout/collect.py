"""Run an environment over prompts, many rollouts at a time, and yield each group as soon as it is complete.

It takes callables, not engines. The caller chooses the prompts, the time and the policy version.

An ``Environment`` is what a policy acts in. It gets a callable that generates, so that tests can pass a scripted one.

Not here: rewards (they see whole groups), agents with tools (which implement ``Environment`` elsewhere).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol, TypeVar

from togi.errors import RolloutError, RunError, UserError
from togi.sample import Generation, Prompt, Rollout, Sampling

T = TypeVar("T")


async def all_or_none(work: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all, in order. The first failure is raised, and cancels the others."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


Generate = Callable[[Sequence[int], Sampling], Awaitable[Generation]]


class Environment(Protocol):
    """Turns one prompt into one trajectory. One instance serves many concurrent calls, so ``run`` must keep its state local."""

    async def run(self, prompt: Prompt, group_id: str, generate: Generate) -> Rollout:
        """Run one trajectory. Token ids may only be appended: generated ids are passed on, never decoded and encoded again."""


@dataclass(frozen=True, slots=True)
class SingleTurn:
    """The simplest environment: one prompt, one response. ``decode`` makes the text for rewards and logs."""

    decode: Callable[[Sequence[int]], str]
    sampling: Sampling

    async def run(self, prompt: Prompt, group_id: str, generate: Generate) -> Rollout:
        generation = await generate(prompt.tokens, self.sampling)
        return Rollout(
            prompt=prompt,
            group_id=group_id,
            response_tokens=generation.tokens,
            response_mask=(True,) * len(generation.tokens),
            response_logprobs=generation.logprobs,
            response_text=self.decode(generation.tokens),
            finish_reason=generation.finish_reason,
            versions=generation.versions,
        )


async def collect_groups(
    prompts: Iterable[tuple[str, Prompt]],
    environment: Environment,
    generate: Generate,
    *,
    n_samples: int,
    max_in_flight: int,
    seed: int | None = None,
) -> AsyncIterator[list[Rollout]]:
    """Yield the ``n_samples`` rollouts of each (group id, prompt). Groups come in the order in which they are completed.

    At most ``max_in_flight`` rollouts run at once. The limit counts rollouts, not groups, so a straggler does not block other
    groups. ``prompts`` is read only as far as needed and may be endless. With ``seed`` every generation gets its own seed from
    (seed, group id, sample, turn), so results do not depend on timing.
    Closing the iterator, or an error, cancels the running rollouts. Raises ``RolloutError``, or a ``UserError`` or ``RunError`` of
    the environment unchanged.
    """
    assert n_samples >= 1
    assert max_in_flight >= 1
    # each running rollout with all of its group that were started
    running: dict[asyncio.Task[Rollout], list[asyncio.Task[Rollout]]] = {}
    jobs = (
        (group_id, prompt, sample, group)
        for group_id, prompt in prompts
        for group in [list[asyncio.Task[Rollout]]()]
        for sample in range(n_samples)
    )
    try:
        while True:
            # start rollouts up to the limit
            while len(running) < max_in_flight and (job := next(jobs, None)) is not None:
                group_id, prompt, sample, group = job
                bound = generate if seed is None else seeded(generate, f"{seed}/{group_id}/{sample}")
                task = asyncio.create_task(_run_one(environment, prompt, group_id, sample, bound))
                group.append(task)
                running[task] = group
            if not running:
                return
            # take finished rollouts; a failed one raises here
            finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in running if task in finished]:
                group = running.pop(task)
                task.result()
                if len(group) == n_samples and running.keys().isdisjoint(group):
                    yield [other.result() for other in group]
    finally:
        # closed or failed: no rollout may keep running in the background
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def seeded(generate: Generate, name: str) -> Generate:
    """A ``Generate`` that sets the seed of each call, from a name and the number of the call."""
    calls = count()

    async def call(prompt_tokens: Sequence[int], sampling: Sampling) -> Generation:
        digest = hashlib.blake2b(f"{name}/{next(calls)}".encode(), digest_size=4).digest()
        return await generate(prompt_tokens, replace(sampling, seed=int.from_bytes(digest, "big")))

    return call


async def _run_one(environment: Environment, prompt: Prompt, group_id: str, sample: int, generate: Generate) -> Rollout:
    try:
        return await environment.run(prompt, group_id, generate)
    except (UserError, RunError):
        raise
    except Exception as error:
        raise RolloutError(
            f"{type(environment).__name__} failed on prompt {prompt.id!r} (group {group_id!r}, sample {sample}): "
            f"{type(error).__name__}: {error}"
        ) from error
