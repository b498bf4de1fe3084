"""Where each part of a run computes, and how weights get from the actor to the engines.

Decided and printed before anything starts.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from togi.config.choices import BackendName, SyncBackend, WorkersKind
from togi.config.parse import Parsed, Source
from togi.config.rl import RLConfig
from togi.errors import ConfigError
from togi.plan.machine import Machine, joins_cluster


def check_workers(config: RLConfig, machine: Machine) -> None:
    """Raise ConfigError if --workers local is not possible. The counts in ``config`` are resolved."""
    needed = what_needs_ray(config, machine) if config.workers is WorkersKind.LOCAL else ""
    if needed:
        raise ConfigError(
            f"--workers local keeps everything in one process, but {needed} takes several: leave one of the two out."
        )


def what_needs_ray(config: RLConfig, machine: Machine) -> str:
    """The first setting that needs more than one process, as it is written; "" if none does."""
    # Counts first, then settings that work across processes only.
    sizes, roles = _sizes(config), dict.fromkeys(used_roles(config))
    # Sizes that are given come before the counts that follow from them.
    counts: dict[str, object] = {
        "ring_attn_size": config.ring_attn_size,
        "ds_tensor_parallel_size": config.ds_tensor_parallel_size,
        "fsdp_shard_size": config.fsdp_shard_size or 1,
        "vllm_num_engines": config.vllm_num_engines,
        "vllm_tensor_parallel_size": config.vllm_tensor_parallel_size,
    }
    for role in (role for role in roles if role is not Role.ENGINE):
        counts |= dict(zip(_flags_of(role), sizes[role], strict=True))
    needs = [f"--{name} {count}" for name, count in counts.items() if count != 1]
    if joins_cluster():
        needs.append(f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}")
    if config.max_staleness > 0 and config.generates:  # engines generate while the models train
        needs.append(f"--max_staleness {config.max_staleness}")
    if config.backend is BackendName.DEEPSPEED:  # the engine would take its process group for its own
        needs.append(f"--backend {config.backend}")
    if config.vllm_sync_with_ray:
        needs.append("--vllm_sync_with_ray")
    if config.vllm_sync_backend is not SyncBackend.AUTO:
        needs.append(f"--vllm_sync_backend {config.vllm_sync_backend}")
    if machine.gpus > 1 and not config.colocate_all_models:
        needs.append("a GPU for each model (without --colocate_all_models)")
    return needs[0] if needs else ""


class Carrier(StrEnum):
    """The four carriers.

    host: Ray's object store, which processes of one host read without a copy. gloo, nccl: a process group of the actor's
    rank 0 and the engines, or every part of tensor-parallel ones. ipc: each engine, or part of one, reads the memory of its own
    actor rank on the GPU that both use.
    """

    HOST = "host memory"
    GLOO = "gloo"
    NCCL = "nccl"
    IPC = "CUDA IPC"

    @property
    def is_group(self) -> bool:
        return self in (Carrier.GLOO, Carrier.NCCL)


@dataclass(frozen=True, slots=True)
class Route:
    """The carrier, and why it differs from the configured one ("" if it does not)."""

    carrier: Carrier
    reason: str = ""

    def describe(self) -> str:
        return f"weights travel by {self.carrier}" + (f": {self.reason}" if self.reason else "")


def engines_first(config: RLConfig, *, on_gpu: bool) -> bool:
    """Whether the engines must be ready before any model loads: where both share GPUs, and where engines then sleep.

    vLLM measures the free memory at its start, and what a model takes or frees meanwhile makes its cache too small or ends it.
    """
    return config.vllm_enable_sleep or (on_gpu and config.colocate_all_models)


def choose(config: RLConfig, *, on_gpu: bool, one_host: bool) -> Route:
    """The carrier of weights. ``on_gpu``: the actor computes on a GPU; ``one_host``: it shares its host with all engines."""
    asked = config.vllm_sync_backend
    if config.vllm_sync_with_ray:
        ignored = asked is not SyncBackend.AUTO
        reason = f"with --vllm_sync_with_ray the object store takes the place of --vllm_sync_backend {asked}"
        return Route(Carrier.HOST, reason if ignored else "")
    is_auto = asked is SyncBackend.AUTO
    if config.sends_adapter and config.vllm_tensor_parallel_size > 1:
        # Small, and merged in the engine's own process, which has no GPU.
        return Route(Carrier.HOST, "" if is_auto else "a tensor-parallel engine merges adapters in host memory")
    if asked is SyncBackend.GLOO:
        return Route(Carrier.GLOO)
    if not on_gpu:
        problem = "--vllm_sync_backend nccl needs GPUs, and the actor computes on the CPU"
        return Route(Carrier.HOST if one_host else Carrier.GLOO) if is_auto else Route(Carrier.GLOO, problem)
    if config.colocate_all_models:
        return Route(Carrier.IPC, "" if is_auto else "nccl cannot connect two processes on one GPU")
    return Route(Carrier.NCCL)


# For one token of a sample: ids and mask (9 bytes), six float32 streams, and what pickles and the text add.
SAMPLE_BYTES = 64
SMALLEST_STORE = 1 << 30
"""Two buckets of weights with the largest tensor of a model, and messages."""


def object_store_bytes(config: RLConfig, memory_bytes: int, shared_bytes: int) -> int:
    """The size of a private Ray's object store: a whole rollout twice, on its way to the workers and back.

    At most 30 % of the machine's memory and what shared memory has room for, as a larger one would lie on a disk.
    """
    rollout = config.samples_per_rollout * config.context_length * SAMPLE_BYTES
    room = min(3 * memory_bytes // 10, shared_bytes)
    return max(SMALLEST_STORE, min(SMALLEST_STORE + 2 * rollout, room))


class Role(StrEnum):
    ENGINE = "engine"
    ACTOR = "actor"
    CRITIC = "critic"
    REF = "ref"
    REWARD = "reward"


LEARNERS = (Role.ACTOR, Role.CRITIC)
ENGINE_ALONE, ENGINE_BESIDE_MODELS = 0.9, 0.5
"""vLLM's shares of a GPU. Alone it leaves room for two buckets of weights and a layer that an update builds anew."""
IN_PROCESS = "workers in this process"
"""The unit of slots under --workers local."""


@dataclass(frozen=True, slots=True)
class Group:
    """``slots`` = nodes x per_node. Each of ``roles`` has one process in every slot, one for each reward model.

    An engine has one process in every ``engine_size`` slots, which are on one node.
    """

    roles: tuple[Role, ...]
    nodes: int
    per_node: int
    engine_size: int = 1

    @property
    def slots(self) -> int:
        return self.nodes * self.per_node

    @property
    def engines(self) -> int:
        return self.slots // self.engine_size if Role.ENGINE in self.roles else 0

    @property
    def slots_per_bundle(self) -> int:
        """Slots that are reserved as one: all slots of an engine that shares them with no other role."""
        return self.engine_size if self.roles == (Role.ENGINE,) else 1


def used_roles(config: RLConfig) -> tuple[Role, ...]:
    """The models that a run needs; nothing else is loaded. Each reward model counts."""
    roles = [Role.ENGINE, Role.ACTOR] if config.generates else [Role.ACTOR]
    if config.uses_critic:
        roles.append(Role.CRITIC)
    if config.loads_reference:
        roles.append(Role.REF)
    return (*roles, *[Role.REWARD] * len(config.scoring_models))


def team_size(config: RLConfig, role: Role) -> int:
    """How many workers compute each batch of a model together: a ring, or a tensor-parallel group of a model in training."""
    splits = config.ds_tensor_parallel_size if role in LEARNERS else 1
    return config.ring_attn_size * splits


def resolve(parsed: Parsed[RLConfig], machine: Machine) -> Parsed[RLConfig]:
    """Replace every ``auto`` of the placement, and of --workers, by its value; records it in the sources.

    Without GPUs every role gets one worker, or as many as make a team (``team_size``), share a copy (``--fsdp_shard_size``) or
    make a colocated engine. With GPUs, colocated roles get all of them and separate groups equal shares, of all these.
    """
    config = parsed.config
    colocated, engine_size = config.colocate_all_models, config.vllm_tensor_parallel_size
    share = max(1, machine.gpus // (1 if colocated else len(_sharing(config))))
    values: dict[str, object] = {}
    # The actor: from the given engines that it shares GPUs with, else as many whole teams as its share holds.
    actor = config.actor_num_gpus_per_node
    if actor == "auto" and colocated and config.vllm_num_engines != "auto":
        actor_per_node = -(-config.vllm_num_engines * engine_size // config.actor_num_nodes)
    elif actor == "auto":
        whole = math.lcm(team_size(config, Role.ACTOR), config.fsdp_shard_size or 1, engine_size if colocated else 1)
        actor_per_node = max(1, share // whole) * whole
    else:
        actor_per_node = actor
    # The other models follow the actor.
    for role, (nodes, per_node) in _sizes(config).items():
        if role is not Role.ENGINE and per_node == "auto":
            nodes_flag, per_node_flag = _flags_of(role)
            values[per_node_flag] = actor_per_node
            if nodes == 1:
                values[nodes_flag] = config.actor_num_nodes
    # Engines fill the actor's slots, or their own share.
    if config.vllm_num_engines == "auto":
        slots = actor_per_node * config.actor_num_nodes if colocated else share
        values["vllm_num_engines"] = max(1, slots // engine_size)
    config = config.model_copy(update=values)
    # Last, since it depends on all counts.
    if config.workers is WorkersKind.AUTO:
        values["workers"] = WorkersKind.RAY if what_needs_ray(config, machine) else WorkersKind.LOCAL
    # One process has the engine and all models on one GPU, colocated by name or not.
    if config.vllm_gpu_memory_utilization == "auto":
        beside = colocated or values.get("workers", config.workers) is WorkersKind.LOCAL
        values["vllm_gpu_memory_utilization"] = ENGINE_BESIDE_MODELS if beside else ENGINE_ALONE
    sources = dict(parsed.sources) | dict.fromkeys(values, Source.AUTO)
    return Parsed(config.model_copy(update=values), sources)


def plan_groups(config: RLConfig) -> tuple[Group, ...]:
    """The groups of a resolved configuration. Raises ConfigError if roles that share slots differ in size."""
    sizes = {role: (nodes, int(per_node)) for role, (nodes, per_node) in _sizes(config).items()}
    _check_teams(config, sizes)
    groups = []
    for roles in _sharing(config):
        counts = {sizes[role] for role in roles if role is not Role.ENGINE}
        if len(counts) > 1:
            trained = [role for role in roles if role is not Role.ENGINE]
            shapes = ", ".join(f"{role} {sizes[role][0]} x {sizes[role][1]}" for role in trained)
            raise ConfigError(
                f"Colocated models need the same --*_num_nodes x --*_num_gpus_per_node but are {shapes}: make them equal."
            )
        nodes, per_node = counts.pop() if counts else sizes[Role.ENGINE]
        engine_slots = sizes[Role.ENGINE][1]
        if Role.ENGINE in roles and len(roles) > 1 and nodes * per_node != engine_slots:
            raise ConfigError(
                f"--colocate_all_models puts the engines on the actor's GPUs, but --vllm_num_engines {config.vllm_num_engines} x "
                f"--vllm_tensor_parallel_size {config.vllm_tensor_parallel_size} is {engine_slots} and --actor_num_nodes {nodes} "
                f"x --actor_num_gpus_per_node {per_node} is {nodes * per_node}: make them equal."
            )
        groups.append(Group(roles, nodes, per_node, config.vllm_tensor_parallel_size))
    return tuple(groups)


def arithmetic(groups: tuple[Group, ...], unit: str) -> str:
    """The sum of the slots in one line, for example "engine 2 x 2 + actor, ref 2 = 6 worker processes"."""
    return f"{' + '.join(map(_shape, groups))} = {sum(group.slots for group in groups)} {unit}"


def _shape(group: Group) -> str:
    """The roles of a group and its slots; engines of several slots as a product."""
    if Role.ENGINE not in group.roles or group.engine_size == 1:
        return f"{', '.join(group.roles)} {group.slots}"
    others = [role for role in group.roles if role is not Role.ENGINE]
    shape = f"{Role.ENGINE} {group.engines} x {group.engine_size}"
    return f"{shape}, {', '.join(others)} {group.slots}" if others else shape


def check_fits(groups: tuple[Group, ...], cluster_gpus: int) -> None:
    """Raise ConfigError for more GPUs than the cluster has. Without GPUs slots are processes and always fit."""
    total = sum(group.slots for group in groups)
    if cluster_gpus > 0 and total > cluster_gpus:
        raise ConfigError(
            f"The placement asks for {arithmetic(groups, 'GPUs')} but the cluster has {cluster_gpus}: lower *_num_gpus_per_node "
            "or --vllm_num_engines, or let models share GPUs with --colocate_all_models."
        )


def _check_teams(config: RLConfig, sizes: Mapping[Role, tuple[int, int]]) -> None:
    """Check that the workers of each model are whole teams, and whole groups that share a copy. Raises ConfigError."""
    flag = "--ring_attn_size" if config.ring_attn_size > 1 else "--ds_tensor_parallel_size"
    for role in (role for role in used_roles(config) if role is not Role.ENGINE):
        nodes, per_node = sizes[role]
        is_sharded = role in LEARNERS or config.zero_stage == 3
        shards = (config.fsdp_shard_size or 1) if is_sharded else 1
        for name, size in ((flag, team_size(config, role)), ("--fsdp_shard_size", shards)):
            if nodes * per_node % size != 0:
                raise ConfigError(
                    f"{name} {size} does not divide the {nodes * per_node} workers of --{role}_num_nodes x "
                    f"--{role}_num_gpus_per_node: make it a divisor, or change those."
                )


def check_nodes(groups: tuple[Group, ...], gpus_of_nodes: Sequence[int]) -> None:
    """Raise ConfigError if an engine does not fit on one node."""
    for group in groups:
        size, places = group.engine_size, sum(gpus // group.engine_size for gpus in gpus_of_nodes)
        if group.engines > places:
            raise ConfigError(
                f"--vllm_tensor_parallel_size {size} needs {size} GPUs of one node for each of {group.engines} engines, but the "
                f"nodes have {', '.join(map(str, gpus_of_nodes))} GPUs, which is room for {places}: lower it or "
                "--vllm_num_engines."
            )


def node_order(nodes: Sequence[str]) -> list[int]:
    """The order in which places become slots, given the node of each: places of a node are adjacent."""
    return sorted(range(len(nodes)), key=lambda place: nodes.index(nodes[place]))


def check_whole(engine_size: int, nodes: Sequence[str]) -> None:
    """Raise ConfigError if an engine's slots (given by their nodes, in order) are on several nodes."""
    for first in range(0, len(nodes), engine_size):
        if len(set(nodes[first : first + engine_size])) > 1:
            raise ConfigError(
                f"--vllm_tensor_parallel_size {engine_size} needs its GPUs on one node, but the cluster gave slots on nodes in "
                f"portions of {', '.join(str(nodes.count(node)) for node in dict.fromkeys(nodes))}: make each a multiple of "
                f"{engine_size} with --actor_num_gpus_per_node, or free GPUs."
            )


def check_spread(groups: tuple[Group, ...], nodes: int) -> None:
    """Raise ConfigError for a group over more nodes than there are."""
    for group in groups:
        if group.nodes > nodes:
            role = group.roles[-1]
            raise ConfigError(
                f"--{role}_num_nodes {group.nodes} needs {group.nodes} nodes, but there {'is' if nodes == 1 else 'are'} {nodes}: "
                f"start Ray on more (ray start --address HEAD) and set RAY_ADDRESS, or use --{role}_num_nodes {nodes} with more "
                f"--{role}_num_gpus_per_node."
            )


def spread(groups: Sequence[Group], gpus_of_nodes: Mapping[str, int]) -> list[list[str]]:
    """The node of each slot for groups over several nodes, ``per_node`` slots on each; [] for other groups.

    Nodes are taken in the order given. If no node has a GPU, every node has room for all.
    """
    free = dict(gpus_of_nodes)
    counted = any(free.values())
    result: list[list[str]] = []
    for group in groups:
        if group.nodes == 1:
            result.append([])
            continue
        chosen = [node for node, gpus in free.items() if gpus >= group.per_node or not counted][: group.nodes]
        if len(chosen) < group.nodes:
            role = group.roles[-1]
            raise ConfigError(
                f"--{role}_num_nodes {group.nodes} x --{role}_num_gpus_per_node {group.per_node} needs {group.nodes} nodes with "
                f"{group.per_node} free GPUs each, but the nodes have {', '.join(map(str, free.values()))}: lower one of them."
            )
        free |= {node: free[node] - group.per_node for node in chosen}
        result.append([node for node in chosen for _ in range(group.per_node)])
    return result


def _sharing(config: RLConfig) -> list[tuple[Role, ...]]:
    roles = used_roles(config)
    if config.colocate_all_models:
        return [roles]
    pairs: list[tuple[Role, ...]] = []
    if config.colocate_actor_ref:
        pairs.append((Role.ACTOR, Role.REF))
    if config.colocate_critic_reward:
        pairs.append((Role.CRITIC, *[Role.REWARD] * max(1, len(config.reward_models))))
    shared = [pair for pair in pairs if all(role in roles for role in pair)]
    taken = {role for pair in shared for role in pair}
    return [*((role,) for role in roles if role not in taken), *shared]


Auto = Literal["auto"]


def _flags_of(role: Role) -> tuple[str, str]:
    """The settings of a model's nodes, and of its processes on each."""
    return f"{role}_num_nodes", f"{role}_num_gpus_per_node"


def _sizes(config: RLConfig) -> dict[Role, tuple[int, int | Auto]]:
    """Nodes of each role and its slots on each, before or after ``auto`` is resolved."""
    engines = config.vllm_num_engines
    return {
        Role.ENGINE: (1, engines if engines == "auto" else engines * config.vllm_tensor_parallel_size),
        Role.ACTOR: (config.actor_num_nodes, config.actor_num_gpus_per_node),
        Role.CRITIC: (config.critic_num_nodes, config.critic_num_gpus_per_node),
        Role.REF: (config.ref_num_nodes, config.ref_num_gpus_per_node),
        Role.REWARD: (config.reward_num_nodes, config.reward_num_gpus_per_node),
    }
