"""What an offline command reads: the task behind its settings, its tokenizer and rows."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from togi.config.offline import (
    DPOConfig,
    KDConfig,
    KTOConfig,
    OfflineConfig,
    PRMConfig,
    RMConfig,
    SFTConfig,
)
from togi.data.chat import Tokenizer, end_notice, enders, load_tokenizer, stop_token_ids
from togi.data.record_spec import RecordSpec
from togi.data.records import Examples, StepExamples, load_pairs, load_sft, load_steps, load_unpaired
from togi.data.report import DataReport
from togi.data.vocabulary import check_tokens, check_vocabulary
from togi.errors import ConfigError
from togi.model.loading import check_causal_lm, known_tokens
from togi.obs import names
from togi.obs.progress import Progress
from togi.parallel.process import World
from togi.recipes.best_metric import PREFIX, offline_aim
from togi.run.plan import EpochPlan

UNLIMITED = 2**62
# Which labels an evaluation needs for what it measures of KTO's rows: 1 desirable, 0 undesirable.
_LABELS_OF: Mapping[str, frozenset[float]] = {
    names.REWARD_CHOSEN: frozenset({1.0}),
    names.REWARD_REJECTED: frozenset({0.0}),
    names.REWARD_MARGIN: frozenset({0.0, 1.0}),
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Task:
    """What a command reads and which models it needs beside the one in training.

    ``width``: sequences a row. ``scalar``: the model in training has a scalar head. ``reference``, ``teacher``: folders of
    frozen models, "" for none. ``mismatched``: the loss needs a KL estimate from mismatched pairs.
    """

    load: Callable[[RecordSpec, Tokenizer], Examples]
    width: int = 1
    scalar: bool = False
    reference: str = ""
    teacher: str = ""
    mismatched: bool = False


def task_of(config: OfflineConfig) -> Task:
    """The task behind a command's settings."""
    match config:
        case SFTConfig():
            return Task(load_sft)
        case RMConfig():
            return Task(load_pairs, width=2, scalar=True)
        case DPOConfig():
            return Task(load_pairs, width=2, reference=config.ref_pretrain or config.pretrain)
        case KTOConfig():
            return Task(load_unpaired, reference=config.ref_pretrain or config.pretrain, mismatched=True)
        case PRMConfig():
            return Task(load_steps)
        case KDConfig():
            return Task(load_sft, teacher=config.teacher_model)
    raise AssertionError(f"no task for {type(config).__name__}")


@dataclass(frozen=True, slots=True)
class Data:
    """``held_out`` is empty without ``--eval_dataset``: none or one set. ``stop_token_ids``: each ends an answer."""

    tokenizer: Tokenizer
    stop_token_ids: tuple[int, ...]
    train: Examples
    held_out: tuple[Examples, ...]

    @property
    def reports(self) -> Mapping[str, DataReport]:
        """By the name of the file that each goes to."""
        sets = (self.train, *self.held_out)
        return {name: examples.report for name, examples in zip(("train", "eval"), sets, strict=False)}


def load_data(config: OfflineConfig, task: Task, world: World, progress: Progress) -> Data:
    """The tokenizer and all rows. The first rank reads first: a mistake in a row is told once, and the others find its
    tokenised rows in the cache (on other machines too, where they share the folder).
    """
    with progress.phase("reading data", expected_seconds=8):
        check_causal_lm(
            config.pretrain,
            flash_attn=uses_flash(config, world),
            trust_remote_code=config.trust_remote_code,
            lora=config.lora,
            balanced=config.aux_loss_coef > 0,
            asked=f"--max_len {config.max_len}",
            longest=config.max_len,
        )
        tokenizer = load_tokenizer(
            config.pretrain, chat_template=config.tokenizer_chat_template, trust_remote_code=config.trust_remote_code
        )
        spec = record_spec(config, config.dataset, config.split, training=True)
        rows = {
            path: known_tokens(path, config.trust_remote_code)
            for path in dict.fromkeys((config.pretrain, task.reference, task.teacher))
            if path
        }
        for path, known in rows.items():
            check_vocabulary(tokenizer, path, known, apply_chat_template=spec.apply_chat_template)
        if not world.is_first:
            world.barrier("first rank has read the data")
        train = task.load(spec, tokenizer)
        held_out = []
        if config.eval_dataset is not None:
            held_out.append(
                task.load(record_spec(config, config.eval_dataset, config.eval_split, training=False), tokenizer)
            )
        if world.is_first:
            world.barrier("first rank has read the data")
        for path, known in rows.items():
            check_tokens(tokenizer, path, known, lambda: max(each.largest_token() for each in (train, *held_out)))
    if isinstance(config, KDConfig):
        check_same_tokens(config, tokenizer)
    return Data(tokenizer, _ends(config, spec, task, tokenizer, train), train, tuple(held_out))


def _ends(
    config: OfflineConfig, spec: RecordSpec, task: Task, tokenizer: Tokenizer, train: Examples
) -> tuple[int, ...]:
    """The tokens that end an answer: those that the files name, and in a chat those that the rows teach. Says what is new."""
    stops = stop_token_ids(tokenizer, config.pretrain, chat=spec.apply_chat_template)
    if not spec.apply_chat_template or task.scalar:
        return stops
    taught = enders(tokenizer, train.last_tokens())
    if notice := end_notice(tokenizer, config.pretrain, taught):
        logger.warning("%s", notice)
    return tuple(sorted({*stops, *taught}))


def check_plan(config: OfflineConfig, plan: EpochPlan, data: Data) -> None:
    """What only the rows can tell: KTO's KL estimate needs two prompts in every step, a generated response needs one, and a
    metric that the best model is chosen by needs rows to measure it on. Raises ConfigError.
    """
    if isinstance(config, KDConfig) and config.on_policy_share > 0 and 0 in data.train.prompt_lengths():
        raise ConfigError(
            "--on_policy_share lets the student answer prompts, but there are rows in --dataset without any: fill --input_key "
            "or set --input_template."
        )
    kinds = {examples.labels.soft for examples in (data.train, *data.held_out) if isinstance(examples, StepExamples)}
    if len(kinds) > 1:
        raise ConfigError(
            "--dataset and --eval_dataset have labels of two kinds, tokens in one and probabilities in the other: "
            "use one kind."
        )
    if not isinstance(config, KTOConfig):
        return
    _check_best(config, data)
    why = "and KTO pairs each prompt with the answer to another"
    for step in range(plan.steps):
        rows = plan.rows_of(step)
        if not _two_prompts(data.train, rows):
            raise ConfigError(
                f"--train_batch_size {plan.batch}: step {step + 1} would get {len(rows)} of the {plan.rows} rows, with only "
                f"one distinct prompt, {why}: choose another size, another --seed, or mix the data."
            )
    for examples in data.held_out:
        if not _two_prompts(examples, range(len(examples))):
            raise ConfigError(f"--eval_dataset has only one distinct prompt, {why}: add rows, or leave it out.")


def _check_best(config: KTOConfig, data: Data) -> None:
    """The rewards of desirable and undesirable rows can be measured if there are such rows."""
    aim = offline_aim(config)
    needed = _LABELS_OF.get(aim.metric.removeprefix(PREFIX), frozenset()) if aim is not None else frozenset()
    for examples in data.held_out:
        found = set[float]()
        for (sample,) in examples:
            found.add(sample.values["desirable"])
            if found >= needed:
                break
        else:
            missing = "desirable" if 1.0 in needed - found else "undesirable"
            raise ConfigError(
                f"--best_metric_key {config.best_metric_key} needs {missing} rows in --eval_dataset, which has none: choose "
                "another metric, such as eval/loss, or add rows."
            )


def _two_prompts(examples: Examples, rows: Sequence[int]) -> bool:
    """Whether these rows have more than one prompt."""
    first = examples.prompt(rows[0])
    return any(examples.prompt(row) != first for row in rows)


def check_same_tokens(config: KDConfig, tokenizer: Tokenizer) -> None:
    """Teacher and student must mean the same by every token. Raises ConfigError."""
    teacher = load_tokenizer(config.teacher_model, chat_template=None, trust_remote_code=config.trust_remote_code)
    if teacher.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"--teacher_model {config.teacher_model} has another vocabulary than --pretrain {config.pretrain}: "
            "distillation compares them token by token, choose two models with one tokenizer."
        )


def record_spec(config: OfflineConfig, dataset: str, split: str, *, training: bool) -> RecordSpec:
    """How to read a set. Probabilities and the cap belong to the training set."""
    known = {field.name for field in dataclasses.fields(RecordSpec)}
    values = {name: value for name, value in config.model_dump().items() if name in known}
    limits = {} if training else {"dataset_probs": None, "max_samples": UNLIMITED}
    return RecordSpec(**{**values, **limits, "dataset": dataset, "split": split})


def uses_flash(config: OfflineConfig, world: World) -> bool:
    """FlashAttention is for CUDA; elsewhere segments run through SDPA. A ring has attention of its own."""
    return config.flash_attn and world.device.type == "cuda" and world.ring_size == 1
