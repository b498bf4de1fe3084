"""Every example as it would start on the GPUs that it asks for: settings, placement, engine arguments, carrier and order, printed.

And the order in which a session really starts its workers, with workers that only note when they are called.
"""

from __future__ import annotations

import asyncio
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.example_scripts import NAMES, SCRIPTS, commands
from tests.offline_world import ROOT
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.config.rl_checks import check_rl
from togi.plan.engine_args import OWN_ARGUMENTS, check_extra_arguments, engine_fields
from togi.plan.machine import Machine
from togi.plan.placement import Carrier, Group, Role, Route, choose, engines_first, plan_groups, resolve
from togi.rollout.vllm_engine import engine_arguments
from togi.workers import ray as on_ray
from togi.workers.ray.cluster import EngineActor, Resources
from togi.workers.session import engine_settings

pytest.importorskip("vllm")
NODE = Machine(cpus=64, memory_bytes=1 << 40, gpus=8)
BIG = Machine(cpus=64, memory_bytes=1 << 40, gpus=64)


@dataclass(frozen=True, slots=True)
class DryStart:
    """What a command of ``togi rl`` would do on a machine with GPUs."""

    config: RLConfig
    groups: tuple[Group, ...]
    arguments: dict[str, object]
    route: Route
    engines_first: bool

    def describe(self) -> str:
        said = {name: value for name, value in self.arguments.items() if name not in ("model", "seed")}
        order = "engines, then models" if self.engines_first else "engines and models at once"
        return f"{self.groups}\n{said}\n{self.route.describe()}\n{order}"


def dry_start(flags: list[str], machine: Machine) -> DryStart:
    parsed = parse(RLConfig, flags, "rl")
    check_rl(parsed.config)
    config = resolve(parsed, machine).config
    check_extra_arguments(config.vllm_args)
    groups = plan_groups(config)
    arguments = engine_arguments(engine_settings(config, 0, 1), on_cpu=False)
    one_host = all(group.nodes == 1 for group in groups)
    route = choose(config, on_gpu=True, one_host=one_host)
    return DryStart(config, groups, arguments, route, engines_first(config, on_gpu=True))


def check(start: DryStart) -> None:
    """What holds of every run on GPUs."""
    config = start.config
    assert set(start.arguments) <= set(engine_fields())
    assert start.arguments["enforce_eager"] is False
    assert start.arguments["enable_sleep_mode"] is config.vllm_enable_sleep
    assert start.arguments["max_num_seqs"] is None
    shares = any(Role.ENGINE in group.roles and len(group.roles) > 1 for group in start.groups)
    share = start.arguments["gpu_memory_utilization"]
    assert isinstance(share, float)
    assert share <= (0.6 if shares else 0.9)
    if config.generates:
        assert start.engines_first is (shares or config.vllm_enable_sleep)
        assert start.route == Route(Carrier.IPC if shares else Carrier.NCCL)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("rl_")])
def test_the_scripts(name: str, tmp_path: Path) -> None:
    for command in commands(SCRIPTS / name, tmp_path):
        if command.name == "rl":
            start = dry_start([*command.flags, "--rollout_engine", "vllm"], BIG)
            print(f"{name}\n{start.describe()}")
            check(start)


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
    start = dry_start(words[words.index("togi.cli.train_ppo_ray") + 1 :], Machine(64, 1 << 40, 16))
    print(start.describe())
    check(start)
    assert [(group.nodes, group.per_node) for group in start.groups] == [(2, 8)]


def test_the_34b_script_needs_no_engine(tmp_path: Path) -> None:
    (command,) = commands(SCRIPTS / "dpo_34b.sh", tmp_path)
    parsed = command.parsed()
    assert command.processes == 8
    assert parsed.config.on_policy is None  # type: ignore[attr-defined]


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
    session = asyncio.run(on_ray._start_all(config, cluster, {Role.ACTOR: 1}, lambda _: None))
    ready = max(i for i, event in enumerate(events) if event == f"{Role.ENGINE} {EngineActor.start_on.__name__} ends")
    models = [i for i, event in enumerate(events) if event in ("actor open_meeting begins", "ref open_meeting begins")]
    assert len(models) >= 2
    assert (ready < min(models)) is config.colocate_all_models
    slept = [i for i, event in enumerate(events) if event == "engine sleep ends"]
    assert bool(slept) is config.vllm_enable_sleep
    assert all(i < min(models) for i in slept)
    weights: Any = session.weights
    assert weights.route == Route(carrier)
    parts = len(session.engines.workers) * config.vllm_tensor_parallel_size
    assert events.count("engine join_channel ends") == (len(session.engines.workers) if carrier.is_group else 0)
    if carrier is Carrier.IPC:  # each part takes the parcel of the actor's rank on its GPU
        assert parts == session.actor.size
        ranks = list(range(parts))
        of_engines = [weights._of_engine(ranks, i) for i in range(len(session.engines.workers))]
        assert [rank for of_engine in of_engines for rank in of_engine] == ranks
