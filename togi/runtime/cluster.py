"""Ray: connecting, placing groups of slots, and starting one worker process per role and slot.

Here is the only place that asks Ray for resources. The arithmetic was checked before (``togi.plan.placement``); here it is
checked once more against what the cluster really has, so that nothing ever waits for a GPU that does not exist.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from togi.errors import ConfigError
from togi.plan.machine import Machine, joins_cluster
from togi.plan.placement import Group, Role, arithmetic, check_fits

OBJECT_STORE_BYTES = 1 << 30
# Without GPUs a slot is a process that computes only in its own phase, so CPU is bookkeeping and must never make one wait.
CPU_PER_SLOT_WITHOUT_GPU = 0.01
PLACEMENT_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Resources:
    """What the connected cluster has. ``cpus`` are those of this node, for thread counts."""

    cpus: int
    gpus: int


def connect(machine: Machine) -> Resources:
    """Join the cluster that RAY_ADDRESS names (set by ``ray job submit``), or start a private one on this machine."""
    if not joins_cluster():
        # Ray's own default makes workers give way to every other process of the machine.
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=machine.cpus,
            num_gpus=machine.gpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",  # a private cluster listens on the loopback only
        )
    else:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    return Resources(machine.cpus, int(ray.cluster_resources().get("GPU", 0)))


class Cluster:
    """The placed groups of a run."""

    def __init__(self, groups: tuple[Group, ...], resources: Resources) -> None:
        check_fits(groups, resources.gpus)
        self.resources = resources
        self.groups = groups
        self._placed = [self._place(group) for group in groups]

    def start(
        self, actor_class: type, role: Role, environment: Mapping[str, str], *, concurrency: int = 1, number: int = 0
    ) -> list[ActorHandle]:
        """One worker process of ``actor_class`` in every slot of the role's group; constructed without waiting.

        None where the run has no such role. ``number``: which of several models of that role; they share one group or have
        one each.
        """
        found = [i for i, group in enumerate(self.groups) if role in group.roles]
        if not found:
            return []
        index = found[min(number, len(found) - 1)]
        group, placed = self.groups[index], self._placed[index]
        remote: ActorClass = ray.remote(actor_class)
        cpu, gpu = self._slot()
        share = 1.0 / len(group.roles)
        threads = str(self.threads(group.slots))
        variables = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **environment}
        return [
            remote.options(
                num_cpus=cpu * share,
                num_gpus=gpu * share,
                max_concurrency=concurrency,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placed, placement_group_bundle_index=slot),
                runtime_env={"env_vars": variables},
            ).remote()
            for slot in range(group.slots)
        ]

    def threads(self, slots: int) -> int:
        """CPU threads of one process of a role: roles compute one after the other, so each may use all cores in turn."""
        return max(1, self.resources.cpus // slots)

    def describe(self) -> str:
        return arithmetic(self.groups, "GPUs" if self.resources.gpus > 0 else "worker processes")

    def close(self) -> None:
        """Give the slots back. Ends every worker in them."""
        for placed in self._placed:
            remove_placement_group(placed)

    def _slot(self) -> tuple[float, float]:
        return (1.0, 1.0) if self.resources.gpus > 0 else (CPU_PER_SLOT_WITHOUT_GPU, 0.0)

    def _place(self, group: Group) -> PlacementGroup:
        cpu, gpu = self._slot()
        bundle = {"CPU": cpu, "GPU": gpu} if gpu > 0 else {"CPU": cpu}
        placed = placement_group([bundle] * group.slots, strategy="PACK")
        try:
            ray.get(placed.ready(), timeout=PLACEMENT_TIMEOUT_S)
        except GetTimeoutError:
            remove_placement_group(placed)
            raise ConfigError(
                f"The cluster did not give {group.slots} slots for {', '.join(group.roles)} within {PLACEMENT_TIMEOUT_S:.0f} s: "
                "other jobs hold its resources, or its nodes have fewer CPUs or GPUs than one slot needs."
            ) from None
        return placed


def disconnect() -> None:
    """Leave the cluster, and end it if it was started here."""
    ray.shutdown()
