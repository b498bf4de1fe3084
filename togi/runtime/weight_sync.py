"""Sending the actor's weights to every engine, through host memory, in large buckets.

Order: all engines agree to the manifest, buckets flow (the gather of the next overlaps the loading of the last), all engines
confirm that everything arrived. Each bucket is put once and read by every engine without a copy. The whole has a deadline.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from togi.errors import WeightSyncError
from togi.model.weights import Manifest
from togi.runtime.calls import results_of
from togi.runtime.engine_worker import EnginePool
from togi.runtime.worker_group import WorkerGroup


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One weight update: bytes sent to each engine and seconds from the first call to the last confirmation."""

    version: int
    nbytes: int
    seconds: float

    @property
    def gb_per_second(self) -> float:
        return self.nbytes / 1e9 / self.seconds


async def sync_weights(actor: WorkerGroup, engines: EnginePool, version: int, timeout: float) -> SyncReport:
    """Give every engine the actor's present weights as ``version``.

    Raises WeightSyncError when an engine refuses (the message names the tensors that differ) or the deadline passes.
    """
    start = time.perf_counter()
    try:
        manifest = await asyncio.wait_for(_send(actor, engines, version), timeout)
    except TimeoutError:
        raise WeightSyncError(
            f"The weights of version {version} did not reach all engines within --weight_sync_timeout {timeout:.0f} s."
        ) from None
    return SyncReport(version, manifest.nbytes, time.perf_counter() - start)


async def _send(actor: WorkerGroup, engines: EnginePool, version: int) -> Manifest:
    manifests: list[Manifest] = await actor.call_all("begin_export", version)
    manifest = manifests[0]
    await results_of([worker.begin_update.remote(manifest) for worker in engines.workers], "engine")
    loading: list[asyncio.Future[list[None]]] = []
    sent = 0
    while sent < len(manifest.tensors):
        refs = actor.start_all("next_bucket", returns=2)
        counts: list[int] = await results_of([ref[0] for ref in refs], "actor")
        sent += counts[0]
        if loading:
            await loading.pop()
        bucket = refs[0][1]
        loads = [worker.load_bucket.remote(bucket) for worker in engines.workers]
        loading.append(asyncio.ensure_future(results_of(loads, "engine")))
    for last in loading:
        await last
    await results_of([worker.finish_update.remote() for worker in engines.workers], "engine")
    return manifest
