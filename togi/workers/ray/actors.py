"""Workers as Ray actors: what an object needs when it runs in its own process."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from togi.config.choices import EngineName
from togi.config.rl import RLConfig
from togi.parallel.process import be_deterministic, open_store
from togi.rollout.engine import EngineSettings
from togi.weights.carriers import Rendezvous
from togi.workers.engine_worker import EngineWorker
from togi.workers.model_worker import LearnerWorker, ModelWorker, ScorerWorker
from togi.workers.ray.cluster import own_gpus, see_only

MEETING_TIMEOUT_S = 300.0
_STORES: list[object] = []
"""The stores that this process has opened, which last as long as it does."""


class ModelActor(ModelWorker):
    """One rank of a model in its own process."""

    def open_meeting(self) -> tuple[str, int]:
        """Open a store where other processes meet this one, which is their rank 0. Returns its address and port."""
        address = ray.util.get_node_ip_address()
        store = open_store(address, MEETING_TIMEOUT_S)
        _STORES.append(store)
        return address, store.port

    def gpus(self) -> tuple[str, ...]:
        """The GPUs that Ray gave this process."""
        return own_gpus()

    def node(self) -> str:
        """The node of this process."""
        return this_node()

    def _join(self, meeting: Rendezvous, config: RLConfig, tensor_size: int = 1) -> None:
        # Before the first use of CUDA in this process.
        see_only(own_gpus())
        if config.full_determinism:
            be_deterministic()
        super()._join(meeting, config, tensor_size)


class LearnerActor(ModelActor, LearnerWorker):
    """One rank of a model in training."""


class ScorerActor(ModelActor, ScorerWorker):
    """One rank of a frozen model."""


class EngineActor(EngineWorker):
    """One engine in its own process."""

    async def start_on(self, name: EngineName, settings: EngineSettings, gpus: Sequence[str]) -> None:
        """Start the engine. ``gpus``: the GPUs that it may use, if they are not those that Ray gave this process."""
        see_only(gpus or own_gpus())
        await self.start(name, settings)

    async def node(self) -> str:
        """The node of this process."""
        return this_node()


def this_node() -> str:
    """The id of the node of this process."""
    return str(ray.get_runtime_context().get_node_id())
