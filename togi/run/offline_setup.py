"""What a run on fixed data is made of: tokenizer and rows, models, and a student that answers.

``--precompute_ref``: the reference scores every row once before training, and is not in memory during it. The logprobs at the
tokens in the loss, float32, are in one file per data set in the folder ``reference`` of the run. They are memory-mapped. The file
name is a digest of what the values depend on, so a resumed run finds them, and another model or other rows make a new file. Ranks
on several machines need a shared disk, as they do for checkpoints.

On-policy distillation (``--on_policy_share``): the student answers some rows of a step itself. A generation engine in this process
holds a copy of the student, synced before each generation. Its response replaces the response of the row, and the divergence from
the teacher is trained on it (``togi.methods.kd_objective`` has formula and papers). The choice of rows and the seed of each
response depend only on ``--seed``, the step and the row's place, so a run repeats and resumes. Each rank has its own engine and
generates for its share of the rows; then all responses are gathered. All ranks gather the weights anyway, so no weight is sent
twice. Not supported: generating while training, several responses per row.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.lib.format import open_memmap

from togi.algo.partial_attention import has_flash
from togi.config.choices import EngineName
from togi.data.chat import Tokenizer, check_tokens, check_vocabulary, end_notice, enders, load_tokenizer, stop_token_ids
from togi.data.precheck import RecordSpec
from togi.data.records import Examples
from togi.data.report import DataReport
from togi.errors import ConfigError, DataError
from togi.learn.learner import Learner
from togi.learn.objective import REF_LOGPROBS
from togi.learn.schedule import planned
from togi.learn.scorer import Scorer
from togi.methods.method import GENERATED, Method
from togi.methods.training import Dealer, Frozen, Material, Preparation, Share
from togi.model.checkpoint import expected_manifest, whole_tensors
from togi.model.loading import ModelSource, dtype_of, known_tokens, load_causal_lm, load_scalar_model, read_config
from togi.model.policy import PolicyModel, ScalarModel
from togi.obs import names
from togi.obs.progress import Progress
from togi.parallel import frozen, reads_parts, trainable
from togi.parallel.backend import BackendOptions
from togi.parallel.groups import Ring
from togi.parallel.process import World, be_deterministic
from togi.rollout import create_engine
from togi.rollout.collect import seeded
from togi.rollout.engine import RolloutEngine
from togi.run.journal import Journal
from togi.run.loading import UNLIMITED, check_start, engine_settings, spec_of, tokenizer_of
from togi.run.plan import EpochPlan
from togi.sample import FinishReason, Generation, Sample, Sampling
from togi.version import __version__
from togi.weights.buckets import Manifest, pack_buckets
from togi.weights.files import local_folder
from togi.weights.updates import check_probe, compare, probe

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Data:
    """``held_out``: none or one set, empty without ``--eval_dataset``. ``stop_token_ids``: each ends an answer."""

    tokenizer: Tokenizer
    stop_token_ids: tuple[int, ...]
    train: Examples
    held_out: tuple[Examples, ...]

    @property
    def reports(self) -> Mapping[str, DataReport]:
        """The data reports, by the name of the folder that each goes to."""
        sets = (self.train, *self.held_out)
        return {name: examples.report for name, examples in zip(("train", "eval"), sets, strict=False)}


def load_data(config: Method, world: World, progress: Progress) -> Data:
    """Load the tokenizer and all rows. The first rank reads first: a bad row is reported once, and the other ranks find the
    tokenised rows in the cache (on other machines too if they share the folder).
    """
    with progress.phase("reading data", expected_seconds=8):
        # Stage 1: model and tokenizer fit together; no weights are read.
        flash, asked = uses_flash(config, world), f"--max_len {config.max_len}"
        check_start(config, flash_attn=flash, asked=asked, longest=config.max_len)
        tokenizer = tokenizer_of(config)
        spec = record_spec(config, config.dataset, config.split, training=True)
        rows = {
            path: known_tokens(path, config.trust_remote_code)
            for path in dict.fromkeys((config.pretrain, config.reference, config.teacher))
            if path
        }
        for path, known in rows.items():
            check_vocabulary(tokenizer, path, known, apply_chat_template=spec.apply_chat_template)
        # Stage 2: the other ranks wait until the first has filled the cache. All have the same rows then.
        specs = [spec]
        if config.eval_dataset is not None:
            specs.append(record_spec(config, config.eval_dataset, config.eval_split, training=False))
        train, *held_out = world.in_turn("reading data", lambda: [config.load(each, tokenizer) for each in specs])
        found = world.gather("fingerprints of the rows", [each.fingerprint() for each in (train, *held_out)])
        if other := [rank for rank, rows_there in enumerate(found) if rows_there != found[0]]:
            raise DataError(
                f"The process of rank {other[0]} has read other rows than that of rank 0: start all with the same flags, and with "
                "the same files of --dataset and --eval_dataset on every machine."
            )
        # Stage 3: every model has an embedding row for every token of the data.
        for path, known in rows.items():
            check_tokens(tokenizer, path, known, lambda: max(each.largest_token() for each in (train, *held_out)))
    if config.teacher:
        teacher = load_tokenizer(config.teacher, chat_template=None, trust_remote_code=config.trust_remote_code)
        if teacher.get_vocab() != tokenizer.get_vocab():
            raise ConfigError(
                f"--teacher_model {config.teacher} has another vocabulary than --pretrain {config.pretrain}: "
                "distillation compares them token by token, choose two models with one tokenizer."
            )
    return Data(tokenizer, _ends(config, spec, tokenizer, train), train, tuple(held_out))


def _ends(config: Method, spec: RecordSpec, tokenizer: Tokenizer, train: Examples) -> tuple[int, ...]:
    """The tokens that end an answer: those of the model files and, in a chat, those that the rows teach. Warns about new ones."""
    stops = stop_token_ids(tokenizer, config.pretrain, chat=spec.apply_chat_template)
    if not spec.apply_chat_template or config.is_scalar:
        return stops
    taught = enders(tokenizer, train.last_tokens())
    if notice := end_notice(tokenizer, config.pretrain, taught):
        logger.warning("%s", notice)
    return tuple(sorted({*stops, *taught}))


def check_plan(config: Method, plan: EpochPlan, data: Data) -> None:
    """Check what depends on the rows and on their order in the steps. Raises ConfigError."""
    config.check_rows(data.train, data.held_out, (plan.rows_of(step) for step in range(plan.steps)))


def record_spec(config: Method, dataset: str, split: str, *, training: bool) -> RecordSpec:
    """How to read a data set. Probabilities and --max_samples apply to the training set only."""
    whole = {} if training else {"dataset_probs": None, "max_samples": UNLIMITED}
    return spec_of(RecordSpec, config, dataset=dataset, split=split, **whole)


def uses_flash(config: Method, world: World) -> bool:
    """Whether FlashAttention runs: on CUDA and in bfloat16 (elsewhere SDPA), and not in a ring, which has its own attention."""
    return config.flash_attn and config.bf16 and has_flash(world.device) and world.ring_size == 1


FOLDER = "reference"
ROWS_AT_ONCE = 512


def with_reference(
    config: Method, reference: str, data: Data, load: Callable[[], Scorer], dealer: Dealer, journal: Journal
) -> Data:
    """The same rows with the stream ``ref_logprobs``. All ranks call together.

    ``reference``: folder or hub name of the model that ``load`` returns; ``load`` is called only if a file is missing.
    """
    world, sets = dealer.world, (data.train, *data.held_out)
    # Only the first rank looks at the disk, so that all ranks agree on what is missing.
    wanted = _files(config, reference, sets, journal.root / FOLDER) if world.is_first else []
    files = world.gather("reference files", [(file, file.is_file()) for file in wanted])[0]
    missing = {file: examples for (file, exists), examples in zip(files, sets, strict=True) if not exists}
    if missing:
        with journal.progress.phase("scoring with the reference"):
            _score(load, missing, dealer, journal)
        # Nothing references the model any more: free its memory.
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
    scored = [
        examples.scored(REF_LOGPROBS, np.load(file, mmap_mode="r"))
        for (file, _), examples in zip(files, sets, strict=True)
    ]
    return replace(data, train=scored[0], held_out=tuple(scored[1:]))


def _files(config: Method, reference: str, sets: Sequence[Examples], folder: Path) -> list[Path]:
    """The file for the values of each set."""
    # The model's files by name, size and time stand for its weights.
    model = Path(local_folder(reference))
    files = sorted(path for path in model.iterdir() if path.suffix in (".json", ".safetensors"))
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    how = (__version__, str(model.resolve()), facts, config.bf16, config.flash_attn, config.load_in_4bit)
    names = [
        hashlib.blake2b(f"{how} {examples.fingerprint()}".encode(), digest_size=12).hexdigest() for examples in sets
    ]
    return [folder.absolute() / f"{name}.npy" for name in names]


def _score(load: Callable[[], Scorer], missing: Mapping[Path, Examples], dealer: Dealer, journal: Journal) -> None:
    """Write the missing files. Each rank scores a part of the rows; the first one writes."""
    scorer = load()
    for file, examples in missing.items():
        aside = file.with_suffix(".unfinished")
        numbers = np.empty(0, dtype=np.float32)
        if dealer.world.is_first:
            aside.parent.mkdir(parents=True, exist_ok=True)
            shape = (int(sum(examples.learned())),)  # a NumPy integer is written in a form that np.load refuses
            numbers = open_memmap(aside, "w+", np.float32, shape)  # type: ignore[no-untyped-call]
        place = 0
        for start in range(0, len(examples), ROWS_AT_ONCE):
            part = _logprobs(scorer, examples, range(start, min(start + ROWS_AT_ONCE, len(examples))), dealer)
            if dealer.world.is_first:
                numbers[place : place + len(part)] = part
            place += len(part)
            journal.beat()
        # Renamed when complete: an interrupted file is never read.
        if isinstance(numbers, np.memmap):
            numbers.flush()
            aside.replace(file)
    dealer.world.barrier("reference has scored")


def _logprobs(scorer: Scorer, examples: Examples, rows: Sequence[int], dealer: Dealer) -> np.ndarray:
    """The logprobs of some rows, concatenated in their order, from all ranks."""
    samples = [sample for row in rows for sample in examples[row]]
    places = dealer.places(samples)
    own = dealer.logprobs(scorer, [samples[i] for i in places[dealer.world.share]])
    found: dict[int, np.ndarray] = {}
    for indices, arrays in zip(places, dealer.world.gather_shares("reference log-probs", own), strict=True):
        found.update(zip(indices, arrays, strict=True))
    return np.concatenate([found[i] for i in range(len(samples))])


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
    settings = replace(
        engine_settings(config, how, config.max_len),
        seed=config.seed + world.rank,
        gpu_memory_utilization=how.vllm_gpu_memory_utilization,
        enable_sleep_mode=True,
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

    def __init__(self, config: Method, engine: RolloutEngine, models: Models, plan: EpochPlan) -> None:
        assert config.on_policy is not None
        self._config, self._how, self._engine = config, config.on_policy, engine
        self._models, self._plan, self._world = models, plan, models.dealer.world
        stops, how = models.data.stop_token_ids, config.on_policy
        self._sampling = Sampling(how.generate_max_len, how.temperature, stop_token_ids=stops)
        # The probe compares engine and trainer after each sync; the manifest tells the engine which tensors will come.
        self._probe = probe(models.data.train[0][0].tokens.tolist(), config.max_len)
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
        whole = whole_tensors(self._models.model, self._models.learner.backend.full_parameters, self._dtype)
        for bucket in pack_buckets(whole, BUCKET_BYTES):
            await self._engine.load_bucket(bucket)
        await self._engine.finish_update()
        synced = time.perf_counter()
        # The largest mean difference of logprobs between an engine and the trainer on the probe, over ranks.
        (trainer,) = self._models.dealer.logprobs(self._models.policy, [self._probe])
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
        await self._engine.sleep(keep_weights=False)
        metrics = {names.MISMATCH_PROBE_MEAN_ABS: difference, names.WEIGHT_SYNC_SECONDS: synced - start}
        return responses, seconds, metrics


CLASSIFIER = "ForSequenceClassification"
Model = TypeVar("Model", PolicyModel, ScalarModel)


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
    students: tuple[Student, ...] = ()


def load_models(config: Method, data: Data, plan: EpochPlan, world: World, journal: Journal) -> Models:
    """Load every model onto this rank's device. Random numbers start from ``--seed``, the same on every rank."""
    # Stage 1: engines, before any model takes memory.
    engines = start_engines(config, world)
    if config.full_determinism:
        be_deterministic()
    # The flags of micro-batches count rows; a pair is two sequences. A ring has the token budget of all its ranks.
    rows = config.micro_train_batch_size if config.packing_samples else 1
    most = None if rows == "auto" else rows * config.width
    # Dropout is another one for each row, also where rows begin alike.
    dealer = Dealer(world, config.max_tokens_per_gpu * world.ring_size, most, share_prefix=config.lora_dropout == 0)
    load = Loading(config, world)
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
    models = Models(data, model, learner, policy, dealer, prepare)
    return replace(models, students=tuple(Student(config, engine, models, plan) for engine in engines))


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


class Loading:
    """Loads the models of this rank, each into its ring. All ranks make one, and call it, together."""

    def __init__(self, config: Method, world: World) -> None:
        self.config, self.world = config, world
        self.options = BackendOptions.of(config)
        self._ring = Ring(world) if world.ring_size > 1 else None

    def trained(self) -> PolicyModel | ScalarModel:
        """The model in training. A reward model from a language model gets a new head; one that has a head keeps it."""
        config, source = self.config, self._source(self.config.pretrain, self.options, trained=True)
        if not config.is_scalar:
            return self._joined(load_causal_lm(source))
        kinds = read_config(config.pretrain, config.trust_remote_code).architectures or ()
        init_head = not any(kind.endswith(CLASSIFIER) for kind in kinds)
        return self._joined(load_scalar_model(source, init_head=init_head, value_head_prefix=config.head))

    def frozen(self, path: str, options: BackendOptions) -> Frozen:
        """A frozen language model, in host memory if an offload flag is set."""
        model = self._joined(load_causal_lm(self._source(path, options, trained=False)))
        on_host = moves_weights(self.config, self.world)
        return Frozen(model, frozen(model, self.world, options, model.read, on_host=on_host))

    def reference(self) -> Scorer:
        """The reference model as a copy of its own, frozen."""
        reference = self.frozen(self.config.reference, self.options)
        return Scorer(reference.model, self.world, reference.around)

    def _joined(self, model: Model) -> Model:
        if self._ring is not None:
            model.join_ring(self._ring, self.config.ring_head_stride)
        return model

    def _source(self, path: str, options: BackendOptions, *, trained: bool) -> ModelSource:
        defer, in_ring = reads_parts(self.world, options, trained=trained), self.world.ring_size > 1
        return ModelSource.of(self.config, path, self.world.device, in_ring=in_ring, trained=trained, defer=defer)


def _base(policy: Scorer) -> Scorer:
    """The frozen base of a LoRA policy as the reference."""
    from togi.model.adapters import without_adapter

    return Scorer(policy.module, policy.world, partial(without_adapter, policy.module))
