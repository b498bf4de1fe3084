"""Weight updates under load: more requests than places, shared prompts, cancelled and late requests, scores in between.

Weights alternate between two models, so the log-prob of every token says which weights, and which keys and values, it is of.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.engines import GREEDY, engine_of, manifest_of, settings, weights
from tests.tiny import save_tiny_model
from togi.errors import WeightSyncError
from togi.rollout.engine import Done, RolloutEngine
from togi.rollout.vllm_engine import VllmCore
from togi.sample import Generation, Sampling
from togi.weights.buckets import Manifest, pack_buckets

pytest.importorskip("vllm.platforms.cpu")
pytestmark = pytest.mark.busy

LONG = replace(GREEDY, max_tokens=300, ignore_eos=True)
PROMPT = [(11 * j) % 250 for j in range(70)]  # two whole blocks of vLLM's cache, which others may share
KINDS = ["vllm", "vllm with a queue", "transformers"]
PLACES = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape: even versions have the first, odd ones the second."""
    old, new = (save_tiny_model(tmp_path_factory.mktemp(str(seed)), seed=seed) for seed in (1, 2))
    return old, new


@pytest.fixture(scope="module")
def models(folders: tuple[Path, Path]) -> list[torch.nn.Module]:
    return [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders]


@pytest.fixture(params=[(kind, again) for kind in KINDS for again in (False, True)], ids=str)
def engine(request: pytest.FixtureRequest, folders: tuple[Path, Path]) -> Iterator[tuple[RolloutEngine, bool]]:
    """An engine with the old weights, and whether it computes keys and values again."""
    kind, recompute = request.param
    running = engine_of(kind, folders[0], recompute_kv=recompute)
    yield running, recompute
    asyncio.run(running.shutdown())


@pytest.fixture
def keeping(folders: tuple[Path, Path]) -> Iterator[RolloutEngine]:
    """vLLM that keeps keys and values over an update."""
    running = engine_of("vllm", folders[0])
    yield running
    asyncio.run(running.shutdown())


async def update(engine: RolloutEngine, folder: Path, version: int) -> None:
    tensors = weights(folder)
    await engine.begin_update(manifest_of(tensors, version))
    for bucket in pack_buckets(tensors, 20_000):
        await engine.load_bucket(bucket)
    await engine.finish_update()


def logprobs(model: torch.nn.Module, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].float() / (temperature or 1.0)
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def check(
    got: Generation, prompt: list[int], models: list[torch.nn.Module], temperature: float, *, all_tokens: bool
) -> None:
    """Each token has the log-prob of the weights that it names; without ``all_tokens`` those of the first version only."""
    assert list(got.versions) == sorted(got.versions)
    each = [logprobs(model, [*prompt, *got.tokens], temperature)[len(prompt) - 1 :] for model in models]
    expected = torch.stack([each[version % 2][i] for i, version in enumerate(got.versions)])
    count = len(got.tokens) if all_tokens else got.versions.count(got.versions[0])
    assert np.allclose(got.logprobs[:count], expected[:count], atol=1e-3), got.versions


@pytest.mark.large
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{"kv_cache_gb": 0.001}, {"enable_prefix_caching": False}], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_small_cache_and_none_for_prefixes(
    kind: str, changes: dict[str, Any], recompute: bool, folders: tuple[Path, Path], models: list[torch.nn.Module]
) -> None:
    """With a small cache vLLM stops requests itself and begins them again: tokens, seeds and budget stay."""
    running = engine_of(kind, folders[0], recompute_kv=recompute, **changes)
    asked = [Sampling(max_tokens=200 + i, temperature=1.0, seed=i, ignore_eos=True) for i in range(10)]

    async def scenario(updates: int) -> list[Generation]:
        tasks = [asyncio.create_task(running.generate(PROMPT, sampling)) for sampling in asked]
        for version in range(1, updates + 1):
            await asyncio.sleep(0.1)
            await update(running, folders[version % 2], version)
        return await asyncio.gather(*tasks)

    try:
        alone, answers = asyncio.run(scenario(0)), asyncio.run(scenario(4))
        if isinstance(running._core, VllmCore) and "kv_cache_gb" in changes:
            assert running._core._scheduler.kv_cache_manager.block_pool.num_gpu_blocks < 10 * 8
    finally:
        asyncio.run(running.shutdown())
    for sampling, before, got in zip(asked, alone, answers, strict=True):
        assert len(before.tokens) == len(got.tokens) == sampling.max_tokens
        own = got.versions.count(0)
        assert got.tokens[:own] == before.tokens[:own]
        if recompute:
            check(got, PROMPT, models, 1.0, all_tokens=True)


@pytest.mark.large
# vLLM's attention on CPUs has no soft caps, which gemma2 needs.
@pytest.mark.parametrize(
    ("name", "arch"),
    [(name, arch) for name in ("vllm", "transformers") for arch in ("qwen3", "mixtral")] + [("transformers", "gemma2")],
)
def test_other_architectures_compute_again(name: str, arch: str, tmp_path: Path) -> None:
    pair = tuple(save_tiny_model(tmp_path / str(seed), arch, seed=seed) for seed in (1, 2))
    known = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in pair]
    running = engine_of(name, pair[0], recompute_kv=True)

    async def scenario() -> list[Generation]:
        tasks = [asyncio.create_task(running.generate(prompt, LONG)) for prompt in (PROMPT, PROMPT[:30], [4])]
        for version in (1, 2, 3):
            await asyncio.sleep(0.1)
            await update(running, pair[version % 2], version)
        return await asyncio.gather(*tasks)

    try:
        answers = asyncio.run(scenario())
    finally:
        asyncio.run(running.shutdown())
    for prompt, got in zip((PROMPT, PROMPT[:30], [4]), answers, strict=True):
        assert len(set(got.versions)) > 1
        check(got, prompt, known, 0.0, all_tokens=True)


@pytest.mark.large
@pytest.mark.parametrize("seed", range(2))
def test_every_token_is_of_the_weights_it_names(
    engine: tuple[RolloutEngine, bool], folders: tuple[Path, Path], models: list[torch.nn.Module], seed: int
) -> None:
    running, recompute = engine
    chance = random.Random(seed)
    prompts = [PROMPT, PROMPT[:40], [*PROMPT, 7, 8], [3, 1, 4], PROMPT[:64]]
    asked: list[tuple[list[int], Sampling]] = []
    for i in range(40):
        sampling = Sampling(
            max_tokens=chance.choice([1, 20, 90, 250, 500]),
            temperature=chance.choice([0.0, 1.0]),
            min_tokens=chance.choice([1, 15]),
            seed=i,
            ignore_eos=chance.random() < 0.5,
        )
        asked.append((chance.choice(prompts), sampling))

    async def one(prompt: list[int], sampling: Sampling, delay: float) -> Generation:
        await asyncio.sleep(delay)
        return await running.generate(prompt, sampling)

    async def scenario() -> list[Generation | BaseException]:
        tasks = [asyncio.create_task(one(*each, chance.random() * 1.5)) for each in asked]
        doomed = {5, 11, 23, 31}
        version = 0
        while not all(task.done() for task in tasks):
            version += 1
            await asyncio.sleep(chance.random() * 0.3)
            if chance.random() < 0.3:  # an update that is given up half way
                tensors = [(name, 3 * tensor) for name, tensor in weights(folders[1])]
                await running.begin_update(manifest_of(tensors, 1000))
                await running.load_bucket(next(iter(pack_buckets(tensors, 20_000))))
                if doomed:
                    tasks[doomed.pop()].cancel()
                await asyncio.sleep(0.02)
            await update(running, folders[version % 2], version)
            if chance.random() < 0.5:
                score = await running.score(PROMPT)
                assert np.allclose(score, logprobs(models[version % 2], PROMPT), atol=1e-4)
            if doomed and chance.random() < 0.5:
                tasks[doomed.pop()].cancel()
        assert version > 3
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(asyncio.wait_for(scenario(), 30))
    assert not running._running and not running._waiting
    for (prompt, sampling), got in zip(asked, answers, strict=True):
        if isinstance(got, asyncio.CancelledError):
            continue
        assert isinstance(got, Generation), got
        budget = min(sampling.max_tokens, 400 - len(prompt))
        assert len(got.tokens) <= budget
        assert len(got.tokens) >= min(sampling.min_tokens, budget)
        if sampling.ignore_eos:
            assert len(got.tokens) == budget
        if sampling.min_tokens == 1:  # else end tokens are forbidden at first
            check(got, prompt, models, sampling.temperature, all_tokens=recompute)


def test_a_request_that_had_no_place_yet_reads_no_older_blocks(
    keeping: RolloutEngine, folders: tuple[Path, Path], models: list[torch.nn.Module]
) -> None:
    """It was accepted under the old weights, and gets its place under the new ones; blocks of its prompt are still in use."""

    async def scenario() -> Generation:
        running = [
            asyncio.create_task(keeping.generate(PROMPT, replace(LONG, max_tokens=60 + 30 * i))) for i in range(PLACES)
        ]
        await asyncio.sleep(0.03)
        late = asyncio.create_task(keeping.generate(PROMPT, GREEDY))
        await asyncio.sleep(0.01)
        await update(keeping, folders[1], 1)
        await asyncio.gather(*running)
        return await late

    got = asyncio.run(scenario())
    assert set(got.versions) == {1}
    assert np.allclose(got.logprobs, logprobs(models[1], [*PROMPT, *got.tokens])[len(PROMPT) - 1 :], atol=1e-4)


def test_weights_that_come_again_under_their_number_leave_no_block(
    keeping: RolloutEngine, folders: tuple[Path, Path], models: list[torch.nn.Module]
) -> None:
    """``finish_update`` promises it for every update, whatever its number."""

    async def scenario() -> Generation:
        running = asyncio.create_task(keeping.generate(PROMPT, LONG))
        await asyncio.sleep(0.03)
        await update(keeping, folders[1], keeping.version)
        late = await keeping.generate(PROMPT, GREEDY)
        await running
        return late

    got = asyncio.run(scenario())
    assert np.allclose(got.logprobs, logprobs(models[1], [*PROMPT, *got.tokens])[len(PROMPT) - 1 :], atol=1e-4)


def test_a_text_that_waits_for_a_place_does_not_stop_the_engine(keeping: RolloutEngine) -> None:
    """All places are taken. A cancelled request frees one at once."""
    core = keeping._core
    assert isinstance(core, VllmCore)
    steps, step = [0], core.step

    def counted() -> Done:
        steps[0] += 1
        return step()

    core.step = counted  # type: ignore[method-assign]

    async def scenario() -> int:
        running = [asyncio.create_task(keeping.generate([i], replace(LONG, max_tokens=390))) for i in range(PLACES)]
        await asyncio.sleep(0.05)
        scoring = asyncio.create_task(keeping.score(PROMPT))
        await asyncio.sleep(0.02)
        for task in running:
            task.cancel()
        before = steps[0]
        assert before < 300
        await scoring
        return steps[0] - before

    assert asyncio.run(scenario()) < 20


@pytest.fixture
def core(folders: tuple[Path, Path]) -> Iterator[VllmCore]:
    running = VllmCore(settings(folders[0]))
    yield running
    running.close()


def test_what_ends_in_the_step_that_scores_is_not_lost(core: VllmCore) -> None:
    """The text goes ahead of what waits, so that its result is the first of the step."""
    for key in range(3):
        core.add(key, tuple(PROMPT), replace(GREEDY, max_tokens=1))
    core.score(9, tuple(PROMPT))
    found = core.step()
    for _ in range(5):
        found |= core.step()
    assert sorted(found) == [0, 1, 2, 9]


def test_an_update_right_after_a_request_was_cancelled(
    engine: tuple[RolloutEngine, bool], folders: tuple[Path, Path], models: list[torch.nn.Module]
) -> None:
    """Its last step may be in flight, and what was computed for it must neither arrive nor stay in use."""
    running, recompute = engine

    async def scenario() -> tuple[Generation, list[Generation]]:
        kept = asyncio.create_task(running.generate(PROMPT, replace(LONG, max_tokens=330)))
        late = []
        for version in range(1, 7):
            doomed = [asyncio.create_task(running.generate(PROMPT, LONG)) for _ in range(3)]
            await asyncio.sleep(0.03)
            scoring = asyncio.create_task(running.score(PROMPT))
            for task in doomed:
                task.cancel()
            await asyncio.sleep(0)
            await update(running, folders[version % 2], version)
            late.append(asyncio.create_task(running.generate(PROMPT, GREEDY)))
            await scoring
        return await kept, await asyncio.gather(*late)

    kept, late = asyncio.run(asyncio.wait_for(scenario(), 120))
    asyncio.run(running.sleep())  # refused while a request runs, and if a block is still in use
    assert len(kept.tokens) == 330
    for got in late:
        check(got, PROMPT, models, 0.0, all_tokens=recompute)
    check(kept, PROMPT, models, 0.0, all_tokens=recompute)


def test_a_call_that_is_given_up_leaves_the_engine_alone(folders: tuple[Path, Path]) -> None:
    """Its caller was cancelled, as by a deadline or by the failure of another call."""
    running = engine_of("transformers", folders[0])

    async def scenario() -> Generation:
        answer = asyncio.create_task(running.generate(PROMPT, LONG))
        await asyncio.sleep(0.03)
        for _ in range(5):
            scoring = asyncio.create_task(running.score(PROMPT))
            await asyncio.sleep(0)
            scoring.cancel()
            await asyncio.gather(scoring, return_exceptions=True)
        return await answer

    try:
        assert len(asyncio.run(scenario()).tokens) == LONG.max_tokens
    finally:
        asyncio.run(running.shutdown())


def test_a_refused_update_does_not_stop_what_runs(
    engine: tuple[RolloutEngine, bool], folders: tuple[Path, Path]
) -> None:
    running, _ = engine

    async def scenario() -> Generation:
        answer = asyncio.create_task(running.generate(PROMPT, LONG))
        await asyncio.sleep(0.03)
        right = manifest_of(weights(folders[1]), 1)
        with pytest.raises(WeightSyncError):
            await running.begin_update(Manifest(1, right.tensors[1:]))
        return await asyncio.wait_for(answer, 20)

    assert set(asyncio.run(scenario()).versions) == {0}


def test_requests_fail_when_the_engine_is_stopped_in_an_update(
    engine: tuple[RolloutEngine, bool], folders: tuple[Path, Path]
) -> None:
    running, _ = engine

    async def scenario() -> list[object]:
        answer = asyncio.create_task(running.generate(PROMPT, LONG))
        await asyncio.sleep(0.03)
        await running.begin_update(manifest_of(weights(folders[1]), 1))
        late = asyncio.create_task(running.generate(PROMPT, LONG))
        gone = asyncio.create_task(running.generate(PROMPT, LONG))
        await asyncio.sleep(0.03)
        gone.cancel()
        await asyncio.sleep(0.03)
        await running.shutdown()
        return await asyncio.wait_for(asyncio.gather(answer, late, gone, return_exceptions=True), 5)

    first, second, third = asyncio.run(scenario())
    assert isinstance(first, RuntimeError) and "shut down" in str(first)
    assert isinstance(second, RuntimeError) and "shut down" in str(second)
    assert isinstance(third, asyncio.CancelledError)


@pytest.mark.large
@pytest.mark.parametrize("recompute", [False, True])
def test_whole_weights_and_an_adapter_reach_a_running_request_in_two_processes(
    folders: tuple[Path, Path], models: list[torch.nn.Module], tmp_path: Path, recompute: bool
) -> None:
    """Version 1 is the second model, version 2 the first one with an adapter of two layers."""
    tensors, adapter = dict(weights(folders[0])), list[tuple[str, torch.Tensor]]()
    torch.manual_seed(0)
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        rows, columns = tensors[f"{layer}.weight"].shape
        a, b = torch.randn(3, columns) / 4, torch.randn(rows, 3) / 4
        adapter += [(f"{layer}.lora_A.weight", a), (f"{layer}.lora_B.weight", b)]
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"] + 2 * b @ a
    merged = shutil.copytree(folders[0], tmp_path / "merged")
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    known = [*models, AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()]
    engine = engine_of("vllm", folders[0], tensor_parallel_size=2, recompute_kv=recompute)

    async def scenario() -> tuple[list[Generation], Generation]:
        running = [asyncio.create_task(engine.generate(prompt, LONG)) for prompt in (PROMPT, PROMPT, [5, 6])]
        await asyncio.sleep(0.3)
        await update(engine, folders[1], 1)
        late = asyncio.create_task(engine.generate(PROMPT, GREEDY))
        await asyncio.sleep(0.3)
        manifest = manifest_of(adapter, 2)
        await engine.begin_update(Manifest(2, manifest.tensors, 2.0))
        for bucket in pack_buckets(adapter, 20_000):
            await engine.load_bucket(bucket)
        await engine.finish_update()
        assert np.allclose(await engine.score(PROMPT), logprobs(known[2], PROMPT), atol=1e-4)
        return await asyncio.gather(*running), await late

    try:
        answers, late = asyncio.run(scenario())
    finally:
        asyncio.run(engine.shutdown())
    for prompt, got in zip((PROMPT, PROMPT, [5, 6], PROMPT), (*answers, late), strict=True):
        each = torch.stack([logprobs(model, [*prompt, *got.tokens])[len(prompt) - 1 :] for model in known])
        expected = torch.stack([each[version, i] for i, version in enumerate(got.versions)])
        count = len(got.tokens) if recompute else got.versions.count(got.versions[0])
        assert np.allclose(got.logprobs[:count], expected[:count], atol=1e-3)
        assert np.allclose(got.logprobs, expected, atol=1e-3) == (recompute or count == len(got.tokens))
    for got in answers:
        assert (set(got.versions), len(got.tokens)) == ({0, 1, 2}, 300)


@pytest.mark.large
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_penalties_and_seeds_survive_many_updates(
    engine: tuple[RolloutEngine, bool], folders: tuple[Path, Path], penalty: float
) -> None:
    """Updates to equal weights change nothing, up to the last token that the model has room for."""
    running, _ = engine
    sampling = Sampling(
        max_tokens=1000, temperature=1.0, top_p=0.9, seed=3, min_tokens=200, repetition_penalty=penalty, ignore_eos=True
    )

    async def scenario() -> Generation:
        answer = asyncio.create_task(running.generate(PROMPT, sampling))
        version = 0
        while not answer.done():
            version += 1
            await asyncio.sleep(0.02)
            await update(running, folders[0], version)
        return await answer

    alone = asyncio.run(running.generate(PROMPT, sampling))
    got = asyncio.run(scenario())
    assert len(alone.tokens) == 400 - len(PROMPT)
    assert len(set(got.versions)) > 2
    assert got.tokens == alone.tokens
    assert np.allclose(got.logprobs, alone.logprobs, atol=1e-3)
