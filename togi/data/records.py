"""Rows of the supervised and preference commands as training samples, with a report of every row that is not used.

Everything is tokenised up front into files (``shards``), so lengths, drops and the report are exact before a model is loaded.
Samples are made on demand. How one row is read is in ``encode``; batches are made elsewhere.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray

from togi.data import report as reports
from togi.data import rows
from togi.data.chat import Tokenizer, check_rendering
from togi.data.precheck import RecordSpec
from togi.data.shards import FAULT_CODES, REASONS, Table, encoded
from togi.data.source import Mixture, Pick, load_mixture
from togi.data.tables import BadRow
from togi.data.turns import shown
from togi.errors import DataError
from togi.sample import Sample, with_streams

__all__ = ["Examples", "RecordSpec", "load_pairs", "load_sft", "load_steps", "load_unpaired"]

SHOWN = 3


class Examples(Sequence[tuple[Sample, ...]]):
    """The samples of each used row in the order of the mixture: one, or chosen and rejected. ``group_id``: the row's id.

    ``table``: the rows of all sets. ``places``: (source, row, repeat) of each, shape (M, 3). ``labels``: how the steps of a
    process reward model are labelled.
    """

    labels: rows.StepLabels | None = None

    def __init__(self, table: Table, places: NDArray[np.int64], report: reports.DataReport) -> None:
        self._table, self._places, self.report = table, places, report
        self._rows_M = table.rows(places)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> tuple[Sample, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[Sample, ...], ...]: ...
    def __getitem__(self, index: int | slice) -> tuple[Sample, ...] | tuple[tuple[Sample, ...], ...]:
        if isinstance(index, slice):
            return tuple(map(self._samples, range(len(self))[index]))
        return self._samples(index)

    def _samples(self, index: int) -> tuple[Sample, ...]:
        pick = Pick(*self._places[index].tolist())
        return tuple(sequence.sample(pick.id) for sequence in self._table.coded(int(self._rows_M[index])))

    def prompt(self, index: int) -> bytes:
        """The prompt tokens of a row's first sequence as bytes, to compare prompts."""
        first = self._table.coded(int(self._rows_M[index]))[0]
        return bytes(first.tokens[: first.prompt_length].tobytes())

    def last_tokens(self) -> set[int]:
        """The last tokens of the trained parts."""
        return self._table.last_tokens()

    def largest_token(self) -> int:
        """The largest token id in the rows; -1 if there is none."""
        return self._table.largest_token()

    def learned(self) -> NDArray[np.int64]:
        """The number of trained tokens of each sequence, row after row."""
        return self._per_sequence(self._table.learned_S)

    def prompt_lengths(self) -> NDArray[np.int64]:
        """The number of tokens before the first trained one of each sequence, row after row."""
        return self._per_sequence(self._table.prompt_lengths_S)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row over all its sequences, without making samples."""
        return self._table.sizes_N[self._rows_M]

    @property
    def width(self) -> int:
        """Sequences per row."""
        return int(self._table.widths_N.max(initial=0))

    def _per_sequence(self, values_S: NDArray[np.int64]) -> NDArray[np.int64]:
        widths_N = self._table.widths_N
        firsts_M = (np.cumsum(widths_N) - widths_N)[self._rows_M]
        return values_S[firsts_M[:, None] + np.arange(self.width)].reshape(-1)

    def scored(self, stream: str, numbers: NDArray[np.float32]) -> ScoredExamples:
        """The same rows with one number at each token in the loss. ``numbers``: of all rows, in order."""
        return ScoredExamples(self, stream, numbers)

    def fingerprint(self) -> str:
        """A digest of all tokens, trained parts, labels and values: equal for the same samples in the same order."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(self._places.astype("<i8").tobytes(), digest_size=16)
        for part in self._table.content():
            digest.update(part)
        return digest.hexdigest()


class ScoredExamples(Examples):
    """Rows whose samples have one more stream. Its numbers (a mapped file, for example) are read per row."""

    def __init__(self, rows: Examples, stream: str, numbers: NDArray[np.float32]) -> None:
        super().__init__(rows._table, rows._places, rows.report)
        self._stream, self._numbers, self._width = stream, numbers, self.width
        self._ends = np.cumsum(self.learned())
        assert len(numbers) == self._ends[-1], "there is not one number for each token in the loss"

    def _samples(self, index: int) -> tuple[Sample, ...]:
        samples = super()._samples(index)
        ends = self._ends[index * self._width :].tolist()
        own = [self._numbers[end - int(s.loss_mask.sum()) : end] for s, end in zip(samples, ends, strict=False)]
        return tuple(with_streams(samples, {self._stream: own}))


def load_sft(spec: RecordSpec, tokenizer: Tokenizer) -> Examples:
    """One sample per row; answers (or whole texts) are trained. Raises DataError naming set, row and field."""
    return _load(_mixture(spec), rows.AnswerReader(spec.of_a_row()), spec, tokenizer)


def load_pairs(spec: RecordSpec, tokenizer: Tokenizer) -> Examples:
    """Two samples per row, chosen first, with values "chosen" and "margin". Raises DataError naming set, row, field."""
    return _load(_mixture(spec), rows.PairReader(spec.of_a_row()), spec, tokenizer)


def load_unpaired(spec: RecordSpec, tokenizer: Tokenizer) -> Examples:
    """One sample per row with values "desirable" and "mismatched" (0). Raises DataError naming set, row and field."""
    return _load(_mixture(spec), rows.UnpairedReader(spec.of_a_row()), spec, tokenizer)


def load_steps(spec: RecordSpec, tokenizer: Tokenizer) -> Examples:
    """One sample per row with a stream "labels" at its placeholders. Raises DataError naming set, row and field."""
    mixture = _mixture(spec)
    labels = rows.step_labels(spec, _first_label(mixture, spec.label_key), tokenizer)
    examples = _load(mixture, rows.StepReader(spec.of_a_row(), labels), spec, tokenizer)
    examples.labels = labels
    return examples


def _mixture(spec: RecordSpec) -> Mixture:
    limits = {"seed": spec.seed, "max_samples": spec.max_samples}
    return load_mixture(spec.dataset, spec.dataset_probs, split=spec.split, **limits)


def _first_label(mixture: Mixture, key: str) -> object:
    """The first valid label in the rows; None if there is none."""
    for pick in mixture.picks:
        (row,) = mixture.sources[pick.source].rows.fetch([pick.row])
        labels = None if isinstance(row, BadRow) else rows.label_list(row.get(key))
        for label in labels if isinstance(labels, list) else []:
            if isinstance(label, str | int | float):
                return label
    return None


def _load(mixture: Mixture, reader: rows.RowReader, spec: RecordSpec, tokenizer: Tokenizer) -> Examples:
    if not tokenizer.is_fast:
        raise DataError(
            f"The tokenizer {type(tokenizer).__name__} cannot say which characters a token is made of: use its fast "
            "version (a folder with tokenizer.json)."
        )
    check_rendering(tokenizer, apply_chat_template=spec.apply_chat_template, input_template=spec.template)
    # Tokenise, or take from the cache.
    table = Table(
        *(
            encoded(source.rows, mixture.rows_used(index), reader, tokenizer, spec.dataset_num_proc)
            for index, source in enumerate(mixture.sources)
        )
    )
    # Keep the picks whose row was not dropped.
    places = mixture.places[table.drops_N[table.rows(mixture.places)] == 0]
    report = _report(mixture, table, spec, tokenizer)
    report.check("row", spec.dataset, spec.max_bad_rows, f"check the keys and --max_len {spec.max_len}")
    return Examples(table, places, report)


def _report(mixture: Mixture, table: Table, spec: RecordSpec, tokenizer: Tokenizer) -> reports.DataReport:
    rows_M = table.rows(mixture.places)
    drops_M = table.drops_N[rows_M]
    counts: list[Mapping[str | None, int]] = []
    for index in range(len(mixture.sources)):
        codes = Counter(drops_M[mixture.places[:, 0] == index].tolist())
        counts.append({REASONS[code]: count for code, count in sorted(codes.items())})
    # Faults are over distinct rows, however often the mixture repeats them.
    codes = Counter(table.drops_N[np.isin(table.drops_N, FAULT_CODES)].tolist())
    kinds = {str(REASONS[code]): count for code, count in sorted(codes.items())}
    first_faults = []
    for row, text in table.faults():
        source = int(np.searchsorted(table.starts, row, side="right")) - 1
        place = mixture.sources[source].rows.place(row - int(table.starts[source]))
        first_faults.append(reports.Fault(place, str(REASONS[table.drops_N[row]]), f"{place}{text}"))
    faults = reports.Faults(sum(kinds.values()), len(table), kinds, tuple(first_faults))
    used = rows_M[drops_M == 0]
    first = [table.coded(row) for row in used[:SHOWN].tolist()]
    return reports.DataReport(
        title=f"Rows of {spec.dataset}",
        sources=reports.source_reports(mixture, counts),
        lengths=reports.Lengths.of(table.lengths_L),
        examples=tuple(shown(sequence, tokenizer) for coded in first for sequence in coded),
        warnings=(
            *reports.loss_warning(len(mixture), len(used)),
            *faults.warnings(),
            *reports.note_warnings(table.notes(), len(table)),
            *_token_warnings(table, used, spec),
            *reports.bos_warning(int(first[0][0].tokens[0]) if first and spec.apply_chat_template else None, tokenizer),
        ),
        faults=faults,
    )


def _token_warnings(table: Table, used: NDArray[np.int64], spec: RecordSpec) -> Iterator[str]:
    """What was cut, and where a prompt ends inside a token."""
    if table.cut:
        yield f"{table.cut} rows were cut to --max_len {spec.max_len}; they have no end token."
    if merged := int(table.merged_N[used].sum()):
        yield (
            f"in {merged} of {len(used)} rows one token holds the end of the prompt and the start of the answer, and "
            "generation never starts so: end the prompt (--input_template) without a space."
        )
