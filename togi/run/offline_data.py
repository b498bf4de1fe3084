"""The data of a command on fixed data: tokenizer and rows.

``--precompute_ref``: the reference scores every row once before training, and is not in memory during it.

The logprobs at the tokens in the loss, float32, are in one file per data set in the folder ``reference`` of the run. They are
memory-mapped. The file name is a digest of what the values depend on, so a resumed run finds them, and another model or other
rows make a new file. Ranks on several machines need a shared disk, as they do for checkpoints.
"""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from togi.data.chat import Tokenizer, check_tokens, check_vocabulary, end_notice, enders, load_tokenizer, stop_token_ids
from togi.data.precheck import RecordSpec
from togi.data.records import Examples
from togi.data.report import DataReport
from togi.errors import ConfigError
from togi.learn.objective import REF_LOGPROBS
from togi.learn.scorer import Scorer
from togi.methods.method import Method
from togi.methods.training import Dealer
from togi.model.loading import known_tokens
from togi.obs.progress import Progress
from togi.parallel.process import World
from togi.run.journal import Journal
from togi.run.loading import UNLIMITED, check_start, spec_of, tokenizer_of
from togi.run.plan import EpochPlan
from togi.version import __version__
from togi.weights.files import local_folder

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
        # Stage 2: the other ranks wait here until the first has filled the cache.
        if not world.is_first:
            world.barrier("first rank has read the data")
        train = config.load(spec, tokenizer)
        held_out = []
        if config.eval_dataset is not None:
            evaluated = record_spec(config, config.eval_dataset, config.eval_split, training=False)
            held_out.append(config.load(evaluated, tokenizer))
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
    whole = {} if training else {"dataset_probs": None, "max_samples": UNLIMITED}
    return spec_of(RecordSpec, config, dataset=dataset, split=split, **whole)


def uses_flash(config: Method, world: World) -> bool:
    """Whether FlashAttention runs: on CUDA only (elsewhere SDPA), and not in a ring, which has its own attention."""
    return config.flash_attn and world.device.type == "cuda" and world.ring_size == 1


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
