"""On-policy distillation (``--on_policy_share``): the student answers some rows of a step itself.

A generation engine in this process holds a copy of the student, synced before each generation. Its response replaces the
response of the row, and the divergence from the teacher is trained on it (``togi.methods.kd_objective`` has formula and papers).
The choice of rows and the seed of each response depend only on ``--seed``, the step and the row's place, so a run repeats and
resumes.

Each rank has its own engine and generates for its share of the rows; then all responses are gathered. All ranks gather the
weights anyway, so no weight is sent twice. Not supported: generating while training, several responses per row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from togi.config.choices import EngineName
from togi.errors import ConfigError
from togi.learn.learner import Learner
from togi.learn.scorer import Scorer
from togi.methods.method import Method
from togi.methods.on_policy import GENERATED
from togi.methods.training import Dealer
from togi.model.checkpoint import expected_manifest, whole_tensors
from togi.model.hub import local_folder
from togi.model.loading import dtype_of
from togi.model.policy import PolicyModel, ScalarModel
from togi.model.weights import Manifest, pack_buckets
from togi.obs import names
from togi.parallel.process import World
from togi.recipes.offline_data import Data
from togi.rollout.collect import Seeded
from togi.rollout.create import create_engine
from togi.rollout.engine import EngineSettings, RolloutEngine
from togi.rollout.parity import check_probe, compare, probe
from togi.run.plan import EpochPlan
from togi.sample import FinishReason, Generation, Sample, Sampling

BUCKET_BYTES = 256 << 20


def check_ranks(config: Method, world: World) -> None:
    """Raise ConfigError if vLLM would have to share a process with one rank of several."""
    how = config.on_policy
    if how is not None and how.rollout_engine is EngineName.VLLM and world.size > 1:
        raise ConfigError(
            f"--rollout_engine vllm cannot run inside one of {world.size} training processes, whose process group it would "
            "take for its own: use --rollout_engine transformers, or one process."
        )


def start_engines(config: Method, world: World) -> list[RolloutEngine]:
    """This rank's engine, if the settings need one. It starts before the models, because vLLM measures the free memory and sets
    the global seed.
    """
    how = config.on_policy
    if how is None:
        return []
    on_cpu = world.device.type == "cpu"
    settings = EngineSettings(
        model=local_folder(config.pretrain),
        dtype="bfloat16" if config.bf16 else "float32",
        max_model_len=config.max_len,
        seed=config.seed + world.rank,
        enforce_eager=how.enforce_eager or on_cpu,
        gpu_memory_utilization=how.vllm_gpu_memory_utilization,
        kv_cache_gb=how.vllm_cpu_kv_cache_gb,
        trust_remote_code=config.trust_remote_code,
        device_index=0 if world.device.index is None else world.device.index,
    )
    return [create_engine(how.rollout_engine, settings)]


def places_to_answer(plan: EpochPlan, step: int, share: float) -> list[int]:
    """The rows of a step that the student answers, by their place in the step.

    Their number brings the total since the start of the run to ``share`` x rows, rounded down, so the share is exact in the long
    run for any batch size.
    """
    before, rows = plan.rows_before(step), len(plan.rows_of(step))
    number = int((before + rows) * share) - int(before * share)
    order: list[int] = np.random.default_rng([plan.seed, step, 1]).permutation(rows).tolist()
    return sorted(order[:number])


def answered(sample: Sample, response: Sequence[int]) -> Sample:
    """The row's prompt with a generated response. The loss is on the response only."""
    tokens = np.concatenate([sample.tokens[: sample.prompt_length], np.asarray(response, dtype=np.int64)])
    mask = np.arange(len(tokens)) >= sample.prompt_length
    return replace(sample, tokens=tokens, loss_mask=mask, streams={}, values={**sample.values, GENERATED: 1.0})


@dataclass(frozen=True, slots=True)
class _Generated:
    """The output of one rank: responses by place, and seconds."""

    responses: Mapping[int, Generation]
    seconds: float


class Student:
    """The model in training as a generator. All ranks call every method together, except ``close``."""

    def __init__(
        self,
        config: Method,
        engine: RolloutEngine,
        model: PolicyModel | ScalarModel,
        learner: Learner,
        plan: EpochPlan,
        data: Data,
        dealer: Dealer,
    ) -> None:
        assert config.on_policy is not None
        how = config.on_policy
        self._config, self._how = config, how
        self._engine, self._model, self._backend = engine, model, learner.backend
        self._plan, self._dealer, self._world = plan, dealer, learner.backend.world
        # The probe compares engine and trainer after each sync; the manifest tells the engine which tensors will come.
        self._policy = Scorer(learner.backend.module, self._world)
        self._sampling = Sampling(how.generate_max_len, how.temperature, stop_token_ids=data.stop_token_ids)
        self._probe = probe(data.train[0][0].tokens.tolist(), config.max_len)
        self._dtype = dtype_of(config.bf16)
        dtype = str(self._dtype).removeprefix("torch.")
        self._tensors = expected_manifest(local_folder(config.pretrain), dtype, config.trust_remote_code)

    def answer(self, samples: Sequence[Sample], step: int) -> tuple[list[Sample], dict[str, float]]:
        """The samples of a step, some with a new response, and the metrics of the generation.

        Every sample gets the value ``generated``, 1 or 0. Raises WeightSyncError if engine and trainer disagree on the probe.
        """
        places = places_to_answer(self._plan, step, self._how.on_policy_share)
        result = [replace(sample, values={**sample.values, GENERATED: 0.0}) for sample in samples]
        if not places:
            return result, {}
        # Every rank generates for its part, and all responses are gathered.
        mine = places[self._world.rank :: self._world.size]
        prompts = {place: samples[place].tokens[: samples[place].prompt_length].tolist() for place in mine}
        own, metrics = asyncio.run(self._renew_and_generate(prompts, step))
        parts = self._world.gather("responses", own)
        generations = {place: each for part in parts for place, each in part.responses.items()}
        for place in places:
            result[place] = answered(samples[place], generations[place].tokens)
        # Metrics over all ranks: time is that of the slowest.
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
        """Wake the engine, send the current weights, check them on the probe, generate, and put the engine to sleep."""
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
        """The largest mean difference of logprobs between an engine and the trainer on the probe, over ranks."""
        (trainer,) = self._dealer.logprobs(self._policy, [self._probe])
        engine = await self._engine.score(self._probe.tokens.tolist())
        return check_probe(self._world.max("probe", [compare(engine, trainer.tolist())])[0])
