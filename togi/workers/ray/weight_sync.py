"""Send the actor's weights, or only a LoRA adapter, to every engine in large buckets, by a carrier of ``togi.plan.placement``.

Order: all engines agree to the manifest; buckets flow; all engines confirm that everything arrived; the checksums of every rank of
the actor and every engine are compared. The gather of a bucket overlaps sending and loading of the one before; each bucket is its
own buffer, because engines keep references. The whole update has a deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass

from togi.config.rl import RLConfig
from togi.errors import WeightSyncError
from togi.plan.placement import Carrier, Route, choose
from togi.rollout.collect import all_or_none
from togi.weights.buckets import Manifest
from togi.weights.carriers import Rendezvous
from togi.workers.model_worker import LearnerWorker
from togi.workers.protocol import Method, SyncReport, T, call_all
from togi.workers.ray.cluster import EngineActor, LearnerActor, RayWorkers, result_of


@dataclass(slots=True)
class _Progress:
    """How many tensors the actor has sent and each engine has loaded; -1 before an engine has agreed to the update, one more than
    all when it has finished.
    """

    engines: dict[int, int]
    total: int = 0
    sent: int = 0

    def describe(self) -> str:
        """Who is behind, for the message of a timeout."""
        if self.total == 0:
            return "the actor has not begun"
        behind = min(self.engines.values())
        if behind == self.sent < self.total:
            return f"the actor has sent {self.sent} of {self.total} tensors"
        names = ", ".join(f"engine {index}" for index, tensors in self.engines.items() if tensors == behind)
        if behind == self.total:
            return f"{names} did not finish the update"
        return f"{names} confirmed {max(0, behind)} of {self.total} tensors"


class WeightSync:
    """The transport from an actor to its engines. Create it with ``open``."""

    def __init__(
        self,
        actor: RayWorkers[LearnerActor],
        engines: RayWorkers[EngineActor],
        route: Route,
        timeout: float,
        parts: int = 1,
    ) -> None:
        """``parts``: of a tensor-parallel engine."""
        self.route, self._actor, self._engines, self._timeout = route, actor, engines, timeout
        self._parts = parts
        self.connected: tuple[int, ...] = ()
        """The engines that are in the group of a carrier that is one."""

    @classmethod
    async def open(
        cls, actor: RayWorkers[LearnerActor], engines: RayWorkers[EngineActor], config: RLConfig
    ) -> WeightSync:
        """Choose the carrier by where the processes are, and connect them. A replay has no engines."""
        if len(engines) == 0:
            return cls(actor, engines, Route(Carrier.HOST), config.weight_sync_timeout)
        nodes = {await actor.call(0, LearnerActor.node), *await call_all(engines, EngineActor.node)}
        on_gpu = await actor.call(0, LearnerWorker.device_type) == "cuda"
        route = choose(config, on_gpu=on_gpu, one_host=len(nodes) == 1)
        sync = cls(actor, engines, route, config.weight_sync_timeout, config.vllm_tensor_parallel_size)
        await sync.connect(range(len(engines)))
        return sync

    async def connect(self, members: Sequence[int]) -> None:
        """Join actor and engines ``members`` in a group if the carrier needs one, in the place of an earlier one."""
        carrier = self.route.carrier
        first: Rendezvous | None = None
        joins: list[Coroutine[object, object, None]] = []
        # Rank 0 of the actor is rank 0 of the group; the engines follow, or all parts of each engine.
        if carrier.is_group:
            address, port = await self._actor.call(0, LearnerActor.open_meeting)
            size = 1 + len(members) * self._parts
            first, *others = (Rendezvous(rank, size, address, port, self._timeout) for rank in range(size))
            joins += [
                self._engines.call(engine, EngineActor.join_channel, self._of_engine(others, place), carrier)
                for place, engine in enumerate(members)
            ]
        for rank in range(len(self._actor)):
            joins.append(self._actor.call(rank, LearnerActor.prepare_export, carrier, None if rank > 0 else first))
        # Joining blocks until all are there, so both sides wait together.
        await all_or_none(joins)
        self.connected = tuple(members)

    async def send(self, version: int, only: int | None = None) -> SyncReport:
        """Send the actor's current weights to every engine, or to one ``only``, as ``version``.

        Raises WeightSyncError if an engine refuses (the message names the tensors that differ), if an engine has
        received other bytes than were sent, or if the deadline passes (the message names who is behind).
        """
        engines = tuple(range(len(self._engines))) if only is None else (only,)
        start, progress = time.perf_counter(), _Progress(dict.fromkeys(engines, -1))
        try:
            if self.route.carrier.is_group and self.connected != engines:
                await self.connect(engines)
            manifest, checksum = await asyncio.wait_for(self._send(version, progress), self._timeout)
        except TimeoutError:
            raise WeightSyncError(
                f"The weights of version {version} did not reach all engines within --weight_sync_timeout "
                f"{self._timeout:.0f} s: {progress.describe()}."
            ) from None
        return SyncReport(version, manifest.nbytes, time.perf_counter() - start, checksum)

    async def _send(self, version: int, progress: _Progress) -> tuple[Manifest, str]:
        # Stage 1: every engine agrees to names, shapes and types.
        manifest = (await call_all(self._actor, LearnerActor.begin_export, version))[0]
        progress.total = len(manifest.tensors)
        await self._confirmed(progress, 1, EngineActor.begin_update, [[manifest]] * len(progress.engines))
        # Stage 2: buckets. The next one is gathered while the engines load the last; more would only take memory.
        loading: list[asyncio.Future[None]] = []
        try:
            while progress.sent < len(manifest.tensors):
                # Two return values: the count comes to the driver, the parcel goes from worker to worker.
                refs = [rank.next_bucket.options(num_returns=2).remote() for rank in self._actor.handles]
                counts: list[int] = await all_or_none(result_of(ref[0], f"actor {i}") for i, ref in enumerate(refs))
                if loading:
                    await loading.pop()
                progress.sent += counts[0]
                # Each engine gets the parcels of the ranks on its GPUs, or the one that rank 0 sends to all.
                own = [ref[1] for ref in refs]
                by_rank = self.route.carrier is Carrier.IPC
                parcels = [self._of_engine(own, i) if by_rank else own[:1] for i in progress.engines]
                load = self._confirmed(progress, counts[0], EngineActor.load_bucket, parcels)
                loading.append(asyncio.ensure_future(load))
            for last in loading:
                await last
        finally:
            for unfinished in loading:
                unfinished.cancel()
        # Stage 3: everything arrived, and it is the same everywhere.
        sent = await call_all(self._actor, LearnerActor.end_export)
        got = await all_or_none(self._finished(progress, engine) for engine in progress.engines)
        return manifest, agreed_checksum(sent, dict(zip(progress.engines, got, strict=True)))

    async def _finished(self, progress: _Progress, engine: int) -> str:
        checksum: str = await self._engines.call(engine, EngineActor.finish_update)
        progress.engines[engine] += 1
        return checksum

    async def _confirmed(
        self,
        progress: _Progress,
        tensors: int,
        method: Method[EngineActor, ..., None],
        arguments: Sequence[Sequence[T]],
    ) -> None:
        """Call ``method`` on each engine of an update with its arguments. One that has answered has confirmed ``tensors`` more."""

        async def one(engine: int, own: Sequence[T]) -> None:
            await self._engines.call(engine, method, *own)
            progress.engines[engine] += tensors

        await all_or_none(one(engine, own) for engine, own in zip(progress.engines, arguments, strict=True))

    def _of_engine(self, of_parts: Sequence[T], place: int) -> Sequence[T]:
        """What belongs to the parts of the engine at ``place``, from what belongs to the parts of all."""
        return of_parts[place * self._parts : (place + 1) * self._parts]


def agreed_checksum(sent: Sequence[str], got: Mapping[int, str]) -> str:
    """The common checksum. Raises WeightSyncError naming the ranks and engines that differ from the actor's rank 0."""
    others = [f"actor {rank}" for rank, checksum in enumerate(sent) if checksum != sent[0]]
    others += [f"engine {index}" for index, checksum in got.items() if checksum != sent[0]]
    if others:
        raise WeightSyncError(
            f"After the weight update {', '.join(others)} and actor 0 have different weights: their checksums differ."
        )
    return sent[0]
