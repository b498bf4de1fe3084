"""A generation engine as a worker, and the pool of them that a run talks to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from togi.config.choices import EngineName
from togi.model.hub import local_folder
from togi.model.weights import Manifest
from togi.parallel.channel import Channel
from togi.parallel.process import Rendezvous, default_device
from togi.plan.carrier import Carrier
from togi.plan.memory import PeakMemory, Released
from togi.rollout.create import create_engine
from togi.rollout.engine import EngineSettings, RolloutEngine
from togi.rollout.tasks import all_or_none
from togi.sample import Generation, Sampling
from togi.workers.parcels import Inbox, Parcel
from togi.workers.protocol import Workers


class EngineWorker:
    """One engine. Every call is asynchronous, so one serves many requests at once."""

    def __init__(self) -> None:
        self._engine: RolloutEngine
        self._memory = PeakMemory()
        self._channels: list[Channel] = []

    async def start(self, name: EngineName, settings: EngineSettings) -> None:
        # Resolved here, on the node that runs the engine: a hub name is cached on each node by itself.
        self._engine = create_engine(name, replace(settings, model=local_folder(settings.model)))

    async def generate(self, prompt_tokens: Sequence[int], sampling: Sampling) -> Generation:
        return await self._engine.generate(prompt_tokens, sampling)

    async def score(self, tokens: Sequence[int]) -> list[float]:
        return await self._engine.score(tokens)

    async def routes(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        return await self._engine.routes(tokens)

    async def take_weights(self, manifest: Manifest, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """A whole update from tensors of this process, which must keep their values until the next one begins."""
        await self._engine.begin_update(manifest)
        synchronize()  # the engine's thread has streams of its own
        await self._engine.load_tensors(tensors)
        await self._engine.finish_update()
        synchronize()

    async def join_channel(self, meeting: Rendezvous, carrier: Carrier) -> None:
        """Meet the actor's first rank and the other engines, to get weights from it."""
        device = default_device() if carrier is Carrier.NCCL else torch.device("cpu")
        self._channels = [await asyncio.to_thread(Channel.join, meeting, device)]

    async def begin_update(self, manifest: Manifest) -> None:
        self._inbox = Inbox(self._channels)
        await self._engine.begin_update(manifest)

    async def load_bucket(self, parcel: Parcel) -> None:
        await self._engine.load_bucket(await asyncio.to_thread(self._inbox.open, parcel))

    async def finish_update(self) -> str:
        """The checksum of what has arrived."""
        await self._engine.finish_update()
        return self._inbox.checksum()

    async def sleep(self) -> Released:
        return await self._engine.sleep()

    async def wake(self) -> None:
        await self._engine.wake()

    async def take_peak(self) -> int:
        """The largest resident size of this engine, with its processes, since the last call.

        On a GPU that is host memory alone: of the GPU's the engine has what --vllm_gpu_memory_utilization says.
        """
        return self._memory.take()

    async def memory_bytes(self) -> int:
        """The largest that ``take_peak`` has seen."""
        return self._memory.highest

    async def shutdown(self) -> None:
        await self._engine.shutdown()

    def stop(self) -> None:
        """End the engine after the step that it is in."""
        self._engine.stop()


def synchronize() -> None:
    """Wait for what any thread of this process has begun on the accelerator."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class EnginePool:
    """Sends each request to the engine with the fewest unfinished ones."""

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

    async def score(self, tokens: Sequence[int]) -> list[list[float]]:
        """Log-probs of the same tokens from every engine."""
        return await all_or_none(self.workers.call(i, EngineWorker.score, tokens) for i in self._all)

    async def routes(self, tokens: Sequence[int]) -> list[NDArray[np.int64]]:
        """Where the same tokens go in every engine."""
        return await all_or_none(self.workers.call(i, EngineWorker.routes, tokens) for i in self._all)

    async def sleep(self) -> list[Released]:
        return await all_or_none(self.workers.call(i, EngineWorker.sleep) for i in self._all)

    async def wake(self) -> None:
        _: list[None] = await all_or_none(self.workers.call(i, EngineWorker.wake) for i in self._all)

    async def take_peaks(self) -> list[int]:
        return await all_or_none(self.workers.call(i, EngineWorker.take_peak) for i in self._all)

    async def memory_bytes(self) -> list[int]:
        return await all_or_none(self.workers.call(i, EngineWorker.memory_bytes) for i in self._all)

    async def shutdown(self) -> None:
        _: list[None] = await all_or_none(self.workers.call(i, EngineWorker.shutdown) for i in self._all)

    @property
    def _all(self) -> range:
        return range(len(self.workers))
