"""vLLM with asynchronous scheduling, as it runs on GPUs: one batch is computed while the next one is scheduled.

vLLM turns it off on CPUs at the end of its platform's defaults, so it is turned on after them. The engine then has a queue of
batches: a finished or cancelled request may still be in one, when weights are updated or the engine sleeps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engines import GREEDY, PROMPTS, generate, manifest_of, settings, start_with_queue, weights
from tests.tiny import save_tiny_model
from togi.config.choices import EngineName
from togi.rollout import create_engine
from togi.rollout.engine import RolloutEngine
from togi.rollout.vllm_engine import VllmCore
from togi.sample import Generation
from togi.weights.buckets import pack_buckets

pytest.importorskip("vllm.platforms.cpu")
pytestmark = pytest.mark.busy
LONG = replace(GREEDY, max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [save_tiny_model(tmp_path_factory.mktemp(str(seed)), seed=seed) for seed in (1, 2)]


def answers(folder: Path) -> list[tuple[int, ...]]:
    """What an engine without a queue says."""
    engine = create_engine(EngineName.VLLM, settings(folder))
    said = [each.tokens for each in generate(engine, PROMPTS, GREEDY)]
    asyncio.run(engine.shutdown())
    return said


@pytest.fixture(scope="module")
def expected(folders: list[Path]) -> list[list[tuple[int, ...]]]:
    return [answers(folder) for folder in folders]


@pytest.fixture(scope="module")
def engine(expected: object, folders: list[Path]) -> Iterator[RolloutEngine]:
    running = start_with_queue(settings(folders[0]))
    core = running._core
    assert isinstance(core, VllmCore)
    assert core._engine.engine_core.engine_core.batch_queue is not None
    assert running.facts["async_scheduling"] is True
    assert running.facts["model_runner"] == "V1"  # without Triton
    yield running
    asyncio.run(running.shutdown())


def test_tokens_are_those_without_a_queue(engine: RolloutEngine, expected: list[list[tuple[int, ...]]]) -> None:
    assert [each.tokens for each in generate(engine, PROMPTS, GREEDY)] == expected[0]


def test_a_cancelled_request_leaves_nothing_behind(
    engine: RolloutEngine, expected: list[list[tuple[int, ...]]], folders: list[Path]
) -> None:
    """Its last batch may still be in the queue: sleep resets the prefix cache, which no request may hold."""

    async def scenario() -> Generation:
        doomed = asyncio.create_task(engine.generate(PROMPTS[2], LONG))
        kept = asyncio.create_task(engine.generate(PROMPTS[0], GREEDY))
        await asyncio.sleep(0.05)
        doomed.cancel()
        result = await kept
        while engine._running:
            await asyncio.sleep(0)
        await engine.sleep(keep_weights=True)
        await engine.wake()
        return result

    assert asyncio.run(scenario()).tokens == expected[0][0]
    assert [each.tokens for each in generate(engine, PROMPTS, GREEDY)] == expected[0]
    assert len(asyncio.run(engine.score(PROMPTS[2]))) == len(PROMPTS[2]) - 1


def test_an_update_right_after_the_last_answer(
    engine: RolloutEngine, expected: list[list[tuple[int, ...]]], folders: list[Path]
) -> None:
    async def update(folder: Path, version: int) -> None:
        tensors = weights(folder)
        await engine.begin_update(manifest_of(tensors, version))
        for bucket in pack_buckets(tensors, 20_000):
            await engine.load_bucket(bucket)
        await engine.finish_update()

    for version, place in enumerate((1, 0, 1), start=1):
        asyncio.run(update(folders[place], version))
        assert [each.tokens for each in generate(engine, PROMPTS, GREEDY)] == expected[place]
