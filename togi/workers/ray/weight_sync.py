"""Send the actor's weights, or only a LoRA adapter, to every engine in large buckets, by a carrier of ``togi.plan.placement``.

Order: all engines agree to the manifest; buckets flow; all engines confirm that everything arrived; the checksums of every rank of
the actor and every engine are compared. The gather of a bucket overlaps sending and loading of the one before; each bucket is its
own buffer, because engines keep references. The whole update has a deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import ObjectRef

from togi.config.rl import RLConfig
from togi.errors import WeightSyncError
from togi.plan.placement import Carrier, Route, choose
from togi.weights.buckets import Manifest
from togi.weights.carriers import Rendezvous
from togi.workers.model_worker import LearnerWorker
from togi.workers.protocol import SyncReport
from togi.workers.ray.actors import EngineActor, LearnerActor
from togi.workers.ray.cluster import RayWorkers, results_of


@dataclass(slots=True)
class _Progress:
    """How many tensors the actor has sent and each engine has loaded; -1 before an engine has agreed to the update."""

    engines: list[int]
    total: int = 0
    sent: int = 0

    def add(self, engine: int, tensors: int) -> None:
        self.engines[engine] += tensors

    def describe(self) -> str:
        """Who is behind, for the message of a timeout."""
        if self.total == 0:
            return "the actor has not begun"
        behind = min(self.engines)
        if behind == self.sent < self.total:
            return f"the actor has sent {self.sent} of {self.total} tensors"
        names = ", ".join(f"engine {index}" for index, tensors in enumerate(self.engines) if tensors == behind)
        return f"{names} confirmed {max(0, behind)} of {self.total} tensors"


class WeightSync:
    """The transport from an actor to its engines. Create it with ``open``."""

    def __init__(
        self, actor: RayWorkers[LearnerActor], engines: RayWorkers[EngineActor], route: Route, timeout: float
    ) -> None:
        self.route = route
        self._actor, self._engines, self._timeout = actor, engines, timeout

    @classmethod
    async def open(
        cls, actor: RayWorkers[LearnerActor], engines: RayWorkers[EngineActor], config: RLConfig
    ) -> WeightSync:
        """Choose the carrier by where the processes are, and connect them. A replay has no engines."""
        if not engines.handles:
            return cls(actor, engines, Route(Carrier.HOST), config.weight_sync_timeout)
        nodes = set(await results_of([engine.node.remote() for engine in engines.handles], "engine"))
        nodes.add(await actor.call(0, LearnerActor.node))
        on_gpu = await actor.call(0, LearnerWorker.device_type) == "cuda"
        sync = cls(actor, engines, choose(config, on_gpu=on_gpu, one_host=len(nodes) == 1), config.weight_sync_timeout)
        await sync.connect()
        return sync

    async def connect(self) -> None:
        """Join actor and engines in a group if the carrier needs one."""
        carrier, first, workers = self.route.carrier, self._actor.handles[0], self._engines.handles
        meetings: list[Rendezvous | None] = [None] * len(self._actor)
        joins: list[ObjectRef] = []
        # Rank 0 of the actor is rank 0 of the group; the engines follow.
        if carrier.is_group:
            ((address, port),) = await results_of([first.open_channel.remote()], "actor")
            size = 1 + len(workers)
            meetings[0] = Rendezvous(0, size, address, port, self._timeout)
            joins = [
                worker.join_channel.remote(Rendezvous(1 + index, size, address, port, self._timeout), carrier)
                for index, worker in enumerate(workers)
            ]
        ready = [
            worker.prepare_export.remote(carrier, meeting)
            for worker, meeting in zip(self._actor.handles, meetings, strict=True)
        ]
        # Joining blocks until all are there, so both sides wait together.
        await asyncio.gather(results_of(ready, "actor"), results_of(joins, "engine"))

    async def send(self, version: int) -> SyncReport:
        """Send the actor's current weights to every engine as ``version``.

        Raises WeightSyncError if an engine refuses (the message names the tensors that differ), if an engine has
        received other bytes than were sent, or if the deadline passes (the message names who is behind).
        """
        start, progress = time.perf_counter(), _Progress([-1] * len(self._engines))
        try:
            manifest, checksum = await asyncio.wait_for(self._send(version, progress), self._timeout)
        except TimeoutError:
            raise WeightSyncError(
                f"The weights of version {version} did not reach all engines within --weight_sync_timeout "
                f"{self._timeout:.0f} s: {progress.describe()}."
            ) from None
        return SyncReport(version, manifest.nbytes, time.perf_counter() - start, checksum)

    async def _send(self, version: int, progress: _Progress) -> tuple[Manifest, str]:
        engines = self._engines.handles
        # Stage 1: every engine agrees to names, shapes and types.
        manifests: list[Manifest] = await self._ask_actor("begin_export", version)
        manifest = manifests[0]
        progress.total = len(manifest.tensors)
        agreed = [worker.begin_update.remote(manifest) for worker in engines]
        await results_of(agreed, "engine", lambda engine: progress.add(engine, 1))
        # Stage 2: buckets. The next one is gathered while the engines load the last; more would only take memory.
        loading: list[asyncio.Future[list[None]]] = []
        try:
            while progress.sent < len(manifest.tensors):
                # Two return values: the count comes to the driver, the parcel goes from worker to worker.
                refs = [rank.next_bucket.options(num_returns=2).remote() for rank in self._actor.handles]
                counts: list[int] = await results_of([ref[0] for ref in refs], "actor")
                if loading:
                    await loading.pop()
                progress.sent += counts[0]
                loading.append(asyncio.ensure_future(self._load([ref[1] for ref in refs], counts[0], progress)))
            for last in loading:
                await last
        finally:
            for unfinished in loading:
                unfinished.cancel()
        # Stage 3: everything arrived, and it is the same everywhere.
        sent: list[str] = await self._ask_actor("end_export")
        got: list[str] = await results_of([worker.finish_update.remote() for worker in engines], "engine")
        return manifest, agreed_checksum(sent, got)

    async def _ask_actor(self, method: str, *arguments: object) -> list[Any]:
        return await results_of([getattr(rank, method).remote(*arguments) for rank in self._actor.handles], "actor")

    async def _load(self, parcels: Sequence[ObjectRef], count: int, progress: _Progress) -> list[None]:
        """Pass each engine its parcel: that of the rank on its GPU, or the one that rank 0 sends to all."""
        own = self.route.carrier is Carrier.IPC
        loads = [
            worker.load_bucket.remote(parcels[index if own else 0])
            for index, worker in enumerate(self._engines.handles)
        ]
        return await results_of(loads, "engine", lambda engine: progress.add(engine, count))


def agreed_checksum(sent: Sequence[str], got: Sequence[str]) -> str:
    """The common checksum. Raises WeightSyncError naming the ranks and engines that differ from the actor's rank 0."""
    others = [f"actor {rank}" for rank, checksum in enumerate(sent) if checksum != sent[0]]
    others += [f"engine {index}" for index, checksum in enumerate(got) if checksum != sent[0]]
    if others:
        raise WeightSyncError(
            f"After the weight update {', '.join(others)} and actor 0 have different weights: their checksums differ."
        )
    return sent[0]
