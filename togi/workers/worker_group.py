"""The workers of one model role: the same call on all of them, or samples dispatched over them.

Samples are dispatched in shares, one for each team of consecutive ranks that compute together (``World.team_size``). All ranks of
a team get the same samples and return the same result; that of the first rank is used.

``ModelScores`` is a local reward model as a callable: all waiting requests go into one call when the model is free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Concatenate, Generic

import numpy as np
from numpy.typing import NDArray

from togi.data.packing import PackStats, split_ranks
from togi.learn.learner import UpdateReport
from togi.plan.placement import Role
from togi.rollout.collect import all_or_none
from togi.sample import Sample
from togi.workers.model_worker import Arrays, LearnerWorker, ScorerWorker
from togi.workers.protocol import P, T, W, Workers, call_all


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
        return await call_all(self.workers, method, *arguments, **named)

    async def per_sample(self, method: Callable[[W, Sequence[Sample]], Arrays], samples: Sequence[Sample]) -> Arrays:
        """Dispatch the samples balanced by tokens, call ``method`` on each share, and return the results in sample order."""
        [plan], dealt = self._deal([samples])
        answers = await all_or_none(
            self.workers.call(rank, method, share[0]) for rank, share in enumerate(self._by_rank(dealt))
        )
        return _in_order(plan, answers[:: self._ranks_per_share])

    def _deal(self, steps: Sequence[Sequence[Sample]]) -> tuple[list[list[list[int]]], list[list[list[Sample]]]]:
        """For each step the sample indices of each share, and for each share its samples of every step."""
        plans = [split_ranks(step, self.shares, share_prefix=self._share_prompts) for step in steps]
        dealt = [
            [[step[i] for i in plan[share]] for step, plan in zip(steps, plans, strict=True)]
            for share in range(self.shares)
        ]
        return plans, dealt

    def _by_rank(self, shares: Iterable[T]) -> list[T]:
        """The share of each rank: all ranks of a team have the same."""
        return [share for share in shares for _ in range(self._ranks_per_share)]


class LearnerGroup(WorkerGroup[LearnerWorker]):
    """The ranks of a model in training."""

    async def update(
        self, steps: Sequence[Sequence[Sample]], mixed: Sequence[Sequence[Sample]] = ()
    ) -> list[UpdateReport]:
        """One optimizer step per element of ``steps``; the samples of a step are dispatched balanced by tokens.

        ``mixed``: supervised rows for each step, dispatched in the same way, or empty. A report has the packed tokens of all
        ranks, and log-probs in the order of the samples.
        """
        plans, dealt = self._deal(steps)
        _, dealt_rows = self._deal(mixed)
        answers = await all_or_none(
            self.workers.call(rank, LearnerWorker.update, samples, rows)
            for rank, (samples, rows) in enumerate(self._by_rank(zip(dealt, dealt_rows, strict=True)))
        )
        merged = []
        # the report of each step, from those of its shares: the first rank of a team speaks for it
        for plan, *reports in zip(plans, *answers[:: self._ranks_per_share], strict=True):
            packed = sum((report.packed for report in reports), PackStats(0, 0))
            logprobs = _in_order(plan, [report.logprobs for report in reports])
            merged.append(replace(reports[0], packed=packed, logprobs=logprobs))
        return merged


def _in_order(plan: Sequence[Sequence[int]], answers: Sequence[Sequence[NDArray[np.float32]]]) -> Arrays:
    """The arrays of all shares in the order of the samples. ``plan``: the samples of each share. A share may have no arrays."""
    result: Arrays = [np.empty(0, dtype=np.float32)] * sum(map(len, plan))
    for share, answer in zip(plan, answers, strict=True):
        for index, array in zip(share, answer, strict=len(answer) > 0):
            result[index] = array
    return result


class ModelScores:
    """Scores token sequences. Groups finish one by one; batching the waiting ones keeps the model's packs full.

    ``alone``: each call by itself, so that no rounding depends on which groups have finished together (``--full_determinism``).
    """

    def __init__(self, group: WorkerGroup[ScorerWorker], *, alone: bool) -> None:
        self._group, self._most = group, 1 if alone else None
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
                count = self._most or len(self._waiting)
                taken, self._waiting = self._waiting[:count], self._waiting[count:]
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
