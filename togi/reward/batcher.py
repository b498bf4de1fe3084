"""Queries of many requests in one forward: whatever waits when the model is free, up to a token budget."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

Tokens = Sequence[int]


@dataclass(frozen=True, slots=True)
class _Waiting:
    tokens: Tokens
    score: asyncio.Future[float]


class Batcher:
    """``forward`` maps token sequences to one number each; it runs in a thread of its own, one call at a time.

    A call gets the sequences that came first, as many as ``max_tokens`` and ``max_sequences`` (None: any number) allow and
    always one at least.
    """

    def __init__(
        self, forward: Callable[[Sequence[Tokens]], Sequence[float]], max_tokens: int, max_sequences: int | None
    ) -> None:
        self._forward = forward
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences
        self._queue: deque[_Waiting] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="togi-forward")
        self._worker: asyncio.Task[None] | None = None

    async def score(self, sequences: Sequence[Tokens]) -> list[float]:
        """One number a sequence. Raises what ``forward`` raised on the batch that held one of them."""
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(tokens, loop.create_future()) for tokens in sequences]
        self._queue.extend(waiting)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._drain())
        return list(await asyncio.gather(*(each.score for each in waiting)))

    def close(self) -> None:
        """End the thread. No call may be in flight."""
        self._thread.shutdown()

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            taken = self._take()
            call = loop.run_in_executor(self._thread, self._forward, [each.tokens for each in taken])
            try:
                scores = await call
            except Exception as error:  # noqa: BLE001  whatever it is belongs to those who asked
                for each in taken:
                    if not each.score.done():  # who asked may be gone
                        each.score.set_exception(error)
                continue
            for each, score in zip(taken, scores, strict=True):
                if not each.score.done():
                    each.score.set_result(score)

    def _take(self) -> list[_Waiting]:
        """The sequences of the next call, oldest first."""
        most = len(self._queue) if self._max_sequences is None else self._max_sequences
        taken: list[_Waiting] = []
        tokens = 0
        while (
            self._queue and len(taken) < most and (not taken or tokens + len(self._queue[0].tokens) <= self._max_tokens)
        ):
            tokens += len(self._queue[0].tokens)
            taken.append(self._queue.popleft())
        return taken
