"""Ray: connect, place groups of slots, and start one worker process per role and slot.

Only this module asks Ray for resources. The arithmetic was checked before (``togi.plan.placement``); here it is checked against
what the cluster really has, so that nothing waits for a GPU that does not exist. GPUs that are only declared
(``ray start --num-gpus 8`` on a machine without any) count as slots, whose processes compute on the CPU.

The first failure of a worker is raised as an error that names the worker, without Ray's wrapping. At the end: the workers as Ray
actors, with what an object needs when it runs in its own process.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import ray
from ray import ObjectRef
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from togi.config.choices import EngineName
from togi.config.rl import RLConfig
from togi.errors import ConfigError, RunError, UserError, WorkerDied, WorkerError
from togi.parallel.process import CUBLAS, be_deterministic, open_store
from togi.plan import placement
from togi.plan.machine import Machine, joins_cluster
from togi.plan.placement import Group, Role
from togi.rollout.engine import EngineSettings
from togi.weights.carriers import Rendezvous
from togi.workers.engine_worker import EngineWorker
from togi.workers.model_worker import LearnerWorker, ModelWorker, ScorerWorker
from togi.workers.protocol import Health, Method, P, T, W, W_co


class RayWorkers(Generic[W_co]):
    """``Workers`` in their own processes. ``who``: their name in errors. ``spawn``: starts the process of an index."""

    def __init__(self, who: str, count: int, spawn: Callable[[int], ActorHandle], health: Health) -> None:
        self.who, self._spawn, self._health = who, spawn, health
        self.handles = [spawn(index) for index in range(count)]
        self.processes: dict[int, tuple[str, int]] = {}
        """Node and process id of each worker that ``watch`` was called for."""

    def __len__(self) -> int:
        return len(self.handles)

    async def call(self, index: int, method: Method[W_co, P, T], *arguments: P.args, **named: P.kwargs) -> T:
        # Ray looks remote methods up by name.
        remote, who = getattr(self.handles[index], method.__name__).remote, f"{self.who} {index}"
        with self._health.calling(who, method.__name__):
            result: T = await result_of(remote(*arguments, **named), who)
        return result

    async def watch(self, index: int) -> None:
        """Learn where a worker runs, and let it write its stacks when it is asked to."""
        self.processes[index] = await result_of(
            self.handles[index].watch.remote(self._health.stacks, f"{self.who}{index}"), f"{self.who} {index}"
        )

    def respawn(self, index: int) -> None:
        """Start a worker's process anew, in the same slot. What is left of the old one is killed."""
        ray.kill(self.handles[index])
        node, process = self.processes.pop(index, ("", 0))
        if node == this_node():  # Ray asks the process to end, and one that hangs does not hear it
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.handles[index] = self._spawn(index)


async def result_of(ref: ObjectRef, who: str) -> Any:
    """The result of one remote call. Raises the user's own error unchanged, anything else as WorkerError."""
    try:
        return await ref
    except RayTaskError as error:
        if isinstance(error.cause, UserError | RunError):
            raise error.cause from None
        raise WorkerError(f"{who} failed: {error.cause!r}\n{error}") from None
    except OutOfMemoryError:
        raise WorkerDied(
            who,
            "was ended because the machine ran out of memory: lower --max_tokens_per_gpu, or add --gradient_checkpointing.",
        ) from None
    except RayActorError as error:
        raise died(who, str(error)) from None


def died(who: str, text: str) -> WorkerDied:
    """The death of a worker in a few words, with the last lines of its log. ``text``: Ray's, with the process and a reason."""
    pid, detail = re.search(r"pid: (\d+)", text), re.search(r"exit detail: (.*)", text)
    reason = " ".join((detail[1] if detail else text).split()).partition(". ")[0].rstrip(".")
    if "connection error code 2" in reason:  # all that Ray knows of a process that is gone
        reason = "its process was killed (by hand or by the system, for want of memory) or crashed"
    name = f"died (process {pid[1]}): " if pid else "died: "
    return WorkerDied(who, name + reason, last_lines(int(pid[1])) if pid else ())


def last_lines(pid: int) -> tuple[str, ...]:
    """The end of the log of a worker process on this node."""
    context = ray.get_runtime_context()
    logs = Path(context.get_temp_dir()) / context.get_session_name() / "logs"
    found = list[str]()
    for path in sorted(logs.glob(f"worker-*-{pid}.*")):
        with suppress(OSError):
            found += path.read_text(encoding="utf-8", errors="replace").splitlines()
    # Ray's own lines for its reader begin with a colon.
    return tuple(line for line in found if line.strip() and not line.startswith(":"))[-LOG_LINES:]


logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  where Linux has it
# A slot is a GPU, or a process that computes only in its own phase. CPU is bookkeeping and must never block a placement.
CPU_PER_SLOT = 0.01
SHARES_OF_ONE = 10_000
"""The resolution with which Ray divides a resource."""
PLACEMENT_TIMEOUT_S = 120.0
SLOW_START = "timed out during startup"  # part of Ray's message
RELEASE_TIMEOUT_S = 10.0
"""A job that has just ended may still be releasing its GPUs."""
NODE_LABEL = "ray.io/node-id"
MEETING_TIMEOUT_S = 300.0
LOG_LINES = 20
STACKS_SIGNAL = signal.SIGUSR2
"""What lets a worker process write the stacks of its threads."""
_KEPT: list[object] = []
"""The stores and files that this process has opened, which last as long as it does."""


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources of the connected cluster. ``cpus``: of this node, for thread counts. ``gpus_of_nodes``: nodes with GPUs."""

    cpus: int
    gpus_of_nodes: tuple[int, ...]

    @property
    def gpus(self) -> int:
        return sum(self.gpus_of_nodes)


def connect(config: RLConfig, machine: Machine) -> Resources:
    """Join the cluster of RAY_ADDRESS (set by ``ray job submit``), or start a private one on this machine.

    Raises ConfigError if the cluster does not answer.
    """
    if not joins_cluster():
        # By default Ray gives its workers a lower priority than every other process of the machine.
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # By default Ray starts an idle process per core; no role can use them, as each needs its own environment.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        shared = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
        _start(machine, placement.object_store_bytes(config, machine.memory_bytes, shared))
    else:
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            # A common cause is the token: a head with a token file demands one, and a client that names an address sends none.
            raise ConfigError(
                f"Ray at RAY_ADDRESS {os.environ['RAY_ADDRESS']} does not answer: start it, or set RAY_AUTH_MODE=token here "
                "too if it was started with a token (as it is, unasked, where ~/.ray/auth_token exists)."
            ) from error
    gpus = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    return Resources(machine.cpus, tuple(number for number in gpus if number > 0))


def _start(machine: Machine, store_bytes: int) -> None:
    """Start a private cluster with an object store of ``store_bytes``. Raises RunError.

    Retried once: Ray's limit of 30 s is too short on a very busy machine.
    """
    for is_last in (False, True):
        try:
            ray.init(
                address="local",
                num_cpus=machine.cpus,
                num_gpus=machine.gpus,
                object_store_memory=store_bytes,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",  # a private cluster listens on the loopback only
            )
            return
        except Exception as error:  # Ray raises a bare Exception
            if is_last or SLOW_START not in str(error):
                reason = " ".join(str(error).split()) or type(error).__name__
                raise RunError(
                    f"Ray cannot be started on this machine ({reason[:300]}): look at free memory, at room in /tmp and at the "
                    "limits of the shell (ulimit -a)."
                ) from error
            logger.warning("Ray did not start within its time, so it is started again: this machine is busy.")
            ray.shutdown()


class Cluster:
    """The placement groups of a run. ``overlaps``: engines and models compute at the same time."""

    def __init__(
        self, groups: tuple[Group, ...], resources: Resources, health: Health, *, overlaps: bool = False
    ) -> None:
        # The groups fit the cluster and what other jobs leave free.
        placement.check_fits(groups, resources.gpus)
        if resources.gpus > 0:
            placement.check_nodes(groups, resources.gpus_of_nodes)
            _check_free(sum(group.slots for group in groups), resources.gpus)
        self.resources, self.groups, self._health, self._overlaps = resources, groups, health, overlaps
        # Which node each slot should be on.
        nodes = _gpus_by_node()
        placement.check_spread(groups, len(nodes))
        pinned = placement.spread(groups, nodes)
        # Groups that need certain nodes are placed first; the others take what is left.
        order = sorted(range(len(groups)), key=lambda place: -groups[place].nodes)
        placed = {place: self._place(groups[place], pinned[place]) for place in order}
        self._placed = [placed[place] for place in range(len(groups))]
        self._bundles = [self._order(*pair) for pair in zip(self._placed, groups, strict=True)]

    def start(self, actor_class: type[W], role: Role, *, concurrency: int = 1, number: int = 0) -> RayWorkers[W]:
        """Start one worker process of ``actor_class`` in every slot of the role's group, or for every engine. Does not wait.

        Returns no workers if the run has no such role. ``number``: the index among several models of the role, which
        share one group or have one each.
        """
        remote: ActorClass = ray.remote(actor_class)
        found = [i for i, group in enumerate(self.groups) if role in group.roles]
        if not found:
            return RayWorkers(role, 0, remote.remote, self._health)
        index = found[min(number, len(found) - 1)]
        group, placed, bundles = self.groups[index], self._placed[index], self._bundles[index]
        threads = str(self.threads(group.slots))
        variables = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **CUBLAS}
        if self._overlaps:  # threads that wait must not spin on the cores that other processes need
            variables["OMP_WAIT_POLICY"] = "PASSIVE"
        # An engine takes several slots: its process starts in the first of them.
        step = group.engine_size // group.slots_per_bundle if role is Role.ENGINE else 1
        places = bundles[::step]

        def spawn(place: int) -> ActorHandle:
            return remote.options(
                num_cpus=_share(CPU_PER_SLOT, group),
                num_gpus=_share(1.0, group) if self.resources.gpus > 0 else 0,
                max_concurrency=concurrency,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placed, placement_group_bundle_index=places[place]
                ),
                runtime_env={"env_vars": variables},
            ).remote()

        return RayWorkers(role, len(places), spawn, self._health)

    def threads(self, slots: int) -> int:
        """CPU threads of one process of a role. Roles compute one after the other, so each may use all cores in turn."""
        return max(1, self.resources.cpus // slots)

    def describe_nodes(self) -> str:
        """The nodes of each group's slots, for example "actor 127.0.0.1 x 4, 127.0.0.2 x 4"; "" on a single node."""
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        if len(addresses) == 1:
            return ""
        lines = []
        for group, placed in zip(self.groups, self._placed, strict=True):
            counts = Counter(addresses[node] for node in placement_group_table(placed)["bundles_to_node_id"].values())
            lines.append(f"{', '.join(group.roles)} {', '.join(f'{node} x {n}' for node, n in sorted(counts.items()))}")
        return "; ".join(lines)

    def close(self) -> None:
        """Release the slots. Ends every worker in them."""
        for placed in self._placed:
            remove_placement_group(placed)

    def _place(self, group: Group, nodes: Sequence[str]) -> PlacementGroup:
        """Reserve the slots of a group. ``nodes``: the node of each slot; empty for any node. Raises ConfigError on timeout."""
        size = group.slots_per_bundle
        bundle = {"CPU": CPU_PER_SLOT * size}
        if self.resources.gpus > 0:
            bundle["GPU"] = size
        placed = placement_group(
            [bundle] * (group.slots // size),
            strategy="PACK",
            bundle_label_selector=[{NODE_LABEL: node} for node in nodes] or None,
        )
        try:
            ray.get(placed.ready(), timeout=PLACEMENT_TIMEOUT_S)
        except GetTimeoutError:
            remove_placement_group(placed)
            raise ConfigError(
                f"The cluster did not give {group.slots} slots for {', '.join(group.roles)} within {PLACEMENT_TIMEOUT_S:.0f} s: "
                "other jobs hold its resources, or its nodes have fewer CPUs or GPUs than one slot needs."
            ) from None
        return placed

    @staticmethod
    def _order(placed: PlacementGroup, group: Group) -> list[int]:
        """The bundles of a group in the order of its slots, grouped by node, so that an engine is on one node."""
        # A bundle per engine is on one node already.
        if group.slots_per_bundle == group.engine_size:
            return list(range(group.slots // group.engine_size))
        table = placement_group_table(placed)["bundles_to_node_id"]
        nodes = [table[bundle] for bundle in range(group.slots)]
        order = placement.node_order(nodes)
        if Role.ENGINE in group.roles:
            placement.check_whole(group.engine_size, [nodes[bundle] for bundle in order])
        return order


def _share(amount: float, group: Group) -> float:
    """Each role's share of a bundle with ``amount`` per slot, rounded down, because the shares must not add up to more."""
    share = amount * group.slots_per_bundle / len(group.roles)
    return math.floor(share * SHARES_OF_ONE + 1e-6) / SHARES_OF_ONE


def _check_free(needed: int, total: int) -> None:
    """Raise ConfigError if other jobs hold the GPUs that the placement needs."""
    deadline = time.monotonic() + RELEASE_TIMEOUT_S
    while (free := int(ray.available_resources().get("GPU", 0))) < needed:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"The placement needs {needed} GPUs, but of the cluster's {total} other jobs hold {total - free}: end them, or "
                "lower *_num_gpus_per_node or --vllm_num_engines."
            )
        time.sleep(0.5)


def _gpus_by_node() -> dict[str, int]:
    """The number of GPUs of every node, this node first."""
    here = this_node()
    alive = [node for node in ray.nodes() if node["Alive"]]
    alive.sort(key=lambda node: (node["NodeID"] != here, node["NodeManagerAddress"], node["NodeID"]))
    return {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in alive}


class Watched:
    """A worker in its own process."""

    def watch(self, stacks: Path | None, name: str) -> tuple[str, int]:
        """Write stacks into a file in the folder ``stacks`` at each ``STACKS_SIGNAL``. Returns node and process id."""
        if stacks is not None:
            stacks.mkdir(parents=True, exist_ok=True)
            file = (stacks / f"{name}.txt").open("a", encoding="utf-8")
            _KEPT.append(file)
            faulthandler.register(STACKS_SIGNAL, file=file)
        return this_node(), os.getpid()


class ModelActor(Watched, ModelWorker):
    """One rank of a model in its own process."""

    def open_meeting(self) -> tuple[str, int]:
        """Open a store where other processes meet this one, which is their rank 0. Returns its address and port."""
        address = ray.util.get_node_ip_address()
        store = open_store(address, MEETING_TIMEOUT_S)
        _KEPT.append(store)
        return address, store.port

    def gpus(self) -> tuple[str, ...]:
        """The GPUs that Ray gave this process."""
        return _own_gpus()

    def node(self) -> str:
        """The node of this process."""
        return this_node()

    def _join(self, meeting: Rendezvous, config: RLConfig, tensor_size: int = 1) -> None:
        # Before the first use of CUDA in this process.
        _see_only(_own_gpus())
        if config.full_determinism:
            be_deterministic()
        super()._join(meeting, config, tensor_size)


class LearnerActor(ModelActor, LearnerWorker):
    """One rank of a model in training."""


class ScorerActor(ModelActor, ScorerWorker):
    """One rank of a frozen model."""


class EngineActor(Watched, EngineWorker):
    """One engine in its own process."""

    async def start_on(self, name: EngineName, settings: EngineSettings, gpus: Sequence[str]) -> None:
        """Start the engine. ``gpus``: the GPUs that it may use, if they are not those that Ray gave this process."""
        _see_only(gpus or _own_gpus())
        await self.start(name, settings)

    async def node(self) -> str:
        """The node of this process."""
        return this_node()


def this_node() -> str:
    """The id of the node of this process."""
    return str(ray.get_runtime_context().get_node_id())


def _own_gpus() -> tuple[str, ...]:
    """The GPUs that Ray gave this worker, as CUDA_VISIBLE_DEVICES names them."""
    return tuple(ray.get_runtime_context().get_accelerator_ids().get("GPU", ()))


def _see_only(gpus: Sequence[str]) -> None:
    """Restrict torch to these GPUs, before its first use of one. Ray does so itself unless it is configured not to."""
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
