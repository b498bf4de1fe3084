"""A row -> an answer with a label, desirable or not, for KTO; and the mismatched rows of a batch for its KL estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from togi.data.chat import Tokenizer
from togi.data.faults import Drop, RowError
from togi.data.fields import value_of
from togi.data.masks import Draft
from togi.data.record_spec import RecordSpec
from togi.data.sft import read_sft
from togi.data.tables import Row
from togi.errors import DataError
from togi.sample import Sample

# The cells of a CSV file are always strings: as they are written by hand, by Python and by tables with missing values.
LABELS: Mapping[object, float] = {0: 0.0, 1: 1.0} | {
    text: label for label, texts in ((0.0, ("0", "0.0", "false")), (1.0, ("1", "1.0", "true"))) for text in texts
}


def read_unpaired(row: Row, where: str, spec: RecordSpec, tokenizer: Tokenizer) -> tuple[Draft, ...] | Drop:
    """One draft as for supervised fine-tuning, with values "desirable" (1 or 0) and "mismatched" (0)."""
    label = value_of(row, where, "label_key", spec.label_key)
    known = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(known, str | int | float) or known not in LABELS:
        raise RowError(
            Drop.WRONG_LABELS,
            f"{where}: the field {spec.label_key!r} is {label!r}: a label must be true or 1 (desirable), or false or 0.",
        )
    drafts = read_sft(row, where, spec, tokenizer)
    if isinstance(drafts, Drop):
        return drafts
    values = {"desirable": LABELS[known], "mismatched": 0.0}
    return tuple(replace(draft, values=values) for draft in drafts)


def mismatched(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """For each row its prompt with the answer of a row with another prompt, drawn evenly among those.

    The mean log-ratio of policy and reference on such pairs is KTO's estimate of their KL divergence (Ethayarajh et
    al., "KTO: Model Alignment as Prospect Theoretic Optimization", 2024, section 4.1). ``samples`` must be the rows of
    the whole optimizer step, so that the estimate does not depend on how they are split. Copies keep the ``group_id``
    of the prompt's row and share its prompt; none is longer than the longest row, so that memory stays bounded: answers
    are cut to that. Raises DataError if all prompts are the same.
    """
    prompts = [sample.tokens[: sample.prompt_length].tobytes() for sample in samples]
    if len(set(prompts)) < 2:
        raise DataError(
            f"A batch of {len(samples)} rows has only one distinct prompt, but KTO estimates a KL divergence from "
            "answers to other prompts: raise --train_batch_size, or mix the data."
        )
    longest = max(len(sample.tokens) for sample in samples)
    generator = np.random.default_rng(seed)
    others: dict[bytes, list[int]] = {
        prompt: [i for i, other in enumerate(prompts) if other != prompt] for prompt in set(prompts)
    }
    drawn = [others[prompt][int(generator.integers(len(others[prompt])))] for prompt in prompts]
    return [_joined(sample, samples[i], longest) for sample, i in zip(samples, drawn, strict=True)]


def _joined(prompt: Sample, answer: Sample, longest: int) -> Sample:
    """The prompt of one row with the answer of another."""
    start = prompt.prompt_length
    tokens = np.concatenate([prompt.tokens[:start], answer.tokens[answer.prompt_length :]])[:longest]
    mask = np.concatenate([prompt.loss_mask[:start], answer.loss_mask[answer.prompt_length :]])[:longest]
    mask[:1] = False
    return replace(prompt, tokens=tokens, loss_mask=mask, streams={}, values={"desirable": 0.0, "mismatched": 1.0})
