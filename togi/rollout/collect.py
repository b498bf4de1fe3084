"""Run an environment over prompts, many rollouts at a time, and yield each group as soon as it is complete.

It takes callables, not engines. The caller chooses the prompts, the time and the policy version.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from togi.errors import RolloutError, RunError, UserError
from togi.rollout.environment import Environment, Generate
from togi.sample import Generation, Prompt, Rollout, Sampling


@dataclass(slots=True, eq=False)
class _Group:
    prompt: Prompt
    group_id: str
    left: int
    tasks: list[asyncio.Task[Rollout]] = field(default_factory=list)


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
    running: dict[asyncio.Task[Rollout], _Group] = {}
    jobs = _jobs(prompts, n_samples)
    try:
        while True:
            # start rollouts up to the limit
            while len(running) < max_in_flight and (job := next(jobs, None)) is not None:
                group, sample = job
                bound = generate if seed is None else Seeded(generate, f"{seed}/{group.group_id}/{sample}")
                task = asyncio.create_task(_run_one(environment, group, sample, bound))
                group.tasks.append(task)
                running[task] = group
            if not running:
                return
            # take finished rollouts; a failed one raises here
            finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in running if task in finished]:
                group = running.pop(task)
                task.result()
                group.left -= 1
                if group.left == 0:
                    yield [other.result() for other in group.tasks]
    finally:
        # closed or failed: no rollout may keep running in the background
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


class Seeded:
    """A ``Generate`` that sets the seed of each call, from a name and the number of the call."""

    def __init__(self, generate: Generate, name: str) -> None:
        self._generate = generate
        self._name = name
        self._calls = 0

    async def __call__(self, prompt_tokens: Sequence[int], sampling: Sampling) -> Generation:
        digest = hashlib.blake2b(f"{self._name}/{self._calls}".encode(), digest_size=4).digest()
        self._calls += 1
        return await self._generate(prompt_tokens, replace(sampling, seed=int.from_bytes(digest, "big")))


def _jobs(prompts: Iterable[tuple[str, Prompt]], n_samples: int) -> Iterator[tuple[_Group, int]]:
    for group_id, prompt in prompts:
        group = _Group(prompt, group_id, n_samples)
        for sample in range(n_samples):
            yield group, sample


async def _run_one(environment: Environment, group: _Group, sample: int, generate: Generate) -> Rollout:
    try:
        return await environment.run(group.prompt, group.group_id, generate)
    except (UserError, RunError):
        raise
    except Exception as error:
        raise RolloutError(
            f"{type(environment).__name__} failed on prompt {group.prompt.id!r} (group {group.group_id!r}, sample {sample}): "
            f"{type(error).__name__}: {error}"
        ) from error
