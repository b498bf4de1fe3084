"""The pool of engines with scripted workers: who serves, what is repeated, when an engine that is back has no weights yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from togi.errors import WorkerDied, WorkerError
from togi.sample import Sampling
from togi.workers.engine_worker import EnginePool, EngineWorker
from togi.workers.protocol import Health

SAMPLING = Sampling(4, 1.0, 1.0)


class Scripted:
    """Engines that answer a request when ``open`` is set, with their index and how often they were restarted."""

    def __init__(self, count: int) -> None:
        self.lives, self.dead, self.broken = [0] * count, set[int](), set[int]()
        self.open = asyncio.Event()
        self.asked = list[int]()
        self.deaths = [asyncio.Event() for _ in range(count)]

    def __len__(self) -> int:
        return len(self.lives)

    def die(self, index: int) -> None:
        self.dead.add(index)
        self.deaths[index].set()

    async def call(self, index: int, method: Any, *_: object, **__: object) -> Any:
        if method is EngineWorker.generate:
            self.asked.append(index)
            if index in self.broken:
                raise WorkerError(f"engine {index} failed: it is broken")
            waits = [asyncio.create_task(event.wait()) for event in (self.open, self.deaths[index])]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if index in self.broken and method is EngineWorker.beat:
            raise WorkerError(f"engine {index} failed: it is broken")
        if index in self.dead:
            raise WorkerDied(f"engine {index}", "died")
        return index, self.lives[index]

    def revive(self, index: int) -> None:
        self.dead.discard(index)
        self.broken.discard(index)
        self.deaths[index] = asyncio.Event()
        self.lives[index] += 1


class Scene:
    """A pool over scripted engines; a restart ends when ``back`` is set."""

    def __init__(self, count: int, limit: int = 9) -> None:
        self.engines, self.back = Scripted(count), asyncio.Event()
        self.lost, self.said = list[int](), list[str]()
        self.health = Health(limit, self.said.append)
        self.pool = EnginePool(self.engines, self.revive)
        self.pool.version = 0
        self.pool._deadline = 5.0

    async def revive(self, index: int, died: WorkerDied, lost: int) -> bool:
        self.health.allow(died, f"engine {index}")
        self.lost.append(lost)
        await self.back.wait()
        self.engines.revive(index)
        return self.pool.version is not None

    def ask(self, number: int) -> list[asyncio.Task[Any]]:
        return [asyncio.create_task(self.pool.generate([1], SAMPLING)) for _ in range(number)]


async def turns(number: int = 20) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


def test_the_requests_of_a_dead_engine_are_repeated_on_the_other() -> None:
    async def scene() -> None:
        s = Scene(2)
        requests = s.ask(6)
        await turns()
        assert sorted(s.engines.asked) == [0, 0, 0, 1, 1, 1]
        s.engines.die(0)
        await turns()
        # At once, before engine 0 is back; nobody asks it meanwhile.
        assert s.engines.asked[6:] == [1, 1, 1]
        assert s.lost == [3], "one restart for three failures"
        requests += s.ask(1)
        await turns()
        assert s.engines.asked[9:] == [1]
        s.back.set()
        await turns()
        requests += s.ask(1)
        await turns()
        assert s.engines.asked[10:] == [0], "the least loaded one, as it has nothing to do"
        s.engines.open.set()
        assert sorted(await asyncio.gather(*requests)) == [(0, 1)] + [(1, 0)] * 7
        assert s.pool._unfinished == [0, 0]

    asyncio.run(scene())


def test_the_only_engine_is_waited_for() -> None:
    async def scene() -> None:
        s = Scene(1)
        requests = s.ask(3)
        await turns()
        s.engines.die(0)
        await turns()
        assert s.engines.asked == [0, 0, 0] and not any(request.done() for request in requests)
        s.back.set()
        s.engines.open.set()
        assert await asyncio.gather(*requests) == [(0, 1)] * 3
        # Every method on all waits as well, and is called on the engine that is back.
        s.engines.die(0)
        s.back.clear()
        peaks = asyncio.create_task(s.pool.on_all(EngineWorker.take_peak))
        await turns()
        assert not peaks.done()
        s.back.set()
        assert await peaks == [(0, 2)]

    asyncio.run(scene())


def test_an_engine_that_comes_back_while_the_actor_trains_serves_only_after_the_next_update() -> None:
    async def scene() -> None:
        s = Scene(2)
        s.engines.open.set()
        s.back.set()
        await s.pool.expire(drop=True)
        s.engines.die(0)
        assert await s.pool.any_lost()
        await s.pool.settled()
        assert await asyncio.gather(*s.ask(4)) == [(1, 0)] * 4, "engine 0 has old weights"
        s.pool.arrived(1)
        assert sorted(await asyncio.gather(*s.ask(4))) == [(0, 1)] * 2 + [(1, 0)] * 2

    asyncio.run(scene())


def test_after_the_last_allowed_restart_the_death_is_the_error_everywhere() -> None:
    async def scene() -> None:
        s = Scene(2, limit=1)
        s.back.set()
        s.engines.die(0)
        s.engines.open.set()
        await asyncio.gather(*s.ask(2))
        await s.pool.settled()
        s.engines.die(1)
        s.engines.die(0)
        for call in (s.pool.generate([1], SAMPLING), s.pool.settled(), s.pool.on_all(EngineWorker.wake)):
            with pytest.raises(WorkerDied, match=r"engine [01] died"):
                await call
        assert len(s.said) == 1 and s.health.metrics() == {"restarts/engines": 1.0, "restarts/run": 0.0}

    asyncio.run(scene())


@pytest.mark.parametrize("is_broken", [True, False])
def test_an_error_is_the_request_s_own_unless_the_engine_no_longer_answers(is_broken: bool) -> None:
    async def scene() -> None:
        s = Scene(1)
        s.back.set()
        s.engines.open.set()
        s.engines.broken.add(0)
        if is_broken:
            assert await s.pool.generate([1], SAMPLING) == (0, 1)
            return
        original: Callable[..., Any] = s.engines.call

        async def call(index: int, method: Any, *arguments: object) -> Any:
            return (0, 0) if method is EngineWorker.beat else await original(index, method, *arguments)

        s.engines.call = call  # type: ignore[method-assign]
        with pytest.raises(WorkerError, match="it is broken"):
            await s.pool.generate([1], SAMPLING)

    asyncio.run(scene())


def test_an_engine_that_hangs_is_found_and_named() -> None:
    async def scene() -> None:
        s = Scene(1)
        s.back.set()
        forever = asyncio.Event()

        async def call(index: int, method: Any, *arguments: object) -> Any:
            if method is EngineWorker.beat and s.engines.lives[0] == 0:
                await forever.wait()
            return index, s.engines.lives[index]

        s.engines.call = call  # type: ignore[method-assign]
        s.pool.watch(0.05)
        while not s.said:
            await asyncio.sleep(0.01)
        assert s.said[0].startswith(
            "engine 0 has not answered for 0.05 s (--engine_timeout); engine 0 is restarted (1 of"
        )
        await s.pool.settled()
        await asyncio.sleep(0.2)
        assert len(s.said) == 1, "it answers now"
        s.pool.close()

    asyncio.run(scene())


def test_who_is_waited_for_longest_comes_first() -> None:
    health = Health()
    assert health.stalled_for() == 0 and health.waiting() == []
    with (
        health.calling("actor 0", "update"),
        health.calling("engine 1", "generate"),
        health.calling("engine 1", "generate"),
    ):
        lines = health.waiting()
        assert [line.partition(" for ")[0] for line in lines] == [
            "actor 0 has not answered update",
            "engine 1 has not answered generate",
        ]
        assert lines[1].endswith("(2 calls)")
        with health.calling("engine 1", "beat"):
            assert len(health.waiting()) == 2, "a look after an engine is no work"
    assert health.stalled_for() == 0


def test_the_idle_share_is_between_none_and_all_whatever_the_clock_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock finds it a second later; an engine that is busy throughout is never idle."""
    seconds = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(seconds)))

    async def scene() -> list[float]:
        one = Scene(2)
        one.pool.take_idle_share()
        shares = [one.pool.take_idle_share()]
        tasks = one.ask(2)
        await turns()
        one.pool.take_idle_share()
        shares.append(one.pool.take_idle_share())
        one.engines.open.set()
        await asyncio.gather(*tasks)
        return shares

    assert asyncio.run(scene()) == [1.0, 0.0]
