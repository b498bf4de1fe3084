"""Weights of two actor ranks under ZeRO-3 reach two engines by every carrier that runs here, and a stopped engine is named."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.tiny import save_tiny_model
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.errors import WeightSyncError
from togi.plan.machine import this_machine
from togi.plan.placement import Carrier, Role, Route, resolve
from togi.weights.buckets import Checksum, pack_buckets
from togi.workers import start
from togi.workers.protocol import Health
from togi.workers.ray.cluster import EngineActor, RayWorkers
from togi.workers.ray.healing import EngineCare
from togi.workers.ray.weight_sync import WeightSync

PROBE = list(range(20, 60))


def expected_checksum(folder: Path) -> str:
    """Of the weights in a model folder, read by safetensors alone."""
    checksum = Checksum()
    for bucket in pack_buckets(load_file(folder / "model.safetensors").items(), 10_000):
        checksum.add(bucket.contents())
    return checksum.digest()


def processes(kind: str) -> list[psutil.Process]:
    """Those that this one started whose command has ``kind`` in it."""
    return [p for p in psutil.Process().children(recursive=True) if kind in " ".join(p.cmdline())]


@contextmanager
def stopped(kind: str) -> Iterator[None]:
    """Nothing of the last worker process of this kind runs inside."""
    found = processes(kind)
    os.kill(found[-1].pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(found[-1].pid, signal.SIGCONT)


async def scenario(config: RLConfig) -> None:
    session = await start(config, this_machine(), {Role.ACTOR: 10}, print)
    try:
        assert processes("EngineActor") and not processes("ray::IDLE")  # a process for each role, and none beside them
        assert isinstance(session.weights, EngineCare)
        through_host, actor, engines = session.weights.sync, session.actor.workers, session.engines.workers
        assert through_host.route == Route(Carrier.HOST)
        assert isinstance(actor, RayWorkers) and isinstance(engines, RayWorkers)
        over_gloo = WeightSync(actor, engines, Route(Carrier.GLOO), 120.0)
        for version, way in enumerate((through_host, over_gloo)):
            if way is over_gloo:
                await way.connect((0, 1))
            report = await way.send(version)
            assert report.checksum == expected_checksum(Path(config.pretrain))
            assert await session.probe(PROBE) < 1e-4
        over_gloo._timeout = 5.0
        with (
            stopped("EngineActor"),
            pytest.raises(WeightSyncError, match=r"engine [01] confirmed 0 of \d+ tensors\.$"),
        ):
            await over_gloo.send(9)
    finally:
        session.abandon()


def test_every_carrier_brings_the_same_bytes_to_all(tmp_path: Path) -> None:
    """The checksum is that of the model's own file: no rank, no engine and no carrier has other bytes."""
    save_tiny_model(tmp_path / "model")
    flags = "--rollout_engine transformers --advantage_estimator group_norm --init_kl_coef 0 --zero_stage 3"
    sizes = "--actor_num_gpus_per_node 2 --vllm_num_engines 2 --prompt_max_len 64 --generate_max_len 8"
    words = ["--pretrain", str(tmp_path / "model"), *flags.split(), *sizes.split()]
    asyncio.run(scenario(resolve(parse(RLConfig, words, "rl"), this_machine()).config))


async def deadly(config: RLConfig, said: list[str]) -> None:
    """The last engine is killed when both have agreed to an update, and nothing of it has arrived."""
    session = await start(config, this_machine(), {Role.ACTOR: 10}, said.append, Health(1, said.append))
    try:
        weights = session.weights
        assert isinstance(weights, EngineCare)
        await weights.send(1)
        await session.probe(PROBE)
        confirmed = weights.sync._confirmed

        async def killing(progress: Any, tensors: int, method: Any, arguments: Any) -> None:
            await confirmed(progress, tensors, method, arguments)
            if method is EngineActor.begin_update:
                weights.sync._confirmed = confirmed  # type: ignore[method-assign]
                processes("EngineActor")[-1].kill()

        weights.sync._confirmed = killing  # type: ignore[method-assign]
        report = await asyncio.wait_for(weights.send(2), 120)
        assert (report.version, report.checksum) == (2, expected_checksum(Path(config.pretrain)))
        assert await session.probe(PROBE) < 1e-4, "both engines are there and have the weights"
        assert len([line for line in said if "is restarted" in line]) == 1
        # Engine 1 alone gets the weights when nothing else is sent, in a group of two, and both again after it.
        before = weights.pool._lives.copy()
        session.health.limit = 2
        processes("EngineActor")[-1].kill()
        assert await session.probe(PROBE) < 1e-4
        assert sum(weights.pool._lives) == sum(before) + 1
        report = await weights.send(3)
        assert report.checksum == expected_checksum(Path(config.pretrain))
    finally:
        session.abandon()


@pytest.mark.parametrize("carrier", ["auto", "gloo"])
def test_an_update_survives_the_death_of_an_engine(tmp_path: Path, carrier: str) -> None:
    save_tiny_model(tmp_path / "model")
    flags = "--rollout_engine transformers --advantage_estimator group_norm --init_kl_coef 0 --vllm_num_engines 2"
    sizes = f"--prompt_max_len 64 --generate_max_len 8 --vllm_sync_backend {carrier}"
    words = ["--pretrain", str(tmp_path / "model"), *flags.split(), *sizes.split()]
    asyncio.run(deadly(resolve(parse(RLConfig, words, "rl"), this_machine()).config, []))
