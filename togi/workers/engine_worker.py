"""A generation engine as a worker, and the pool of engines that a run uses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Concatenate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from togi.config.choices import EngineName
from togi.device import default_device
from togi.errors import WorkerDied, WorkerError
from togi.plan.machine import PeakMemory, Released
from togi.plan.placement import Carrier
from togi.rollout import create_engine
from togi.rollout.collect import all_or_none
from togi.rollout.engine import EngineSettings, RolloutEngine
from togi.sample import Generation, Sample, Sampling
from togi.weights.buckets import Manifest
from togi.weights.carriers import Announced, Channel, Inbox, Parcel, Rendezvous
from togi.weights.files import local_folder
from togi.workers.protocol import P, T, Workers


class EngineWorker:
    """One engine. Every call is asynchronous, so one engine serves many requests at once."""

    def __init__(self) -> None:
        self._engine: RolloutEngine
        self._memory = PeakMemory()
        self._channels: list[Channel] = []

    async def start(self, name: EngineName, settings: EngineSettings) -> None:
        # Resolved here, on the engine's node: each node has its own hub cache.
        self._tensor_parallel = settings.tensor_parallel_size > 1
        self._engine = create_engine(name, replace(settings, model=local_folder(settings.model)))

    async def facts(self) -> Mapping[str, str | bool]:
        return self._engine.facts

    async def beat(self) -> None:
        """Return after the engine's current step, so never while a step hangs. Raises if the engine has failed."""
        answered = Future[None]()
        self._engine.send(partial(self._engine.answer, answered, lambda: None))
        await asyncio.wrap_future(answered)

    async def generate(self, prompt_tokens: Sequence[int], sampling: Sampling) -> Generation:
        return await self._engine.generate(prompt_tokens, sampling)

    async def score(self, tokens: Sequence[int]) -> list[float]:
        return await self._engine.score(tokens)

    async def routes(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        return await self._engine.routes(tokens)

    async def take_weights(self, manifest: Manifest, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load a whole update from tensors of this process. They must keep their values until the next update begins."""
        await self._engine.begin_update(manifest)
        synchronize()  # the engine's thread uses its own CUDA streams
        await self._engine.load_tensors(tensors)
        await self._engine.finish_update()
        synchronize()

    async def join_channel(self, meetings: Sequence[Rendezvous], carrier: Carrier) -> None:
        """Join the group of the actor's first rank and the other engines, to receive weights. ``meetings``: of its parts."""
        if len(meetings) > 1:
            await self._engine.join_parts(meetings, on_gpu=carrier is Carrier.NCCL)
            return
        device = default_device() if carrier is Carrier.NCCL else torch.device("cpu")
        self._channels = [await asyncio.to_thread(Channel.join, meetings[0], device)]

    async def begin_update(self, manifest: Manifest) -> None:
        self._inbox, self._in_parts = Inbox(self._channels), False
        await self._engine.begin_update(manifest)

    async def load_bucket(self, *parcels: Parcel) -> None:
        """Load a bucket. ``parcels``: one, or that of each part of a tensor-parallel engine."""
        announced = [parcel for parcel in parcels if isinstance(parcel, Announced)]
        if self._tensor_parallel and announced:
            self._in_parts = True
            await self._engine.load_in_parts(announced)
            return
        # The transfer blocks, so it runs on a thread: the engine keeps answering.
        await self._engine.load_bucket(await asyncio.to_thread(self._inbox.open, parcels[0]))

    async def finish_update(self) -> str:
        """Finish the update and return the checksum of the received bytes."""
        checksum = await self._engine.checksum_of_parts() if self._in_parts else self._inbox.checksum()
        await self._engine.finish_update()
        return checksum

    async def drop_weights(self) -> None:
        await self._engine.drop_weights()

    async def sleep(self, *, keep_weights: bool) -> Released:
        return await self._engine.sleep(keep_weights=keep_weights)

    async def wake(self) -> None:
        await self._engine.wake()

    async def take_peak(self) -> int:
        """Peak resident memory of this engine and its processes since the last call, in bytes.

        On a GPU this is host memory only: GPU memory is fixed by --vllm_gpu_memory_utilization.
        """
        return self._memory.take()

    async def memory_bytes(self) -> int:
        """The highest ``take_peak`` so far, in bytes."""
        return self._memory.highest

    async def shutdown(self) -> None:
        await self._engine.shutdown()

    def stop(self) -> None:
        """Stop the engine after its current step."""
        self._engine.stop()


Revive = Callable[[int, WorkerDied, int], Awaitable[bool]]


class EnginePool:
    """Dispatches each request to the engine with the fewest unfinished requests, and heals engines.

    An engine that has died, failed or hung is left out at once, and restarted by ``revive``. A request is a pure function of
    prompt, sampling and seed, so its unfinished ones are repeated on another engine, or on the same one when it is back.

    ``revive``: restarts an engine of this index, after this death with so many unfinished requests. Returns whether it has the
    present weights. None: a death is an error.
    ``version``: of the weights that actor and engines have; None from where the actor trains until the next update has arrived.
    """

    def __init__(self, workers: Workers[EngineWorker], revive: Revive | None = None) -> None:
        self.workers, self._revive = workers, revive
        self.version: int | None = None
        self.probed: Sample | None = None
        """The text of the last comparison with the trainer."""
        self._unfinished = [0] * len(workers)
        # Seconds in which each had an unfinished request, and when that was counted.
        self._busy, self._counted = [0.0] * len(workers), [time.perf_counter()] * len(workers)
        self._since = time.perf_counter()
        self._lives = [0] * len(workers)
        # Restarts that go on or have failed, engines that are back without weights, and the event of the next change of these.
        self._restarts = dict[int, asyncio.Task[None]]()
        self._unfit, self._news = set[int](), asyncio.Event()
        self._watches = list[asyncio.Task[None]]()
        self._deadline = 0.0

    async def generate(self, prompt_tokens: Sequence[int], sampling: Sampling) -> Generation:
        """Generate on the least loaded engine; again elsewhere if it is lost. Waits if there is none."""
        while True:
            while not (serving := set(range(len(self.workers))) - self._restarts.keys() - self._unfit):
                await self._change()
            index = min(serving, key=self._unfinished.__getitem__)
            life = self._lives[index]
            self._count(index, 1, time.perf_counter())
            try:
                return await self.workers.call(index, EngineWorker.generate, prompt_tokens, sampling)
            except WorkerDied as died:
                self._leave_out(index, life, died)
            except WorkerError:
                # It may be the fault of the request; if not, the engine does not answer any more.
                if await self._answers(index, life):
                    raise
            finally:
                self._count(index, -1, time.perf_counter())

    def take_idle_share(self) -> float:
        """The share of the time since the last call in which an engine had nothing to generate, mean over the engines."""
        now = time.perf_counter()  # one moment for all: an engine cannot be busy for longer than there was time
        for index in range(len(self._busy)):
            self._count(index, 0, now)
        seconds, busy = now - self._since, self._busy
        self._busy, self._since = [0.0] * len(busy), now
        return max(0.0, 1 - sum(busy) / max(seconds * len(busy), 1e-9))

    def _count(self, index: int, more: int, now: float) -> None:
        self._busy[index] += (now - self._counted[index]) * (self._unfinished[index] > 0)
        self._counted[index], self._unfinished[index] = now, self._unfinished[index] + more

    async def on_all(
        self,
        method: Callable[Concatenate[EngineWorker, P], Coroutine[object, object, T]],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> list[T]:
        """The results of the same call on every engine, in order. One that dies is restarted and called again."""

        async def one(index: int) -> T:
            while True:
                while index in self._restarts:
                    await self._change()
                life = self._lives[index]
                try:
                    return await self.workers.call(index, method, *arguments, **named)
                except WorkerDied as died:
                    self._leave_out(index, life, died)

        return await all_or_none(one(index) for index in range(len(self.workers)))

    async def expire(self, *, drop: bool) -> None:
        """The actor is about to train: what the engines hold will be out of date. ``drop``: they do not generate meanwhile."""
        self.version = None
        if drop:
            await self.on_all(EngineWorker.drop_weights)
        else:
            await self.settled()  # no engine may be getting weights while they change

    def arrived(self, version: int) -> None:
        """Every engine has got the weights of ``version``."""
        self.version = version
        self._unfit.clear()
        self._tell()

    async def settled(self) -> None:
        """Wait for all restarts. Raises the error of one that failed."""
        while self._restarts:
            await self._change()

    async def any_lost(self) -> bool:
        """Whether an engine is left out or does not answer."""
        present = [index for index in range(len(self.workers)) if index not in self._restarts]
        answers = await asyncio.gather(*(self._answers(index, self._lives[index]) for index in present))
        return not all(answers) or bool(self._restarts)

    def watch(self, deadline: float) -> None:
        """Look at every engine from now on; one that does not answer in ``deadline`` seconds has died."""
        self._deadline = deadline
        self._watches = [asyncio.create_task(self._watch(index)) for index in range(len(self.workers))]

    def close(self) -> None:
        """Look at no engine any more and restart none."""
        for task in [*self._watches, *self._restarts.values()]:
            if not task.cancel() and not task.cancelled():
                task.exception()  # whoever waited for it has raised it
        self._revive = None

    async def _watch(self, index: int) -> None:
        while True:
            await asyncio.sleep(min(60.0, self._deadline / 4))
            if index not in self._restarts:
                await self._answers(index, self._lives[index])

    async def _answers(self, index: int, life: int) -> bool:
        """Whether an engine comes to the end of a step within the deadline. If not, it is left out."""
        try:
            beat: Coroutine[object, object, None] = self.workers.call(index, EngineWorker.beat)
            await asyncio.wait_for(beat, self._deadline)
        except TimeoutError:
            late = WorkerDied(f"engine {index}", f"has not answered for {self._deadline:g} s (--engine_timeout)")
            self._leave_out(index, life, late)
        except WorkerDied as died:
            self._leave_out(index, life, died)
        except WorkerError as error:
            self._leave_out(index, life, WorkerDied(f"engine {index}", f"is broken: {error}"))
        else:
            return True
        return False

    def _leave_out(self, index: int, life: int, died: WorkerDied) -> None:
        """Begin the restart of an engine, unless that life of it is over already. Raises ``died`` if nothing is healed."""
        if self._revive is None:
            raise died
        if self._lives[index] == life and index not in self._restarts:
            restart = self._restart(self._revive(index, died, self._unfinished[index]), index)
            self._restarts[index] = asyncio.create_task(restart)

    async def _restart(self, revived: Awaitable[bool], index: int) -> None:
        try:
            if not await revived:
                self._unfit.add(index)
            self._lives[index] += 1
            del self._restarts[index]
        finally:
            self._tell()

    async def _change(self) -> None:
        """Wait until an engine is back, or has its weights. Raises the error of a restart that failed."""
        for restart in self._restarts.values():
            if restart.done():
                restart.result()
        await self._news.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def synchronize() -> None:
    """Wait for all work that any thread of this process has queued on the accelerator."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
