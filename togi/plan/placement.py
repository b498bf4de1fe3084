"""Where the processes of a run go: plain arithmetic on the settings, checked before anything is placed.

A *group* is a set of equal slots (one GPU each, or one worker process where there are none) that one or several roles share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from togi.config.parse import Parsed, Source
from togi.config.rl import RLConfig
from togi.errors import ConfigError
from togi.plan.machine import Machine


class Role(StrEnum):
    ENGINE = "engine"
    ACTOR = "actor"
    CRITIC = "critic"
    REF = "ref"
    REWARD = "reward"


LEARNERS = (Role.ACTOR, Role.CRITIC)


@dataclass(frozen=True, slots=True)
class Group:
    """``slots`` = nodes x per_node; each of ``roles`` has one process in every slot, one for each reward model."""

    roles: tuple[Role, ...]
    nodes: int
    per_node: int

    @property
    def slots(self) -> int:
        return self.nodes * self.per_node


def used_roles(config: RLConfig) -> tuple[Role, ...]:
    """The models a run really needs: nothing is loaded that the settings do not use. Each reward model counts."""
    roles = [Role.ENGINE, Role.ACTOR] if config.generates else [Role.ACTOR]
    if config.uses_critic:
        roles.append(Role.CRITIC)
    if config.loads_reference:
        roles.append(Role.REF)
    return (*roles, *[Role.REWARD] * len(config.scoring_models))


def team_size(config: RLConfig, role: Role) -> int:
    """How many workers compute each batch of a model: a ring, or a group that parts the weights of a model in training."""
    splits = config.ds_tensor_parallel_size if role in LEARNERS else 1
    return config.ring_attn_size * splits


def resolve(parsed: Parsed[RLConfig], machine: Machine) -> Parsed[RLConfig]:
    """Replace every ``auto`` of the placement by a number, and say so in the sources.

    Without GPUs every role gets one worker, or as many as make a team (``team_size``). With GPUs, colocated roles get all of
    them and separate groups equal shares, of whole teams.
    """
    config = parsed.config
    separate = 1 if config.colocate_all_models else len(_sharing(config))
    share, team = max(1, machine.gpus // separate), team_size(config, Role.ACTOR)
    values: dict[str, Any] = {}
    actor = config.actor_num_gpus_per_node
    actor_per_node = max(1, share // team) * team if actor == "auto" else actor
    for role in ("actor", "critic", "ref", "reward"):
        if getattr(config, f"{role}_num_gpus_per_node") == "auto":
            values[f"{role}_num_gpus_per_node"] = actor_per_node
            if getattr(config, f"{role}_num_nodes") == 1:
                values[f"{role}_num_nodes"] = config.actor_num_nodes
    if config.vllm_num_engines == "auto":
        colocated = config.colocate_all_models
        values["vllm_num_engines"] = actor_per_node * config.actor_num_nodes if colocated else share
    sources = dict(parsed.sources) | dict.fromkeys(values, Source.AUTO)
    return Parsed(config.model_copy(update=values), sources)


def plan_groups(config: RLConfig) -> tuple[Group, ...]:
    """The groups of a resolved configuration."""
    sizes = _sizes(config)
    _check_teams(config, sizes)
    groups = []
    for roles in _sharing(config):
        counts = {sizes[role] for role in roles if role is not Role.ENGINE}
        if len(counts) > 1:
            shapes = ", ".join(
                f"{role} {sizes[role][0]} x {sizes[role][1]}" for role in roles if role is not Role.ENGINE
            )
            raise ConfigError(
                f"Colocated models need the same --*_num_nodes x --*_num_gpus_per_node but are {shapes}: make them equal."
            )
        nodes, per_node = counts.pop() if counts else sizes[Role.ENGINE]
        if Role.ENGINE in roles and len(roles) > 1 and nodes * per_node != config.vllm_num_engines:
            raise ConfigError(
                f"--colocate_all_models needs one engine per actor slot, but --vllm_num_engines is {config.vllm_num_engines} "
                f"and --actor_num_nodes x --actor_num_gpus_per_node is {nodes * per_node}: make them equal."
            )
        groups.append(Group(roles, nodes, per_node))
    return tuple(groups)


def arithmetic(groups: tuple[Group, ...], unit: str) -> str:
    """One line that shows how the slots add up, for example "engine 1 + actor, ref 2 = 3 worker processes"."""
    parts = [f"{', '.join(group.roles)} {group.slots}" for group in groups]
    return f"{' + '.join(parts)} = {sum(group.slots for group in groups)} {unit}"


def check_fits(groups: tuple[Group, ...], cluster_gpus: int) -> None:
    """Refuse more GPUs than the cluster has. Without any GPU slots are processes and always fit."""
    total = sum(group.slots for group in groups)
    if cluster_gpus > 0 and total > cluster_gpus:
        raise ConfigError(
            f"The placement asks for {arithmetic(groups, 'GPUs')} but the cluster has {cluster_gpus}: lower *_num_gpus_per_node "
            "or --vllm_num_engines, or let models share GPUs with --colocate_all_models."
        )


def _check_teams(config: RLConfig, sizes: Mapping[Role, tuple[int, int]]) -> None:
    """The workers of each model are whole teams."""
    flag = "--ring_attn_size" if config.ring_attn_size > 1 else "--ds_tensor_parallel_size"
    for role in used_roles(config):
        nodes, per_node = sizes[role]
        if role is not Role.ENGINE and nodes * per_node % team_size(config, role) != 0:
            raise ConfigError(
                f"{flag} {team_size(config, role)} does not divide the {nodes * per_node} workers of --{role}_num_nodes x "
                f"--{role}_num_gpus_per_node: make it a divisor, or change those."
            )


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
    single: list[tuple[Role, ...]] = [(role,) for role in roles if role not in taken]
    return single + shared


def _sizes(config: RLConfig) -> Mapping[Role, tuple[int, int]]:
    resolved = (
        config.vllm_num_engines,
        config.actor_num_gpus_per_node,
        config.critic_num_gpus_per_node,
        config.ref_num_gpus_per_node,
        config.reward_num_gpus_per_node,
    )
    engines, actor, critic, ref, reward = (int(number) for number in resolved)
    return {
        Role.ENGINE: (1, engines),
        Role.ACTOR: (config.actor_num_nodes, actor),
        Role.CRITIC: (config.critic_num_nodes, critic),
        Role.REF: (config.ref_num_nodes, ref),
        Role.REWARD: (config.reward_num_nodes, reward),
    }
