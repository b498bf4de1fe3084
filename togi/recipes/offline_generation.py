"""On-policy distillation (``--on_policy_share``): some rows of a step get a response of the student's own.

A generation engine in this process holds a copy of the student, brought up to date before each generation. What it samples
replaces the response of the row's data, and the divergence from the teacher is learned on it (``togi.learn.distill_objective``
has the formula and the papers). Which rows, and the seed of each response, depend on ``--seed``, the step and the row's place
only, so a run repeats and resumes.

Each rank has its own engine and generates for its own share of the rows; then all ranks know all responses. Gathering the
weights takes all ranks anyway, so none of them is sent twice. Not here: generating while training, several responses to a row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from togi.config.choices import EngineName
from togi.config.offline import KDConfig, OfflineConfig
from togi.errors import ConfigError
from togi.learn.distill_objective import GENERATED
from togi.learn.learner import Learner
from togi.learn.scorer import Scorer
from togi.model.checkpoint import expected_manifest, whole_tensors
from togi.model.hub import local_folder
from togi.model.loading import dtype_of
from togi.model.policy import PolicyModel, ScalarModel
from togi.model.weights import Manifest, pack_buckets
from togi.obs import names
from togi.parallel.process import World
from togi.recipes.offline_data import Data
from togi.recipes.offline_plan import EpochPlan
from togi.recipes.offline_steps import Dealer
from togi.rollout.collect import Seeded
from togi.rollout.create import create_engine
from togi.rollout.engine import EngineSettings, RolloutEngine
from togi.rollout.parity import check_probe, compare, probe
from togi.sample import FinishReason, Generation, Sample, Sampling

BUCKET_BYTES = 256 << 20


def check_ranks(config: KDConfig, world: World) -> None:
    """Raise ConfigError where vLLM would have to share a process with one rank of several."""
    if config.on_policy_share > 0 and config.rollout_engine is EngineName.VLLM and world.size > 1:
        raise ConfigError(
            f"--rollout_engine vllm cannot run inside one of {world.size} training processes, whose process group it would "
            "take for its own: use --rollout_engine transformers, or one process."
        )


def start_engines(config: OfflineConfig, world: World) -> list[RolloutEngine]:
    """This rank's engine, if the settings want one. It comes before the models: vLLM measures the memory that is left for it
    and sets the global seed.
    """
    if not isinstance(config, KDConfig) or config.on_policy_share == 0:
        return []
    on_cpu = world.device.type == "cpu"
    settings = EngineSettings(
        model=local_folder(config.pretrain),
        dtype="bfloat16" if config.bf16 else "float32",
        max_model_len=config.max_len,
        seed=config.seed + world.rank,
        enforce_eager=config.enforce_eager or on_cpu,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        kv_cache_gb=config.vllm_cpu_kv_cache_gb,
        trust_remote_code=config.trust_remote_code,
        device_index=0 if world.device.index is None else world.device.index,
    )
    return [create_engine(config.rollout_engine, settings)]


def places_to_answer(plan: EpochPlan, step: int, share: float) -> list[int]:
    """Which rows of a step, by their place in it, the student answers.

    As many as bring the number since the start of the run to ``share`` x rows, rounded down: exact in the long run for any
    batch size.
    """
    before, rows = plan.rows_before(step), len(plan.rows_of(step))
    number = int((before + rows) * share) - int(before * share)
    order: list[int] = np.random.default_rng([plan.seed, step, 1]).permutation(rows).tolist()
    return sorted(order[:number])


def answered(sample: Sample, response: Sequence[int]) -> Sample:
    """The row's prompt with a generated response, all of it in the loss and nothing that was not generated."""
    tokens = np.concatenate([sample.tokens[: sample.prompt_length], np.asarray(response, dtype=np.int64)])
    mask = np.arange(len(tokens)) >= sample.prompt_length
    return replace(sample, tokens=tokens, loss_mask=mask, streams={}, values={**sample.values, GENERATED: 1.0})


@dataclass(frozen=True, slots=True)
class _Generated:
    """What one rank generated: responses by place, and seconds."""

    responses: Mapping[int, Generation]
    seconds: float


class Student:
    """The model in training as a generator. Every method but ``close`` is called by all ranks together."""

    def __init__(
        self,
        config: OfflineConfig,
        engine: RolloutEngine,
        model: PolicyModel | ScalarModel,
        learner: Learner,
        plan: EpochPlan,
        data: Data,
        dealer: Dealer,
    ) -> None:
        assert isinstance(config, KDConfig)
        self._config, self._engine, self._model, self._backend = config, engine, model, learner.backend
        self._plan, self._dealer, self._world = plan, dealer, learner.backend.world
        self._policy = Scorer(learner.backend.module, self._world)
        self._sampling = Sampling(config.generate_max_len, config.temperature, stop_token_ids=data.stop_token_ids)
        self._probe = probe(data.train[0][0].tokens.tolist(), config.max_len)
        self._dtype = dtype_of(config.bf16)
        dtype = str(self._dtype).removeprefix("torch.")
        self._tensors = expected_manifest(local_folder(config.pretrain), dtype, config.trust_remote_code)

    def answer(self, samples: Sequence[Sample], step: int) -> tuple[list[Sample], dict[str, float]]:
        """The samples of a step, some with a new response, and the metrics of the generation.

        Every sample has the value ``generated``, 1 or 0. Raises WeightSyncError if the engine does not hold the weights.
        """
        places = places_to_answer(self._plan, step, self._config.on_policy_share)
        result = [replace(sample, values={**sample.values, GENERATED: 0.0}) for sample in samples]
        if not places:
            return result, {}
        mine = places[self._world.rank :: self._world.size]
        prompts = {place: samples[place].tokens[: samples[place].prompt_length].tolist() for place in mine}
        own, metrics = asyncio.run(self._renew_and_generate(prompts, step))
        parts = self._world.gather("responses", own)
        generations = {place: each for part in parts for place, each in part.responses.items()}
        for place in places:
            result[place] = answered(samples[place], generations[place].tokens)
        lengths = [len(each.tokens) for each in generations.values()]
        cut = [each.finish_reason is FinishReason.LENGTH for each in generations.values()]
        return result, metrics | {
            names.LENGTH_RESPONSE: float(np.mean(lengths)),
            names.LENGTH_TRUNCATED: float(np.mean(cut)),
            names.THROUGHPUT_GENERATE: sum(lengths) / max(part.seconds for part in parts),
        }

    def close(self) -> None:
        """Stop the engine."""
        asyncio.run(self._engine.shutdown())

    async def _renew_and_generate(
        self, prompts: Mapping[int, Sequence[int]], step: int
    ) -> tuple[_Generated, dict[str, float]]:
        """Give the engine the weights of now, see that it has them, and generate. In between it gives back its cache."""
        await self._engine.wake()
        start = time.perf_counter()
        await self._send_weights(step + 1)
        synced = time.perf_counter()
        difference = await self._compare()
        begun = time.perf_counter()
        name = f"{self._config.seed}/{step}"
        jobs = [
            Seeded(self._engine.generate, f"{name}/{place}")(prompt, self._sampling)
            for place, prompt in prompts.items()
        ]
        responses = await asyncio.gather(*jobs)
        own = _Generated(dict(zip(prompts, responses, strict=True)), time.perf_counter() - begun)
        await self._engine.sleep()
        return own, {names.MISMATCH_PROBE_MEAN_ABS: difference, names.WEIGHT_SYNC_SECONDS: synced - start}

    async def _send_weights(self, version: int) -> None:
        await self._engine.begin_update(Manifest(version, self._tensors))
        whole = whole_tensors(self._model, self._backend.full_parameters, self._dtype)
        for bucket in pack_buckets(whole, BUCKET_BYTES):
            await self._engine.load_bucket(bucket)
        await self._engine.finish_update()

    async def _compare(self) -> float:
        """The largest mean difference of log-probs of an engine and the trainer on the probe, over ranks."""
        (trainer,) = self._dealer.logprobs(self._policy, [self._probe])
        engine = await self._engine.score(self._probe.tokens.tolist())
        return check_probe(self._world.max("probe", [compare(engine, trainer.tolist())])[0])
