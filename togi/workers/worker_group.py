"""The workers of one model role: the same call on all of them, or samples dispatched over them.

Samples are dispatched in shares, one for each team of consecutive ranks that compute together (``World.team_size``). All ranks of
a team get the same samples and return the same result; that of the first rank is used.

``ModelScores`` is a local reward model as a callable: all waiting requests go into one call when the model is free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Concatenate, Generic, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from togi.data.packing import split_ranks
from togi.learn.learner import UpdateReport
from togi.plan.placement import Role
from togi.rollout.collect import all_or_none
from togi.sample import Sample
from togi.workers.model_worker import Arrays, LearnerWorker, ScorerWorker, StepResult
from togi.workers.protocol import Workers

W = TypeVar("W")
T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class StepUpdate:
    """One optimizer step over all ranks.

    ``tokens``: tokens computed; ``unshared_tokens``: what they would have been without shared prompts. ``logprobs``: of
    the step's own forward pass, one array per sample in order; empty if the objective computes none.
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


class WorkerGroup(Generic[W]):
    """Rank i of the role is worker i. Collective methods are always called on all ranks at once."""

    def __init__(self, role: Role, workers: Workers[W], *, share_prompts: bool, ranks_per_share: int = 1) -> None:
        assert len(workers) % ranks_per_share == 0
        self.role = role
        self.workers = workers
        self._share_prompts = share_prompts
        self._ranks_per_share = ranks_per_share

    @property
    def size(self) -> int:
        return len(self.workers)

    @property
    def shares(self) -> int:
        """The number of shares that samples are dispatched in."""
        return self.size // self._ranks_per_share

    async def call_all(self, method: Callable[Concatenate[W, P], T], *arguments: P.args, **named: P.kwargs) -> list[T]:
        """The results of the same call on every rank, in rank order."""
        return await all_or_none(self.workers.call(rank, method, *arguments, **named) for rank in range(self.size))

    async def per_sample(self, method: Callable[[W, Sequence[Sample]], Arrays], samples: Sequence[Sample]) -> Arrays:
        """Dispatch the samples balanced by tokens, call ``method`` on each share, and return the results in sample order."""
        [plan], dealt = self._deal([samples])
        answers = await all_or_none(
            self.workers.call(rank, method, dealt[self._share(rank)][0]) for rank in range(self.size)
        )
        result: Arrays = [np.empty(0, dtype=np.float32)] * len(samples)
        for share, answer in zip(plan, self._one_per_share(answers), strict=True):
            for index, array in zip(share, answer, strict=True):
                result[index] = array
        return result

    def _deal(self, steps: Sequence[Sequence[Sample]]) -> tuple[list[list[list[int]]], list[list[list[Sample]]]]:
        """For each step the sample indices of each share, and for each share its samples of every step."""
        plans = [split_ranks(step, self.shares, share_prefix=self._share_prompts) for step in steps]
        dealt = [
            [[step[i] for i in plan[share]] for step, plan in zip(steps, plans, strict=True)]
            for share in range(self.shares)
        ]
        return plans, dealt

    def _share(self, rank: int) -> int:
        return rank // self._ranks_per_share

    def _one_per_share(self, answers: Sequence[T]) -> Sequence[T]:
        """The results of the first rank of each team."""
        return answers[:: self._ranks_per_share]


class LearnerGroup(WorkerGroup[LearnerWorker]):
    """The ranks of a model in training."""

    async def update(
        self, steps: Sequence[Sequence[Sample]], mixed: Sequence[Sequence[Sample]] = ()
    ) -> list[StepUpdate]:
        """One optimizer step per element of ``steps``; the samples of a step are dispatched balanced by tokens.

        ``mixed``: supervised rows for each step, dispatched in the same way, or empty.
        """
        plans, dealt = self._deal(steps)
        _, dealt_rows = self._deal(mixed)
        shares = [self._share(rank) for rank in range(self.size)]
        answers = await all_or_none(
            self.workers.call(rank, LearnerWorker.update, dealt[share], dealt_rows[share])
            for rank, share in enumerate(shares)
        )
        by_share = self._one_per_share(answers)
        return [
            StepUpdate.merged(plan, [results[number] for results in by_share], len(step))
            for number, (step, plan) in enumerate(zip(steps, plans, strict=True))
        ]


class ModelScores:
    """Scores token sequences. Groups finish one by one; batching the waiting ones keeps the model's packs full."""

    def __init__(self, group: WorkerGroup[ScorerWorker]) -> None:
        self._group = group
        self._waiting: list[tuple[Sequence[Sequence[int]], asyncio.Future[list[float]]]] = []
        self._busy = False

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """One score per token sequence, in order."""
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._waiting.append((sequences, future))
        if not self._busy:
            await self._drain()
        return await future

    async def _drain(self) -> None:
        self._busy = True
        try:
            while self._waiting:
                # Requests that arrive during this call wait for the next round.
                taken, self._waiting = self._waiting, []
                flat = [as_sample(tokens) for sequences, _ in taken for tokens in sequences]
                try:
                    scores = np.concatenate(await self._group.per_sample(ScorerWorker.scores, flat)).tolist()
                except BaseException as error:
                    for _, future in taken:
                        future.set_exception(error)
                    raise
                for sequences, future in taken:
                    future.set_result(scores[: len(sequences)])
                    scores = scores[len(sequences) :]
        finally:
            self._busy = False


def as_sample(tokens: Sequence[int]) -> Sample:
    """Tokens as a sample without a loss mask, to be scored as a whole."""
    return Sample(np.asarray(tokens, dtype=np.int64), np.zeros(len(tokens), dtype=np.bool_), 0, "score")
