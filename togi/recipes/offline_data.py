"""The data of a command on fixed data: tokenizer and rows."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from togi.data.chat import Tokenizer, end_notice, enders, load_tokenizer, stop_token_ids
from togi.data.record_spec import RecordSpec
from togi.data.records import Examples
from togi.data.report import DataReport
from togi.data.vocabulary import check_tokens, check_vocabulary
from togi.errors import ConfigError
from togi.methods.method import Method
from togi.model.loading import check_causal_lm, known_tokens
from togi.obs.progress import Progress
from togi.parallel.process import World
from togi.run.plan import EpochPlan

UNLIMITED = 2**62
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
            for path in dict.fromkeys((config.pretrain, config.reference, config.teacher))
            if path
        }
        for path, known in rows.items():
            check_vocabulary(tokenizer, path, known, apply_chat_template=spec.apply_chat_template)
        # Stage 2: the other ranks wait here until the first has filled the cache.
        if not world.is_first:
            world.barrier("first rank has read the data")
        train = config.load(spec, tokenizer)
        held_out = []
        if config.eval_dataset is not None:
            held_out.append(
                config.load(record_spec(config, config.eval_dataset, config.eval_split, training=False), tokenizer)
            )
        if world.is_first:
            world.barrier("first rank has read the data")
        # Stage 3: every model has an embedding row for every token of the data.
        for path, known in rows.items():
            check_tokens(tokenizer, path, known, lambda: max(each.largest_token() for each in (train, *held_out)))
    if config.teacher:
        check_same_tokens(config, tokenizer)
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


def check_same_tokens(config: Method, tokenizer: Tokenizer) -> None:
    """Check that teacher and student have the same vocabulary. Raises ConfigError."""
    teacher = load_tokenizer(config.teacher, chat_template=None, trust_remote_code=config.trust_remote_code)
    if teacher.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"--teacher_model {config.teacher} has another vocabulary than --pretrain {config.pretrain}: "
            "distillation compares them token by token, choose two models with one tokenizer."
        )


def record_spec(config: Method, dataset: str, split: str, *, training: bool) -> RecordSpec:
    """How to read a data set. Probabilities and --max_samples apply to the training set only."""
    known = {field.name for field in dataclasses.fields(RecordSpec)}
    values = {name: value for name, value in config.model_dump().items() if name in known}
    limits = {} if training else {"dataset_probs": None, "max_samples": UNLIMITED}
    return RecordSpec(**{**values, **limits, "dataset": dataset, "split": split})


def uses_flash(config: Method, world: World) -> bool:
    """Whether FlashAttention runs: on CUDA only (elsewhere SDPA), and not in a ring, which has its own attention."""
    return config.flash_attn and world.device.type == "cuda" and world.ring_size == 1
