"""A generation engine in a Ray worker, and the pool of them that the driver talks to."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.actor import ActorHandle

from togi.config.choices import EngineName
from togi.model.hub import local_folder
from togi.model.weights import Manifest
from togi.parallel.channel import Channel
from togi.parallel.process import Rendezvous, default_device
from togi.plan.carrier import Carrier
from togi.plan.memory import PeakMemory, Released
from togi.rollout.create import create_engine
from togi.rollout.engine import EngineSettings, RolloutEngine
from togi.sample import Generation, Sampling
from togi.workers.parcels import Inbox, Parcel
from togi.workers.ray.calls import result_of, results_of
from togi.workers.ray.cluster import own_gpus, see_only

MAX_CONCURRENT_CALLS = 4096


class EngineWorker:
    """Remote methods of one engine. Every call is asynchronous, so one process serves many requests at once."""

    def __init__(self) -> None:
        self._engine: RolloutEngine
        self._memory = PeakMemory()
        self._channels: list[Channel] = []

    async def start(self, name: EngineName, settings: EngineSettings, gpus: Sequence[str]) -> None:
        """``gpus``: all that the engine may use, where they are not those that Ray gave this process."""
        see_only(gpus or own_gpus())
        # Resolved here, on the node that runs the engine: a hub name is cached on each node by itself.
        self._engine = create_engine(name, replace(settings, model=local_folder(settings.model)))

    async def generate(self, prompt_tokens: Sequence[int], sampling: Sampling) -> Generation:
        return await self._engine.generate(prompt_tokens, sampling)

    async def score(self, tokens: Sequence[int]) -> list[float]:
        return await self._engine.score(tokens)

    async def routes(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        return await self._engine.routes(tokens)

    async def node(self) -> str:
        """The node that this process is on."""
        return str(ray.get_runtime_context().get_node_id())

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


class EnginePool:
    """Sends each request to the engine with the fewest unfinished ones."""

    def __init__(self, workers: Sequence[ActorHandle]) -> None:
        self.workers = list(workers)
        self._unfinished = [0] * len(self.workers)

    async def start(self, name: EngineName, settings: Sequence[EngineSettings], gpus: Sequence[Sequence[str]]) -> None:
        """``settings`` and ``gpus`` of each engine; see ``EngineWorker.start``."""
        each = zip(self.workers, settings, gpus, strict=True)
        await results_of([worker.start.remote(name, *arguments) for worker, *arguments in each], "engine")

    async def generate(self, prompt_tokens: Sequence[int], sampling: Sampling) -> Generation:
        """Generate on the least loaded engine."""
        index = min(range(len(self.workers)), key=self._unfinished.__getitem__)
        self._unfinished[index] += 1
        try:
            ref = self.workers[index].generate.remote(prompt_tokens, sampling)
            generation: Generation = await result_of(ref, f"engine {index}")
        finally:
            self._unfinished[index] -= 1
        return generation

    async def score(self, tokens: Sequence[int]) -> list[list[float]]:
        """Log-probs of the same tokens from every engine."""
        return await results_of([worker.score.remote(tokens) for worker in self.workers], "engine")

    async def routes(self, tokens: Sequence[int]) -> list[NDArray[np.int64]]:
        """Where the same tokens go in every engine."""
        return await results_of([worker.routes.remote(tokens) for worker in self.workers], "engine")

    async def sleep(self) -> list[Released]:
        return await results_of([worker.sleep.remote() for worker in self.workers], "engine")

    async def wake(self) -> None:
        await results_of([worker.wake.remote() for worker in self.workers], "engine")

    async def take_peaks(self) -> list[int]:
        return await results_of([worker.take_peak.remote() for worker in self.workers], "engine")

    async def memory_bytes(self) -> list[int]:
        return await results_of([worker.memory_bytes.remote() for worker in self.workers], "engine")

    async def shutdown(self) -> None:
        await results_of([worker.shutdown.remote() for worker in self.workers], "engine")
