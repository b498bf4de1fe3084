"""Weight updates while requests run: they go on with the new weights, and every token says which weights sampled it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engines import GREEDY, PROMPTS, engine_of, generate, manifest_of, weights
from tests.tiny import save_tiny_model
from togi.rollout.engine import RolloutEngine
from togi.sample import Generation, Sampling
from togi.weights.buckets import pack_buckets

pytest.importorskip("vllm.platforms.cpu")
pytestmark = pytest.mark.busy

LONG = replace(GREEDY, max_tokens=300, ignore_eos=True)
PROMPT = [(11 * j) % 250 for j in range(70)]  # two whole blocks of vLLM's cache, which others may share
KINDS = ["vllm", "vllm with a queue", "transformers"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape."""
    old, new = (save_tiny_model(tmp_path_factory.mktemp(str(seed)), seed=seed) for seed in (1, 2))
    return old, new


@pytest.fixture(params=[(kind, again) for kind in KINDS for again in (False, True)], ids=str)
def engine(request: pytest.FixtureRequest, folders: tuple[Path, Path]) -> Iterator[tuple[RolloutEngine, bool]]:
    """An engine with the old weights, and whether it computes keys and values again."""
    kind, recompute = request.param
    running = engine_of(kind, folders[0], recompute_kv=recompute)
    yield running, recompute
    asyncio.run(running.shutdown())


async def update(engine: RolloutEngine, folder: Path, version: int) -> None:
    tensors = weights(folder)
    await engine.begin_update(manifest_of(tensors, version))
    for bucket in pack_buckets(tensors, 20_000):
        await engine.load_bucket(bucket)
    await engine.finish_update()


async def in_the_middle(engine: RolloutEngine, sampling: Sampling, *updates: tuple[Path, int]) -> Generation:
    """A long answer to PROMPT with updates on its way."""
    running = asyncio.create_task(engine.generate(PROMPT, sampling))
    for folder, version in updates:
        await asyncio.sleep(0.05)
        await update(engine, folder, version)
    return await running


def logprobs(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].float()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def test_a_request_goes_on_with_the_weights_that_arrive(
    engine: tuple[RolloutEngine, bool], folders: tuple[Path, Path]
) -> None:
    running, recompute = engine
    _, new = folders
    alone = generate(running, [PROMPT], LONG)[0]
    got = asyncio.run(in_the_middle(running, LONG, (new, 3)))
    # Spans cover the tokens, in order; the budget is that of the request.
    before, after = got.versions.count(0), got.versions.count(3)
    assert got.versions == (0,) * before + (3,) * after
    assert before > 0
    assert after > 0
    assert len(got.tokens) == LONG.max_tokens == before + after
    # The first part is that of the old weights.
    assert got.tokens[:before] == alone.tokens[:before]
    assert np.allclose(got.logprobs[:before], alone.logprobs[:before], atol=1e-5)
    # The second: as if the new weights had read everything, if keys and values were computed again; else not.
    whole = logprobs(new, [*PROMPT, *got.tokens])[len(PROMPT) - 1 :]
    same = np.allclose(got.logprobs[before:], whole[before:], atol=1e-4)
    assert same == recompute
    # A request that comes now shares nothing with the one before, though it has its prompt.
    fresh = generate(running, [PROMPT], GREEDY)[0]
    assert set(fresh.versions) == {3}
    assert np.allclose(fresh.logprobs, logprobs(new, [*PROMPT, *fresh.tokens])[len(PROMPT) - 1 :], atol=1e-4)


def test_updates_to_equal_weights_change_nothing(
    engine: tuple[RolloutEngine, bool], folders: tuple[Path, Path]
) -> None:
    """Tokens, their seeds and the budget of a request belong to the request, however often it is stopped."""
    running, _ = engine
    sampling = replace(LONG, temperature=1.0, seed=5)
    alone = generate(running, [PROMPT], sampling)[0]
    got = asyncio.run(in_the_middle(running, sampling, *((folders[0], version) for version in (1, 2, 3))))
    assert got.tokens == alone.tokens
    assert np.allclose(got.logprobs, alone.logprobs, atol=1e-4)
    assert got.finish_reason == alone.finish_reason
    assert list(got.versions) == sorted(got.versions)
    assert len(set(got.versions)) > 1


def test_requests_wait_for_the_end_of_an_update(engine: tuple[RolloutEngine, bool], folders: tuple[Path, Path]) -> None:
    running, _ = engine
    tensors = weights(folders[1])

    async def scenario() -> tuple[bool, Generation]:
        await running.begin_update(manifest_of(tensors, 9))
        waiting = asyncio.create_task(running.generate(PROMPTS[0], GREEDY))
        await asyncio.sleep(0.1)
        was_waiting = not waiting.done()
        for bucket in pack_buckets(tensors, 20_000):
            await running.load_bucket(bucket)
        await running.finish_update()
        return was_waiting, await waiting

    was_waiting, got = asyncio.run(scenario())
    assert was_waiting
    assert set(got.versions) == {9}


def test_a_text_is_scored_while_requests_run(engine: tuple[RolloutEngine, bool], folders: tuple[Path, Path]) -> None:
    """More requests than the engine has places: the text is scored before those that wait, and all of them get their answers."""
    running, _ = engine
    each = [replace(LONG, max_tokens=40 + i) for i in range(20)]

    async def scenario() -> tuple[list[Generation], list[list[float]]]:
        answers = [asyncio.create_task(running.generate(PROMPTS[i % 6], each[i])) for i in range(20)]
        scores = []
        for _ in range(3):
            await asyncio.sleep(0.02)
            scores.append(await running.score(PROMPT))
        assert not all(answer.done() for answer in answers)
        return await asyncio.gather(*answers), scores

    answers, scores = asyncio.run(scenario())
    assert [len(answer.tokens) for answer in answers] == [40 + i for i in range(20)]
    alone = generate(running, [PROMPTS[i % 6] for i in range(20)], *each)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone]
    for score in scores:
        assert np.allclose(score, logprobs(folders[0], PROMPT), atol=1e-4)
