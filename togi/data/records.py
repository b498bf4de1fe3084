"""Rows of the supervised and preference commands -> training samples, with an account of every row that is not used.

Everything is tokenised up front in chunks and kept as arrays (four bytes a token), so that lengths, drops and the
report are exact before a model is loaded; samples are made when they are asked for. How one row is read is in ``sft``,
``pairs``, ``unpaired`` and ``steps``; batches and their order are not made here.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import overload

import numpy as np
from numpy.typing import NDArray

from togi.config.choices import Overlong
from togi.data.chat import Tokenizer, adds_bos, check_rendering
from togi.data.fields import named
from togi.data.masks import Coded, Draft, check_decoding, check_start, encode_drafts, end_tokens, shown
from togi.data.mixture import Mixture, Pick, load_mixture
from togi.data.pairs import join_pair, read_pair
from togi.data.record_spec import FAULTS, Drop, RecordSpec
from togi.data.report import DataReport, Lengths, loss_warning, source_reports
from togi.data.sft import check_sft, read_sft
from togi.data.steps import StepLabels, check_places, read_steps, step_labels
from togi.data.tables import Row
from togi.data.unpaired import read_unpaired
from togi.errors import DataError
from togi.sample import Sample

__all__ = ["Examples", "RecordSpec", "StepExamples", "load_pairs", "load_sft", "load_steps", "load_unpaired"]

logger = logging.getLogger(__name__)

CHUNK = 512
SHOWN = 3
CHECKED = 32
MAX_FAULTS = 0.5

Read = Callable[[Row, str], tuple[Draft, ...] | Drop]
Finish = Callable[[tuple[Coded, ...], str], tuple[Coded, ...] | Drop]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of one distinct row: its sequences, or why it has none. ``lengths`` before anything is cut."""

    coded: tuple[Coded, ...]
    lengths: tuple[int, ...]
    drop: Drop | None
    was_cut: bool = False


class Examples(Sequence[tuple[Sample, ...]]):
    """The samples of each used row in the order of the mixture: one, or chosen and rejected. ``group_id`` is the row's."""

    def __init__(self, rows: Sequence[tuple[str, tuple[Coded, ...]]], report: DataReport) -> None:
        self._rows = tuple(rows)
        self.report = report

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> tuple[Sample, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[Sample, ...], ...]: ...
    def __getitem__(self, index: int | slice) -> tuple[Sample, ...] | tuple[tuple[Sample, ...], ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return self._samples(index)

    def _samples(self, row: int) -> tuple[Sample, ...]:
        group_id, coded = self._rows[row]
        return tuple(sequence.sample(group_id) for sequence in coded)

    def learned(self) -> list[int]:
        """How many tokens in the loss each sequence has, row after row."""
        return [int(sequence.loss_mask().sum()) for _, coded in self._rows for sequence in coded]

    def prompt_lengths(self) -> list[int]:
        """How many tokens come before the first one to learn, in each sequence, row after row."""
        return [sequence.prompt_length for _, coded in self._rows for sequence in coded]

    def scored(self, stream: str, numbers: NDArray[np.float32]) -> ScoredExamples:
        """The same rows with one number at each token in the loss; ``numbers`` are those of all rows, in order."""
        return ScoredExamples(self._rows, self.report, stream, numbers)

    def lengths(self) -> list[int]:
        """Tokens of each row, all its sequences together, without making samples."""
        return [sum(len(sequence.tokens) for sequence in coded) for _, coded in self._rows]

    def fingerprint(self) -> str:
        """A digest of all tokens, learned parts, labels and values: equal for the same samples in the same order."""
        digest = hashlib.blake2b(digest_size=16)
        for group_id, coded in self._rows:
            for sequence in coded:
                rest = (sequence.runs, sequence.prompt_length, sequence.labels, sorted(sequence.values.items()))
                digest.update(f"{group_id} {len(sequence.tokens)} {rest}\n".encode())
                digest.update(sequence.tokens.astype("<i4").tobytes())
        return digest.hexdigest()


class ScoredExamples(Examples):
    """Rows whose samples have one more stream. Its numbers stay where they are, as in a mapped file, until a row is asked for."""

    def __init__(
        self,
        rows: Sequence[tuple[str, tuple[Coded, ...]]],
        report: DataReport,
        stream: str,
        numbers: NDArray[np.float32],
    ) -> None:
        super().__init__(rows, report)
        self._stream, self._numbers = stream, numbers
        self._ends = np.cumsum(self.learned())
        self._firsts = np.cumsum([0, *(len(coded) for _, coded in rows)])
        assert len(numbers) == (self._ends[-1] if len(rows) else 0), (
            "there is not one number for each token in the loss"
        )

    def _samples(self, row: int) -> tuple[Sample, ...]:
        return tuple(
            self._with_stream(sample, int(self._ends[self._firsts[row] + place]))
            for place, sample in enumerate(super()._samples(row))
        )

    def _with_stream(self, sample: Sample, end: int) -> Sample:
        """Add the numbers that end at ``end``; NaN at tokens that are not in the loss."""
        values = np.full(len(sample.tokens), np.nan, dtype=np.float32)
        values[sample.loss_mask] = self._numbers[end - int(sample.loss_mask.sum()) : end]
        return replace(sample, streams={**sample.streams, self._stream: values})


class StepExamples(Examples):
    """Rows of a process reward model, and how their labels are to be read."""

    def __init__(self, rows: Sequence[tuple[str, tuple[Coded, ...]]], report: DataReport, labels: StepLabels) -> None:
        super().__init__(rows, report)
        self.labels = labels


def load_sft(spec: RecordSpec, tokenizer: Tokenizer) -> Examples:
    """One sample a row; answers (or whole texts) are learned. Raises DataError naming set, row and field."""
    check_sft(spec)
    return Examples(*_load(_mixture(spec), spec, tokenizer, lambda row, where: read_sft(row, where, spec, tokenizer)))


def load_pairs(spec: RecordSpec, tokenizer: Tokenizer) -> Examples:
    """Two samples a row, chosen first, with values "chosen" and "margin". Raises DataError naming set, row, field."""

    def read(row: Row, where: str) -> tuple[Draft, ...] | Drop:
        return read_pair(row, where, spec, tokenizer)

    return Examples(*_load(_mixture(spec), spec, tokenizer, read, lambda coded, _: join_pair(coded)))


def load_unpaired(spec: RecordSpec, tokenizer: Tokenizer) -> Examples:
    """One sample a row with values "desirable" and "mismatched" (0). Raises DataError naming set, row and field."""
    check_sft(spec)

    def read(row: Row, where: str) -> tuple[Draft, ...] | Drop:
        return read_unpaired(row, where, spec, tokenizer)

    return Examples(*_load(_mixture(spec), spec, tokenizer, read))


def load_steps(spec: RecordSpec, tokenizer: Tokenizer) -> StepExamples:
    """One sample a row with a stream "labels" at its placeholders. Raises DataError naming set, row and field."""
    mixture = _mixture(spec)
    kind = step_labels(spec, _first_label(mixture, spec.label_key), tokenizer)

    def read(row: Row, where: str) -> tuple[Draft, ...] | Drop:
        return read_steps(row, where, spec, kind, tokenizer)

    def finish(coded: tuple[Coded, ...], where: str) -> tuple[Coded, ...]:
        with named(where):
            check_places(coded[0], kind, tokenizer)
        return coded

    return StepExamples(*_load(mixture, spec, tokenizer, read, finish), kind)


def _mixture(spec: RecordSpec) -> Mixture:
    return load_mixture(
        spec.dataset, spec.dataset_probs, split=spec.split, seed=spec.seed, max_samples=spec.max_samples
    )


def _first_label(mixture: Mixture, key: str) -> object:
    """The first label of the first row that has any; None if no row has one."""
    for pick in mixture.picks:
        (row,) = mixture.sources[pick.source].rows.fetch([pick.row])
        labels = row.get(key)
        if isinstance(labels, Sequence) and len(labels) > 0:
            return labels[0]
    return None


def _unchanged(coded: tuple[Coded, ...], where: str) -> tuple[Coded, ...]:
    return coded


def _load(
    mixture: Mixture, spec: RecordSpec, tokenizer: Tokenizer, read: Read, finish: Finish = _unchanged
) -> tuple[list[tuple[str, tuple[Coded, ...]]], DataReport]:
    """Every used row with its sequences, and the report. ``finish`` sees sequences that are cut and not too long."""
    if not tokenizer.is_fast:
        raise DataError(
            f"The tokenizer {type(tokenizer).__name__} cannot say which characters a token is made of: use its fast "
            "version (a folder with tokenizer.json)."
        )
    check_rendering(tokenizer, apply_chat_template=spec.apply_chat_template, input_template=spec.template)
    outcomes = [dict(_source(mixture, s, spec, tokenizer, read, finish)) for s in range(len(mixture.sources))]
    rows = []
    for pick in mixture.picks:
        outcome = outcomes[pick.source][pick.row]
        if outcome.drop is None:
            rows.append((pick.id, outcome.coded))
    report = _report(mixture, outcomes, rows, spec, tokenizer)
    _check_losses(mixture, outcomes, report, spec)
    for warning in report.warnings:
        logger.warning("%s: %s", spec.dataset, warning)
    return rows, report


def _source(
    mixture: Mixture, index: int, spec: RecordSpec, tokenizer: Tokenizer, read: Read, finish: Finish
) -> Iterator[tuple[int, _Outcome]]:
    """Every used row of one source, with its row number."""
    source = mixture.sources[index]
    numbers = iter(mixture.rows_used(index))
    enders = end_tokens(tokenizer, chat=spec.apply_chat_template)
    unchecked = CHECKED
    while chunk := list(islice(numbers, CHUNK)):
        names = [f"Row {number} of {source.text}" for number in chunk]
        rows = [read(row, name) for name, row in zip(names, source.rows.fetch(chunk), strict=True)]
        drafts = [draft for row in rows if not isinstance(row, Drop) for draft in row]
        coded = iter(encode_drafts(drafts, tokenizer, add_special_tokens=not spec.apply_chat_template, enders=enders))
        for number, name, row in zip(chunk, names, rows, strict=True):
            if isinstance(row, Drop):
                yield number, _Outcome((), (), row)
                continue
            sequences = tuple(islice(coded, len(row)))
            with named(name):
                _check(row, sequences, tokenizer, decoding=unchecked > 0)
            unchecked -= 1
            yield number, _settle(sequences, name, spec, finish)


def _check(row: tuple[Draft, ...], sequences: tuple[Coded, ...], tokenizer: Tokenizer, *, decoding: bool) -> None:
    for draft, coded in zip(row, sequences, strict=True):
        check_start(coded, tokenizer)
        if decoding:
            check_decoding(draft, coded, tokenizer)


def _settle(sequences: tuple[Coded, ...], name: str, spec: RecordSpec, finish: Finish) -> _Outcome:
    """Drop, cut or refuse what is too long, then ``finish``."""
    lengths = tuple(len(coded.tokens) for coded in sequences)
    if not all(coded.learnable() for coded in sequences):
        return _Outcome((), lengths, Drop.EMPTY_ANSWER)
    too_long = max(lengths) > spec.max_len
    if too_long and spec.overlong is Overlong.ERROR:
        raise DataError(
            f"{name} has {max(lengths)} tokens, more than --max_len {spec.max_len}: raise it, or use --overlong drop or "
            "truncate."
        )
    if too_long and spec.overlong is Overlong.DROP:
        return _Outcome((), lengths, Drop.TOO_LONG)
    if too_long:
        sequences = tuple(coded.cut(spec.max_len) if len(coded.tokens) > spec.max_len else coded for coded in sequences)
        if not all(coded.learnable() for coded in sequences):
            return _Outcome((), lengths, Drop.CUT_AWAY)
    finished = finish(sequences, name)
    if isinstance(finished, Drop):
        return _Outcome((), lengths, finished)
    return _Outcome(finished, lengths, None, was_cut=too_long)


def _check_losses(
    mixture: Mixture, outcomes: Sequence[Mapping[int, _Outcome]], report: DataReport, spec: RecordSpec
) -> None:
    """Raise DataError if no row is left, or more than MAX_FAULTS of the rows are faulty, whatever --max_len is."""
    if report.kept == 0:
        raise DataError(
            f"No row of {spec.dataset} can be used (dropped: {report.drop_reasons()}; longest: {report.lengths.max} "
            f"tokens): check the keys and --max_len {spec.max_len}."
        )
    faults = [pick for pick in mixture.picks if outcomes[pick.source][pick.row].drop in FAULTS]
    if len(faults) > MAX_FAULTS * len(mixture.picks):
        raise DataError(
            f"{len(faults)} of {len(mixture.picks)} rows of {spec.dataset} are faulty (dropped: "
            f"{report.drop_reasons()}; first: {_name(mixture, faults[0])}), more than {MAX_FAULTS:.0%}: check the keys."
        )


def _name(mixture: Mixture, pick: Pick) -> str:
    return f"row {pick.row} of {mixture.sources[pick.source].text}"


def _report(
    mixture: Mixture,
    outcomes: Sequence[Mapping[int, _Outcome]],
    rows: Sequence[tuple[str, tuple[Coded, ...]]],
    spec: RecordSpec,
    tokenizer: Tokenizer,
) -> DataReport:
    sources = source_reports(mixture, [{row: item.drop for row, item in each.items()} for each in outcomes])
    return DataReport(
        title=f"Rows of {spec.dataset}",
        sources=sources,
        lengths=Lengths.of([n for rows in outcomes for outcome in rows.values() for n in outcome.lengths]),
        examples=tuple(shown(sequence, tokenizer) for _, coded in rows[:SHOWN] for sequence in coded),
        warnings=_warnings(mixture, outcomes, rows, spec, tokenizer),
    )


def _warnings(
    mixture: Mixture,
    outcomes: Sequence[Mapping[int, _Outcome]],
    rows: Sequence[tuple[str, tuple[Coded, ...]]],
    spec: RecordSpec,
    tokenizer: Tokenizer,
) -> tuple[str, ...]:
    warnings = list(loss_warning(len(mixture.picks), len(rows)))
    found = ((pick, outcomes[pick.source][pick.row]) for pick in mixture.picks if pick.repeat == 0)
    faults = [f"{_name(mixture, pick)} ({outcome.drop})" for pick, outcome in found if outcome.drop in FAULTS]
    if faults:
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        warnings.append(f"faulty rows were left out: {', '.join(faults[:SHOWN])}{more}.")
    cut = sum(outcome.was_cut for of_source in outcomes for outcome in of_source.values())
    if cut > 0:
        warnings.append(f"{cut} rows were cut to --max_len {spec.max_len}; they have no end token.")
    merged = sum(any(sequence.merged for sequence in coded) for _, coded in rows)
    if merged > 0:
        warnings.append(
            f"in {merged} of {len(rows)} rows one token holds the end of the prompt and the start of the answer, and "
            "generation never starts so: end the prompt (--input_template) without a space."
        )
    first = rows[0][1][0].tokens[0] if rows else None
    if rows and spec.apply_chat_template and adds_bos(tokenizer) and first != tokenizer.bos_token_id:
        warnings.append(f"the tokenizer starts plain text with {tokenizer.bos_token!r} but the chat template does not.")
    return tuple(warnings)
