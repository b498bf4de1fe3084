"""The models of an offline run.

On-policy distillation (``--on_policy_share``): the student answers some rows of a step itself.

A generation engine in this process holds a copy of the student, synced before each generation. Its response replaces the
response of the row, and the divergence from the teacher is trained on it (``togi.methods.kd_objective`` has formula and papers).
The choice of rows and the seed of each response depend only on ``--seed``, the step and the row's place, so a run repeats and
resumes.

Each rank has its own engine and generates for its share of the rows; then all responses are gathered. All ranks gather the
weights anyway, so no weight is sent twice. Not supported: generating while training, several responses per row.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from togi.config.choices import EngineName
from togi.errors import ConfigError
from togi.learn.learner import Learner
from togi.learn.schedule import planned
from togi.learn.scorer import Scorer
from togi.methods.method import GENERATED, Method
from togi.methods.training import Dealer, Frozen, Material, Preparation, Share
from togi.model.checkpoint import expected_manifest, whole_tensors
from togi.model.loading import ModelSource, dtype_of, load_causal_lm, load_scalar_model, read_config
from togi.model.policy import PolicyModel, ScalarModel
from togi.obs import names
from togi.parallel import frozen, frozen_on_host, reads_parts, trainable
from togi.parallel.backend import BackendOptions, backend_options
from togi.parallel.groups import Ring
from togi.parallel.process import World, be_deterministic
from togi.rollout import create_engine
from togi.rollout.collect import seeded
from togi.rollout.engine import EngineSettings, RolloutEngine
from togi.run.journal import Journal
from togi.run.offline_data import Data, with_reference
from togi.run.plan import EpochPlan
from togi.sample import FinishReason, Generation, Sample, Sampling
from togi.weights.buckets import Manifest, pack_buckets
from togi.weights.files import local_folder
from togi.weights.updates import check_probe, compare, probe

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
        self._config, self._how = config, config.on_policy
        self._engine, self._model, self._backend = engine, model, learner.backend
        self._plan, self._dealer, self._world = plan, dealer, learner.backend.world
        # The probe compares engine and trainer after each sync; the manifest tells the engine which tensors will come.
        self._policy = Scorer(learner.backend.module, self._world)
        self._sampling = Sampling(
            config.on_policy.generate_max_len, config.on_policy.temperature, stop_token_ids=data.stop_token_ids
        )
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
        responses, seconds, metrics = asyncio.run(self._renew_and_generate(prompts, step))
        parts = self._world.gather("responses", (responses, seconds))
        generations = {place: each for part, _ in parts for place, each in part.items()}
        for place in places:
            result[place] = answered(samples[place], generations[place].tokens)
        # Metrics over all ranks: time is that of the slowest.
        lengths = [len(each.tokens) for each in generations.values()]
        cut = [each.finish_reason is FinishReason.LENGTH for each in generations.values()]
        return result, metrics | {
            names.LENGTH_RESPONSE: float(np.mean(lengths)),
            names.LENGTH_TRUNCATED: float(np.mean(cut)),
            names.THROUGHPUT_GENERATE: sum(lengths) / max(seconds for _, seconds in parts),
        }

    def close(self) -> None:
        """Stop the engine."""
        asyncio.run(self._engine.shutdown())

    async def _renew_and_generate(
        self, prompts: Mapping[int, Sequence[int]], step: int
    ) -> tuple[dict[int, Generation], float, dict[str, float]]:
        """Wake the engine, send the current weights, check them on the probe, generate, and put the engine to sleep.

        Returns the responses by place, the seconds that they took, and metrics.
        """
        await self._engine.wake()
        start = time.perf_counter()
        await self._engine.begin_update(Manifest(step + 1, self._tensors))
        whole = whole_tensors(self._model, self._backend.full_parameters, self._dtype)
        for bucket in pack_buckets(whole, BUCKET_BYTES):
            await self._engine.load_bucket(bucket)
        await self._engine.finish_update()
        synced = time.perf_counter()
        # The largest mean difference of logprobs between an engine and the trainer on the probe, over ranks.
        (trainer,) = self._dealer.logprobs(self._policy, [self._probe])
        engine = await self._engine.score(self._probe.tokens.tolist())
        difference = check_probe(self._world.max("probe", [compare(engine, trainer.tolist())])[0])
        begun = time.perf_counter()
        name = f"{self._config.seed}/{step}"
        jobs = [
            seeded(self._engine.generate, f"{name}/{place}")(prompt, self._sampling)
            for place, prompt in prompts.items()
        ]
        responses = dict(zip(prompts, await asyncio.gather(*jobs), strict=True))
        seconds = time.perf_counter() - begun
        await self._engine.sleep()
        metrics = {names.MISMATCH_PROBE_MEAN_ABS: difference, names.WEIGHT_SYNC_SECONDS: synced - start}
        return responses, seconds, metrics


CLASSIFIER = "ForSequenceClassification"


@dataclass(frozen=True, slots=True, eq=False)
class Models:
    """The model in training, the rows (read or precomputed), and the preparation of the steps.

    ``students``: the model in training as a generator, one with ``--on_policy_share``, else none.
    """

    data: Data
    model: PolicyModel | ScalarModel
    learner: Learner
    policy: Scorer
    dealer: Dealer
    prepare: Preparation
    students: tuple[Student, ...]


def load_models(config: Method, data: Data, plan: EpochPlan, world: World, journal: Journal) -> Models:
    """Load every model onto this rank's device. Random numbers start from ``--seed``, the same on every rank."""
    # Stage 1: engines, before any model takes memory.
    engines = start_engines(config, world)
    if config.full_determinism:
        be_deterministic()
    load, dealer = Loading(config, world), dealer_of(config, world)
    # Stage 2: a reference of its own scores all rows and is freed before the policy is loaded.
    if config.scores_ahead and not base_is_reference(config):
        data = with_reference(config, config.reference, data, load.reference, dealer, journal)
    # Stage 3: the model in training, sharded, with its schedule and loss.
    torch.manual_seed(config.seed)
    model = load.trained()
    vocabulary = model.vocabulary if isinstance(model, PolicyModel) else 0
    backend = trainable(model, world, load.options, model.read)
    schedule = planned(config, config.learning_rate, plan.steps)
    # Teachers are whole on every rank.
    whole = replace(load.options, zero_stage=0)
    teachers = tuple(load.frozen(path, whole) for path in (config.teacher,) if path)
    objective = config.objective(Material(data.train, teachers, vocabulary))
    max_norm = config.max_norm if config.max_norm > 0 else math.inf
    learner = Learner(backend, objective, schedule, max_norm, config.aux_loss_coef)
    policy = Scorer(backend.module, world)
    # Stage 4: the reference. With LoRA it is the base inside the policy, so it comes after the policy.
    if config.scores_ahead and base_is_reference(config):
        data = with_reference(config, config.reference, data, lambda: _base(policy), dealer, journal)
    prepare: Preparation = Share(dealer)
    if config.reference and not config.scores_ahead:
        reference = _base(policy) if base_is_reference(config) else load.reference()
        prepare = config.preparation(dealer, policy, reference)
    students = tuple(Student(config, engine, model, learner, plan, data, dealer) for engine in engines)
    return Models(data, model, learner, policy, dealer, prepare, students)


def base_is_reference(config: Method) -> bool:
    """Whether the reference is the frozen base inside a LoRA policy. Then no second copy is loaded."""
    return config.lora is not None and config.reference == config.pretrain


def offload_notice(config: Method, world: World) -> str:
    """Why an offload flag has no effect here; "" if it has or is not set."""
    flag = config.offload_flag
    if flag and base_is_reference(config):
        return f"{flag}: with --lora_rank the reference is the base inside the policy, there is no second model to move"
    if flag and world.device.type == "cpu":
        return f"{flag}: there is no accelerator here, all weights are in host memory anyway"
    return ""


def moves_weights(config: Method, world: World) -> bool:
    """Whether frozen weights are in host memory and are copied to the device for use."""
    return config.offload_flag != "" and world.device.type != "cpu"


def dealer_of(config: Method, world: World) -> Dealer:
    """The dealer of micro-batches. Its flags count rows; a pair is two sequences. A ring has the token budget of all its ranks."""
    rows = config.micro_train_batch_size if config.packing_samples else 1
    most = None if rows == "auto" else rows * config.width
    return Dealer(world, config.max_tokens_per_gpu * world.ring_size, most, share_prefix=config.width > 1)


class Loading:
    """Loads the models of this rank, each into its ring. All ranks make one, and call it, together."""

    def __init__(self, config: Method, world: World) -> None:
        self.config, self.world = config, world
        self.options = backend_options(config, bf16=config.bf16)
        self._ring = Ring(world) if world.ring_size > 1 else None

    def trained(self) -> PolicyModel | ScalarModel:
        """The model in training. A reward model from a language model gets a new head; one that has a head keeps it."""
        config, source = self.config, self._source(self.config.pretrain, self.options, trained=True)
        model: PolicyModel | ScalarModel
        if config.is_scalar:
            kinds = read_config(config.pretrain, config.trust_remote_code).architectures or ()
            init_head = not any(kind.endswith(CLASSIFIER) for kind in kinds)
            model = load_scalar_model(source, init_head=init_head, value_head_prefix=config.head)
        else:
            model = load_causal_lm(source)
        self._join(model)
        return model

    def frozen(self, path: str, options: BackendOptions) -> Frozen:
        """A frozen language model, in host memory if an offload flag is set."""
        model = load_causal_lm(self._source(path, options, trained=False))
        self._join(model)
        if moves_weights(self.config, self.world):
            return Frozen(model, frozen_on_host(model, self.world, options, model.read))
        frozen(model, self.world, options, model.read)
        return Frozen(model, nullcontext)

    def reference(self) -> Scorer:
        """The reference model as a copy of its own, frozen."""
        reference = self.frozen(self.config.reference, self.options)
        return Scorer(reference.model, self.world, reference.around)

    def _join(self, model: PolicyModel | ScalarModel) -> None:
        if self._ring is not None:
            model.join_ring(self._ring, self.config.ring_head_stride)

    def _source(self, path: str, options: BackendOptions, *, trained: bool) -> ModelSource:
        world, defer = self.world, reads_parts(self.world, options, trained=trained)
        in_ring = world.ring_size > 1
        return ModelSource.of(self.config, path, world.device, in_ring=in_ring, trained=trained, defer=defer)


def _base(policy: Scorer) -> Scorer:
    """The frozen base of a LoRA policy as the reference."""
    from togi.model.adapters import without_adapter

    return Scorer(policy.module, policy.world, partial(without_adapter, policy.module))
