"""``--precompute_ref``: the reference scores every row once before training, and is not in memory during it.

The logprobs at the tokens in the loss, float32, are in one file per data set in the folder ``reference`` of the run. They are
memory-mapped. The file name is a digest of what the values depend on, so a resumed run finds them, and another model or other
rows make a new file. Ranks on several machines need a shared disk, as they do for checkpoints.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from togi.data.records import Examples
from togi.learn.policy_objective import REF_LOGPROBS
from togi.learn.scorer import Scorer
from togi.methods.method import Method
from togi.methods.training import Dealer
from togi.model.hub import local_folder
from togi.recipes.offline_data import Data
from togi.run.journal import Journal
from togi.version import __version__

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
        _release()
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


def _release() -> None:
    """Free the memory of a model that nothing references any more."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
