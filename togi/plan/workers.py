"""Whether the models and the engine of a run fit into one process, or need several under Ray."""

from __future__ import annotations

import os

from togi.config.choices import BackendName, SyncBackend, WorkersKind
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
    counts: dict[str, int | str] = {
        "vllm_num_engines": config.vllm_num_engines,
        "vllm_tensor_parallel_size": config.vllm_tensor_parallel_size,
        "actor_num_nodes": config.actor_num_nodes,
        "actor_num_gpus_per_node": config.actor_num_gpus_per_node,
        "ring_attn_size": config.ring_attn_size,
        "ds_tensor_parallel_size": config.ds_tensor_parallel_size,
    }
    if config.uses_critic:
        counts["critic_num_nodes"] = config.critic_num_nodes
        counts["critic_num_gpus_per_node"] = config.critic_num_gpus_per_node
    if config.loads_reference:
        counts["ref_num_nodes"] = config.ref_num_nodes
        counts["ref_num_gpus_per_node"] = config.ref_num_gpus_per_node
    if config.scoring_models:
        counts["reward_num_nodes"] = config.reward_num_nodes
        counts["reward_num_gpus_per_node"] = config.reward_num_gpus_per_node
    needs = [f"--{name} {count}" for name, count in counts.items() if count != 1]
    if joins_cluster():
        needs.append(f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}")
    if config.backend is BackendName.DEEPSPEED:  # the engine would take its process group for its own
        needs.append(f"--backend {config.backend}")
    if config.vllm_sync_with_ray:
        needs.append("--vllm_sync_with_ray")
    if config.vllm_sync_backend is not SyncBackend.AUTO:
        needs.append(f"--vllm_sync_backend {config.vllm_sync_backend}")
    if machine.gpus > 1 and not config.colocate_all_models:
        needs.append("a GPU for each model (without --colocate_all_models)")
    return needs[0] if needs else ""
