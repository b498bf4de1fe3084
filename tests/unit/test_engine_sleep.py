"""What vLLM is told on a GPU when it sleeps, wakes and takes weights, and in which phases it may forget them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.obs.names import Holder
from togi.plan.machine import Released
from togi.rollout.vllm_engine import VllmCore
from togi.workers.engine_worker import EnginePool
from togi.workers.session import Phase, Phases


class Told:
    """In the place of vLLM's engine: notes what it is told. Memory falls by 10 where it sleeps."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.engine_core: object = None
        self._used = 30

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))
        self._used = 20

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(("wake_up", tags))

    def reset_prefix_cache(self, **_: bool) -> bool:
        self.calls.append("reset_prefix_cache")
        return True

    def set_weight_version(self, version: str) -> None:
        self.calls.append(("version", version))

    def collective_rpc(self, function: Any, args: tuple[object, ...]) -> list[tuple[int, int]]:
        if function.__name__ != "_cache_and_memory":
            self.calls.append(function.__name__)
        return [(10, self._used)]


def core_on_gpu() -> tuple[VllmCore, Told]:
    core, told = VllmCore.__new__(VllmCore), Told()
    core._engine, core._on_cpu, core._forgot_weights, core.parts = told, False, False, None
    core._updates, core._recompute_kv, core._states = 0, False, SimpleNamespace(UNPAUSED=0)
    scheduler = SimpleNamespace(waiting=[], set_pause_state=lambda _: None)
    told.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
    return core, told


def test_forgotten_weights_come_back_by_an_update_and_the_cache_after_it() -> None:
    core, told = core_on_gpu()
    assert core.sleep(keep_weights=False) == Released(10, 30, 20)
    core.wake()
    core.begin_update()
    core.finish_update(1)
    assert told.calls == [
        "reset_prefix_cache",
        ("sleep", 2),
        ("wake_up", ["weights"]),
        "_start_reload",
        "_finish_reload",
        ("wake_up", ["kv_cache"]),
        ("version", "1"),
        "reset_prefix_cache",
    ]
    told.calls.clear()
    core.begin_update()
    core.finish_update(2)  # it has been awake: nothing is left to wake
    assert told.calls == ["_start_reload", "_finish_reload", ("version", "2"), "reset_prefix_cache"]


def test_kept_weights_wake_at_once() -> None:
    core, told = core_on_gpu()
    core.sleep(keep_weights=True)
    core.wake()
    assert told.calls == ["reset_prefix_cache", ("sleep", 1), ("wake_up", None)]


class Sleepers:
    """One engine worker that notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, object]]] = []

    def __len__(self) -> int:
        return 1

    async def call(self, index: int, method: Any, *arguments: object, **named: object) -> object:
        self.calls.append((method.__name__, named))
        return Released(10, 30, 20)


class NoMeter:
    async def take_peaks(self) -> dict[Holder, list[int]]:
        return {}


@pytest.mark.parametrize("evaluates", [False, True])
def test_engines_keep_their_weights_only_where_no_update_follows(evaluates: bool) -> None:
    """Through a step as the loop takes it, with a checkpoint after it and the next step's rollout."""
    config = parse(RLConfig, ["--pretrain", "m", "--vllm_enable_sleep", "--colocate_all_models"], "rl").config
    workers = Sleepers()
    meter: Any = NoMeter()
    pool: Any = EnginePool(workers)  # type: ignore[arg-type]
    phases = Phases(config, pool, (), meter, frozenset())

    async def step() -> None:
        after = [Phase.EVALUATE] if evaluates else []
        order = [Phase.GENERATE, Phase.SCORE, Phase.TRAIN, Phase.SYNC, *after, Phase.SAVE, Phase.GENERATE]
        for phase in order:
            await phases.enter(phase)

    asyncio.run(step())
    assert workers.calls == [
        ("sleep", {"keep_weights": False}),
        ("drop_weights", {}),
        ("wake", {}),
        ("sleep", {"keep_weights": True}),
        ("wake", {}),
    ]
