"""A local reward model as a callable: all waiting requests go into one call when the model is free."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from togi.sample import Sample
from togi.workers.model_worker import ScorerWorker
from togi.workers.worker_group import WorkerGroup


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
