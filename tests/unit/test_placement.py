"""The arithmetic of placement, and the shares that Ray is asked for."""

from __future__ import annotations

import pytest

from togi.config.parse import Parsed, Source, parse
from togi.config.rl import RLConfig
from togi.config.rl_checks import check_rl
from togi.errors import ConfigError
from togi.plan.machine import Machine
from togi.plan.placement import (
    Group,
    Role,
    arithmetic,
    check_fits,
    check_nodes,
    check_whole,
    check_workers,
    node_order,
    object_store_bytes,
    plan_groups,
    resolve,
    what_needs_ray,
)

NEEDED = ["--pretrain", "model", "--prompt_data", "data.jsonl", "--reward_func", "reward.py"]
GRPO = ["--advantage_estimator", "group_norm", "--n_samples_per_prompt", "4"]
GIB = 1 << 30
LAPTOP, BOX = Machine(cpus=2, memory_bytes=0, gpus=0), Machine(cpus=64, memory_bytes=0, gpus=8)
HYBRID = (
    "--ref_num_nodes 1 --ref_num_gpus_per_node {0} --reward_num_nodes 1 --reward_num_gpus_per_node {0} --critic_num_nodes 1 "
    "--critic_num_gpus_per_node {0} --actor_num_nodes 1 --actor_num_gpus_per_node {0} --vllm_num_engines 4 "
    "--vllm_tensor_parallel_size 2 --colocate_all_models --reward_pretrain rm"
)


def rl(*flags: str) -> Parsed[RLConfig]:
    return parse(RLConfig, list(flags), "rl")


def groups(machine: Machine, *flags: str) -> tuple[Group, ...]:
    return plan_groups(resolve(rl(*NEEDED, *GRPO, *flags), machine).config)


def test_auto_placement() -> None:
    alone = resolve(rl(*NEEDED, *GRPO), LAPTOP)
    assert [(group.roles, group.slots) for group in plan_groups(alone.config)] == [
        ((Role.ENGINE,), 1),
        ((Role.ACTOR,), 1),
        ((Role.REF,), 1),
    ]
    assert alone.sources["vllm_num_engines"] is Source.AUTO
    shared = groups(BOX, "--colocate_all_models")
    assert [(group.roles, group.slots) for group in shared] == [((Role.ENGINE, Role.ACTOR, Role.REF), 8)]
    assert arithmetic(groups(BOX, "--init_kl_coef", "0"), "GPUs") == "engine 4 + actor 4 = 8 GPUs"


def test_auto_placement_with_rings() -> None:
    assert [group.slots for group in groups(LAPTOP, "--ring_attn_size", "2")] == [1, 2, 2]
    assert [group.slots for group in groups(BOX, "--ring_attn_size", "3", "--init_kl_coef", "0")] == [4, 3]
    with pytest.raises(ConfigError, match="--ring_attn_size 2 does not divide the 3 workers of --ref_num_nodes"):
        groups(LAPTOP, "--ring_attn_size", "2", "--ref_num_gpus_per_node", "3")


def test_auto_placement_with_groups_of_shards() -> None:
    """The reference is sharded under stage 3 only."""
    shards = ("--fsdp_shard_size", "2")
    assert [group.slots for group in groups(LAPTOP, *shards)] == [1, 2, 2]
    assert [group.slots for group in groups(BOX, *shards, "--ring_attn_size", "3", "--init_kl_coef", "0")] == [4, 6]
    assert what_needs_ray(resolve(rl(*NEEDED, *GRPO, *shards, "--workers", "ray"), LAPTOP).config, LAPTOP)
    uneven = (*shards, "--actor_num_gpus_per_node", "2", "--ref_num_gpus_per_node", "1")
    assert [group.slots for group in groups(LAPTOP, *uneven)] == [1, 2, 1]
    for flags, role in (
        ((*uneven, "--zero_stage", "3"), "ref"),
        ((*shards, "--actor_num_gpus_per_node", "3"), "actor"),
    ):
        with pytest.raises(
            ConfigError, match=f"--fsdp_shard_size 2 does not divide the . workers of --{role}_num_nodes"
        ):
            groups(LAPTOP, *flags)


@pytest.mark.parametrize(
    ("machine", "flags", "line"),
    [
        (LAPTOP, "", "engine 1 x 2 + actor 1 = 3"),
        (LAPTOP, "--colocate_all_models", "engine 1 x 2, actor 2 = 2"),  # as many actors as one engine has processes
        (LAPTOP, "--colocate_all_models --vllm_num_engines 3", "engine 3 x 2, actor 6 = 6"),
        (LAPTOP, "--vllm_num_engines 3 --actor_num_nodes 2 --actor_num_gpus_per_node 4", "engine 3 x 2 + actor 8 = 14"),
        (BOX, "--colocate_all_models", "engine 4 x 2, actor 8 = 8"),
        (BOX, "", "engine 2 x 2 + actor 4 = 8"),
        (BOX, "--colocate_all_models --ring_attn_size 3", "engine 3 x 2, actor 6 = 6"),
    ],
)
def test_placement_with_tensor_parallel_engines(machine: Machine, flags: str, line: str) -> None:
    got = groups(machine, "--init_kl_coef", "0", "--vllm_tensor_parallel_size", "2", *flags.split())
    assert arithmetic(got, "slots") == f"{line} slots"


def test_the_hybrid_command_of_the_field_says_which_sum_does_not_fit() -> None:
    gae = [*NEEDED[:4], *HYBRID.format(2).split()]
    config = resolve(rl(*gae), LAPTOP).config
    check_rl(config, reward_given=False)
    with pytest.raises(ConfigError) as error:
        plan_groups(config)
    assert str(error.value) == (
        "--colocate_all_models puts the engines on the actor's GPUs, but --vllm_num_engines 4 x --vllm_tensor_parallel_size 2 "
        "is 8 and --actor_num_nodes 1 x --actor_num_gpus_per_node 2 is 2: make them equal."
    )


def test_its_later_edition_places() -> None:
    gae = [*NEEDED[:4], *HYBRID.format(8).split()]
    config = resolve(rl(*gae), LAPTOP).config
    check_rl(config, reward_given=False)
    placed = plan_groups(config)
    assert arithmetic(placed, "GPUs") == "engine 4 x 2, actor, critic, ref, reward 8 = 8 GPUs"
    assert [(group.engines, group.slots_per_bundle) for group in placed] == [(4, 1)]
    check_fits(placed, 8)
    with pytest.raises(ConfigError, match="= 8 GPUs but the cluster has 7"):
        check_fits(placed, 7)


def test_more_gpus_than_the_cluster_has_is_an_error() -> None:
    asked = groups(Machine(2, 0, 2), "--actor_num_gpus_per_node", "8")
    with pytest.raises(ConfigError, match="the cluster has 2"):
        check_fits(asked, 2)
    check_fits(asked, 0)  # without GPUs slots are processes


def test_engines_are_not_cut_in_two() -> None:
    asked = groups(LAPTOP, "--vllm_num_engines", "3", "--vllm_tensor_parallel_size", "2")
    check_nodes(asked, [4, 3])
    with pytest.raises(
        ConfigError, match="for each of 3 engines, but the nodes have 3, 3, 1 GPUs, which is room for 2"
    ):
        check_nodes(asked, [3, 3, 1])
    assert node_order(["b", "a", "b", "a"]) == [0, 2, 1, 3]
    check_whole(2, ["b", "b", "a", "a"])
    with pytest.raises(ConfigError, match="on nodes in portions of 3, 1: make each a multiple of 2"):
        check_whole(2, ["b", "b", "b", "a"])


def test_the_shares_of_a_gpu_never_add_up_to_more() -> None:
    from togi.workers.ray.cluster import _share

    for roles in range(1, 9):
        share = _share(1.0, Group((Role.REWARD,) * roles, 1, 1))
        assert 0.99 < roles * round(share * 10_000) / 10_000 <= 1  # Ray rounds to 1/10000
    assert _share(1.0, Group((Role.ENGINE,), 1, 4, engine_size=2)) == 2  # Ray wants whole numbers above 1


def test_colocated_models_must_have_one_size() -> None:
    with pytest.raises(ConfigError, match="actor 1 x 1, ref 1 x 2"):
        groups(LAPTOP, "--colocate_actor_ref", "--ref_num_gpus_per_node", "2")


def test_tensor_parallelism_is_of_vllm() -> None:
    config = rl(*NEEDED, *GRPO, "--vllm_tensor_parallel_size", "2", "--rollout_engine", "transformers").config
    with pytest.raises(ConfigError, match="--vllm_tensor_parallel_size 2 is vLLM's but --rollout_engine transformers"):
        check_rl(config, reward_given=False)


ONE = Machine(cpus=8, memory_bytes=0, gpus=1)


@pytest.mark.parametrize(
    ("machine", "flags", "needed"),
    [
        (LAPTOP, [], ""),
        (LAPTOP, ["--critic_num_gpus_per_node", "2"], ""),  # there is no critic
        (ONE, ["--colocate_all_models"], ""),
        (BOX, ["--colocate_all_models"], "--vllm_num_engines 8"),
        (BOX, ["--actor_num_gpus_per_node", "1", "--vllm_num_engines", "1"], "a GPU for each model (without"),
        (LAPTOP, ["--ref_num_gpus_per_node", "2"], "--ref_num_gpus_per_node 2"),
        (LAPTOP, ["--vllm_num_engines", "2"], "--vllm_num_engines 2"),
        (LAPTOP, ["--fsdp_shard_size", "2"], "--fsdp_shard_size 2"),
        (LAPTOP, ["--ring_attn_size", "2"], "--ring_attn_size 2"),
        (LAPTOP, ["--backend", "deepspeed"], "--backend deepspeed"),
        (LAPTOP, ["--vllm_sync_backend", "gloo"], "--vllm_sync_backend gloo"),
        (LAPTOP, ["--vllm_sync_with_ray"], "--vllm_sync_with_ray"),
    ],
)
def test_workers_are_local_where_one_process_is_enough(machine: Machine, flags: list[str], needed: str) -> None:
    config = resolve(rl(*NEEDED, *GRPO, *flags), machine).config
    assert config.workers == ("ray" if needed else "local")
    assert what_needs_ray(config, machine).startswith(needed) and bool(needed) == bool(what_needs_ray(config, machine))
    for kind in ("local", "ray"):
        forced = resolve(rl(*NEEDED, *GRPO, *flags, "--workers", kind), machine).config
        assert forced.workers == kind
        if kind == "local" and needed:
            with pytest.raises(ConfigError, match=r"^--workers local keeps everything in one process, but ") as error:
                check_workers(forced, machine)
            assert needed in str(error.value)
        else:
            check_workers(forced, machine)


def test_a_cluster_to_join_takes_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert what_needs_ray(resolve(rl(*NEEDED, *GRPO), LAPTOP).config, LAPTOP) == "RAY_ADDRESS 10.0.0.1:6379"


def test_the_object_store_holds_a_rollout_twice_within_the_machine() -> None:
    """1024 samples of 8192 tokens at 64 bytes are half a GiB."""
    config = RLConfig(rollout_batch_size=128, n_samples_per_prompt=8, max_len=8192)
    assert object_store_bytes(config, 512 * GIB, 64 * GIB) == 2 * GIB
    long = config.model_copy(update={"max_len": 32 * 8192})
    assert object_store_bytes(long, 512 * GIB, 64 * GIB) == 33 * GIB
    assert object_store_bytes(long, 512 * GIB, 16 * GIB) == 16 * GIB, "no more than /dev/shm has room for"
    assert object_store_bytes(long, 40 * GIB, 64 * GIB) == 12 * GIB, "nor 30 % of the memory"
    assert object_store_bytes(long, 512 * GIB, 64 << 20) == GIB, "a container without shared memory: as little as works"
