"""The processes of one model role, addressed as one: the same call on all of them, or the samples dealt out among them.

Samples are dealt in shares, one for each team of consecutive ranks that compute together (``World.team_size``). All ranks of a
team get the same samples and give the same answer, of which the first one's is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import ObjectRef
from ray.actor import ActorHandle

from togi.data.partition import split_ranks
from togi.learn.learner import UpdateReport
from togi.plan.placement import Role
from togi.sample import Sample
from togi.workers.model_worker import StepResult
from togi.workers.ray.calls import result_of, results_of


@dataclass(frozen=True, slots=True)
class StepUpdate:
    """One optimizer step over all ranks.

    ``tokens`` were computed, ``unshared_tokens`` would have been without shared prompts. ``logprobs`` are those of the
    step's own forward, one array a sample in order; empty when the objective computes none.
    """

    report: UpdateReport
    tokens: int
    unshared_tokens: int
    logprobs: list[NDArray[np.float32]]

    @classmethod
    def merged(cls, plan: Sequence[Sequence[int]], results: Sequence[StepResult], samples: int) -> StepUpdate:
        logprobs: list[NDArray[np.float32]] = [np.empty(0, dtype=np.float32)] * samples
        for share, result in zip(plan, results, strict=True):
            for index, array in zip(share, result.logprobs, strict=False):
                logprobs[index] = array
        tokens = sum(result.tokens for result in results)
        return cls(results[0].report, tokens, sum(result.unshared_tokens for result in results), logprobs)


class WorkerGroup:
    """Rank i of the role is ``workers[i]``. Collective methods are called on all ranks at once, always."""

    def __init__(
        self, role: Role, workers: Sequence[ActorHandle], *, share_prompts: bool, ranks_per_share: int = 1
    ) -> None:
        assert len(workers) % ranks_per_share == 0
        self.role = role
        self.workers = list(workers)
        self._share_prompts = share_prompts
        self._ranks_per_share = ranks_per_share

    @property
    def size(self) -> int:
        return len(self.workers)

    @property
    def shares(self) -> int:
        """How many shares samples are dealt in."""
        return self.size // self._ranks_per_share

    async def start(self, *arguments: Any) -> None:
        """Let the ranks meet, and load the model on each of them."""
        address, port = await result_of(self.workers[0].open_meeting.remote(), f"{self.role} 0")
        refs = [
            worker.start.remote(rank, self.size, address, port, *arguments) for rank, worker in enumerate(self.workers)
        ]
        await results_of(refs, self.role)

    def start_all(self, method: str, *arguments: Any, returns: int = 1) -> list[Any]:
        """Begin a call on every rank; one reference (or a list of ``returns`` references) per rank."""
        return [getattr(worker, method).options(num_returns=returns).remote(*arguments) for worker in self.workers]

    async def call_all(self, method: str, *arguments: Any) -> list[Any]:
        """The results of the same call on every rank, in rank order."""
        refs: list[ObjectRef] = self.start_all(method, *arguments)
        return await results_of(refs, self.role)

    async def per_sample(self, method: str, samples: Sequence[Sample]) -> list[NDArray[np.float32]]:
        """Deal the samples by tokens, call ``method`` on each share, and return the results in order."""
        shares = split_ranks(samples, self.shares, share_prefix=self._share_prompts)
        dealt = [[samples[i] for i in share] for share in shares]
        answers = await self._one_per_share(
            [
                getattr(worker, method).remote(dealt[rank // self._ranks_per_share])
                for rank, worker in enumerate(self.workers)
            ]
        )
        result: list[NDArray[np.float32]] = [np.empty(0, dtype=np.float32)] * len(samples)
        for share, answer in zip(shares, answers, strict=True):
            for index, array in zip(share, answer, strict=True):
                result[index] = array
        return result

    async def update(
        self, steps: Sequence[Sequence[Sample]], kl_coef: float, mixed: Sequence[Sequence[Sample]] = ()
    ) -> list[StepUpdate]:
        """One optimizer step per element of ``steps``; each step's samples are dealt by tokens.

        ``mixed``: supervised rows for each step, dealt in the same way, or nothing at all.
        """
        plans, dealt = self._deal(steps)
        _, dealt_rows = self._deal(mixed)
        shares = [rank // self._ranks_per_share for rank in range(self.size)]
        by_share: list[list[StepResult]] = await self._one_per_share(
            [
                worker.update.remote(dealt[share], kl_coef, dealt_rows[share])
                for share, worker in zip(shares, self.workers, strict=True)
            ]
        )
        return [
            StepUpdate.merged(plan, [results[number] for results in by_share], len(step))
            for number, (step, plan) in enumerate(zip(steps, plans, strict=True))
        ]

    def _deal(self, steps: Sequence[Sequence[Sample]]) -> tuple[list[list[list[int]]], list[list[list[Sample]]]]:
        """For each step which samples go to which share, and for each share its samples of every step."""
        plans = [split_ranks(step, self.shares, share_prefix=self._share_prompts) for step in steps]
        dealt = [
            [[step[i] for i in plan[share]] for step, plan in zip(steps, plans, strict=True)]
            for share in range(self.shares)
        ]
        return plans, dealt

    async def _one_per_share(self, refs: Sequence[ObjectRef]) -> list[Any]:
        """The answers of the first ranks of all teams, to calls on all ranks."""
        return (await results_of(refs, self.role))[:: self._ranks_per_share]
