"""Every example as it would start on the GPUs that it asks for, printed: settings, precision, attention, placement, engine
arguments, carrier of weights and the order of starts.

And the order in which a session really starts its workers, with workers that only note when they are called.
"""

from __future__ import annotations

import asyncio
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.example_scripts import NAMES, SCRIPTS, commands
from tests.offline_world import ROOT
from togi.algo import partial_attention
from togi.config.choices import EngineName, WorkersKind
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.config.rl_checks import check_rl
from togi.config.shared import ModelSettings
from togi.methods import METHODS, check_method
from togi.model.loading import ModelSource
from togi.parallel.process import World
from togi.plan.engine_args import OWN_ARGUMENTS, check_extra_arguments, engine_fields
from togi.plan.machine import Machine, usable_precision
from togi.plan.placement import (
    Carrier,
    Group,
    Role,
    Route,
    arithmetic,
    check_fits,
    choose,
    engines_first,
    plan_groups,
    resolve,
)
from togi.rollout.engine import EngineSettings
from togi.rollout.vllm_engine import engine_arguments
from togi.run import offline_setup
from togi.workers import ray as on_ray
from togi.workers.protocol import Health
from togi.workers.ray.cluster import EngineActor, Resources
from togi.workers.session import engine_settings

pytest.importorskip("vllm")
ONE, NODE, BIG = (Machine(cpus=64, memory_bytes=1 << 40, gpus=gpus, bf16_gpus=True) for gpus in (1, 8, 64))
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_attention, "_generation", lambda _: 9)


def attention_of(config: ModelSettings, ring: int) -> str:
    """Which attention a model in training has on a GPU."""
    source = ModelSource.of(config, "model", GPU, in_ring=ring > 1, trained=True, defer=False)
    if ring > 1:
        return f"a ring of {ring}, FlashAttention in each part"
    return "FlashAttention" if source.flash_attn and config.bf16 else "SDPA"


@dataclass(frozen=True, slots=True)
class DryStart:
    """What a command of ``togi rl`` would do on a machine with GPUs."""

    config: RLConfig
    attention: str
    groups: tuple[Group, ...]
    arguments: dict[str, object]
    route: Route
    engines_first: bool

    def describe(self) -> str:
        said = {name: value for name, value in self.arguments.items() if name not in ("model", "seed")}
        order = "engines, then models" if self.engines_first else "engines and models at once"
        how = f"{'bfloat16' if self.config.bf16 else 'float32'}, {self.attention}"
        return f"{how}\n{arithmetic(self.groups, 'GPUs')}\n{said}\n{self.route.describe()}\n{order}"


def dry_start(flags: list[str], machine: Machine) -> DryStart:
    parsed, _ = usable_precision(parse(RLConfig, flags, "rl"), machine)
    check_rl(parsed.config)
    config = resolve(parsed, machine).config
    check_extra_arguments(config.vllm_args)
    groups = plan_groups(config)
    arguments = engine_arguments(engine_settings(config, 0, 1), on_cpu=False)
    one_host = all(group.nodes == 1 for group in groups)
    route = choose(config, on_gpu=True, one_host=one_host)
    check_fits(groups, machine.gpus)
    attention = attention_of(config, config.ring_attn_size)
    return DryStart(config, attention, groups, arguments, route, engines_first(config, on_gpu=True))


def check(start: DryStart) -> None:
    """What holds of every run on GPUs."""
    config = start.config
    assert config.bf16 and start.arguments["dtype"] == "bfloat16"
    assert start.attention == (
        "FlashAttention" if config.ring_attn_size == 1 else attention_of(config, config.ring_attn_size)
    )
    assert set(start.arguments) <= set(engine_fields())
    assert start.arguments["enforce_eager"] is False
    assert start.arguments["enable_sleep_mode"] is config.vllm_enable_sleep
    assert start.arguments["max_num_seqs"] is None
    shares = any(Role.ENGINE in group.roles and len(group.roles) > 1 for group in start.groups)
    share = start.arguments["gpu_memory_utilization"]
    assert isinstance(share, float)
    if config.generates:
        assert share == (0.5 if shares or config.workers is WorkersKind.LOCAL else 0.9)
        assert start.engines_first is (shares or config.vllm_enable_sleep)
        assert start.route == Route(Carrier.IPC if shares else Carrier.NCCL)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("rl_")])
def test_the_scripts(name: str, tmp_path: Path) -> None:
    for command in commands(SCRIPTS / name, tmp_path):
        if command.name == "rl":
            start = dry_start([*command.flags, "--rollout_engine", "vllm"], BIG)
            print(f"{name}\n{start.describe()}")
            check(start)


@pytest.mark.parametrize("name", ["rl_grpo.sh", "rl_grpo_hybrid.sh", "rl_ppo.sh", "rl_grpo_lora.sh"])
def test_a_script_on_one_gpu_is_one_process_that_shares_it(name: str, tmp_path: Path) -> None:
    (command,) = commands(SCRIPTS / name, tmp_path)
    start = dry_start(list(command.flags), ONE)
    assert start.config.workers is WorkersKind.LOCAL
    assert (start.attention, start.arguments["gpu_memory_utilization"]) == ("FlashAttention", 0.5)


OFFLINE = [name for name in NAMES if not name.startswith(("rl_", "rlhf"))]


@pytest.mark.parametrize("name", OFFLINE)
def test_training_on_fixed_data(name: str, tmp_path: Path) -> None:
    for command in commands(SCRIPTS / name, tmp_path):
        if command.name not in METHODS:
            continue
        parsed, said = usable_precision(parse(METHODS[command.name], command.flags, command.name), NODE)
        check_method(parsed)
        config = parsed.config
        attention = attention_of(config, config.ring_attn_size)
        assert config.bf16, said
        assert attention.startswith("FlashAttention" if config.ring_attn_size == 1 else "a ring")
        shards = f"{config.backend}, stage {config.zero_stage}" if command.processes > 1 else "whole"
        print(f"{name}: {command.name}, {command.processes} GPUs, bfloat16, {attention}, {shards}")
        if config.on_policy is None or config.on_policy.rollout_engine is not EngineName.VLLM:
            continue
        with pytest.MonkeyPatch.context() as patch:
            settings: list[EngineSettings] = []
            patch.setattr(offline_setup, "create_engine", lambda _, given, into=settings: into.append(given))
            patch.setattr("togi.run.loading.local_folder", str)
            offline_setup.start_engines(config, World.solo(GPU))
        arguments = engine_arguments(settings[0], on_cpu=False)
        print(arguments)
        assert set(arguments) <= set(engine_fields())
        assert (arguments["enable_sleep_mode"], arguments["enforce_eager"], arguments["dtype"]) == (
            True,
            False,
            "bfloat16",
        )


def test_the_large_ones_in_numbers(tmp_path: Path) -> None:
    (command,) = commands(SCRIPTS / "rl_ppo_70b.sh", tmp_path)
    start = dry_start(list(command.flags), BIG)
    assert {group.roles: group.slots for group in start.groups} == {
        (Role.ENGINE,): 16,
        (Role.ACTOR, Role.REF): 16,
        (Role.CRITIC, Role.REWARD, Role.REWARD): 16,  # NEEDED names two reward models
    }
    assert start.arguments["tensor_parallel_size"] == 4
    assert start.arguments["distributed_executor_backend"] == "mp"
    assert start.route.carrier is Carrier.NCCL  # into each of the 16 parts of the engines
    assert not start.engines_first


def test_the_kubernetes_job() -> None:
    job = yaml.safe_load((ROOT / "examples/cluster/rayjob.yaml").read_text())
    words = shlex.split(job["spec"]["entrypoint"])
    start = dry_start(words[words.index("togi.cli.train_ppo_ray") + 1 :], Machine(64, 1 << 40, 16, bf16_gpus=True))
    print(start.describe())
    check(start)
    assert [(group.nodes, group.per_node) for group in start.groups] == [(2, 8)]


def test_the_34b_script_in_numbers(tmp_path: Path) -> None:
    (command,) = commands(SCRIPTS / "dpo_34b.sh", tmp_path)
    config = usable_precision(parse(METHODS["dpo"], command.flags, "dpo"), NODE)[0].config
    assert command.processes == 8 and config.on_policy is None, "one node, and no engine"
    assert (config.zero_stage, config.bf16, attention_of(config, 1)) == (3, True, "FlashAttention")


def test_togi_says_which_arguments_it_sets() -> None:
    """Every argument given to vLLM is refused in --vllm_args, but those that Togi only chooses on CPUs."""
    settings = engine_settings(resolve(parse(RLConfig, ["--pretrain", "m"], "rl"), NODE).config, 0, 1)
    on_gpu, on_cpu = (set(engine_arguments(settings, on_cpu=where)) for where in (False, True))
    assert on_gpu | on_cpu >= set(OWN_ARGUMENTS)
    assert on_gpu <= set(OWN_ARGUMENTS)
    assert on_cpu - set(OWN_ARGUMENTS) == {"enable_chunked_prefill", "block_size", "max_num_batched_tokens"}


class Noted:
    """Workers that note the start and end of each call."""

    def __init__(self, role: Role, count: int, events: list[str]) -> None:
        self.role, self.handles, self._events = role, (None,) * count, events

    def __len__(self) -> int:
        return len(self.handles)

    async def watch(self, index: int) -> None:
        pass

    async def call(self, index: int, method: Any, *arguments: object, **named: object) -> object:
        name = method.__name__
        self._events.append(f"{self.role} {name} begins")
        await asyncio.sleep(0.01)
        self._events.append(f"{self.role} {name} ends")
        return {"open_meeting": ("host", 1), "device_type": "cuda", "node": "n", "gpus": (str(index),)}.get(name)


class FakeCluster:
    """A cluster of GPUs, in the place of Ray's."""

    resources = Resources(cpus=8, gpus_of_nodes=(8,))

    def __init__(self, groups: tuple[Group, ...], events: list[str]) -> None:
        self._groups, self._events = groups, events

    def start(self, _: type, role: Role, **__: object) -> Noted:
        (group,) = (group for group in self._groups if role in group.roles)
        return Noted(role, group.engines if role is Role.ENGINE else group.slots, self._events)

    def threads(self, slots: int) -> int:
        return slots


@pytest.mark.parametrize(
    ("flags", "carrier"),
    [
        ("--colocate_all_models", Carrier.IPC),
        ("--colocate_all_models --vllm_tensor_parallel_size 2", Carrier.IPC),
        ("--colocate_all_models --vllm_enable_sleep", Carrier.IPC),
        ("--colocate_actor_ref --vllm_tensor_parallel_size 2", Carrier.NCCL),
    ],
)
def test_engines_that_share_gpus_are_ready_before_any_model_starts(flags: str, carrier: Carrier) -> None:
    words = ["--pretrain", "m", "--advantage_estimator", "group_norm", *flags.split()]
    config, events = resolve(parse(RLConfig, words, "rl"), NODE).config, list[str]()
    cluster: Any = FakeCluster(plan_groups(config), events)
    session = asyncio.run(on_ray._start_all(config, cluster, {Role.ACTOR: 1}, Health()))
    ready = max(i for i, event in enumerate(events) if event == f"{Role.ENGINE} {EngineActor.start_on.__name__} ends")
    models = [i for i, event in enumerate(events) if event in ("actor open_meeting begins", "ref open_meeting begins")]
    assert len(models) >= 2
    assert (ready < min(models)) is config.colocate_all_models
    slept = [i for i, event in enumerate(events) if event == "engine sleep ends"]
    assert bool(slept) is config.vllm_enable_sleep
    assert all(i < min(models) for i in slept)
    weights: Any = session.weights
    weights = weights.sync
    assert weights.route == Route(carrier)
    parts = len(session.engines.workers) * config.vllm_tensor_parallel_size
    assert events.count("engine join_channel ends") == (len(session.engines.workers) if carrier.is_group else 0)
    if carrier is Carrier.IPC:  # each part takes the parcel of the actor's rank on its GPU
        assert parts == session.actor.size
        ranks = list(range(parts))
        of_engines = [weights._of_engine(ranks, i) for i in range(len(session.engines.workers))]
        assert [rank for of_engine in of_engines for rank in of_engine] == ranks
