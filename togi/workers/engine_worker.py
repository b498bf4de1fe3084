"""A generation engine as a worker, and the pool of engines that a run uses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from togi.config.choices import EngineName
from togi.device import default_device
from togi.plan.machine import PeakMemory, Released
from togi.plan.placement import Carrier
from togi.rollout import create_engine
from togi.rollout.engine import EngineSettings, RolloutEngine
from togi.sample import Generation, Sampling
from togi.weights.buckets import Manifest
from togi.weights.carriers import Announced, Channel, Inbox, Parcel, Rendezvous
from togi.weights.files import local_folder
from togi.workers.protocol import Workers


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


def synchronize() -> None:
    """Wait for all work that any thread of this process has queued on the accelerator."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class EnginePool:
    """Dispatches each request to the engine with the fewest unfinished requests."""

    def __init__(self, workers: Workers[EngineWorker]) -> None:
        self.workers = workers
        self._unfinished = [0] * len(workers)

    async def generate(self, prompt_tokens: Sequence[int], sampling: Sampling) -> Generation:
        """Generate on the least loaded engine."""
        index = min(range(len(self.workers)), key=self._unfinished.__getitem__)
        self._unfinished[index] += 1
        try:
            return await self.workers.call(index, EngineWorker.generate, prompt_tokens, sampling)
        finally:
            self._unfinished[index] -= 1
