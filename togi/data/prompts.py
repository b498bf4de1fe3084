"""Read rows as ``Prompt``, formatted and tokenised once, with a report of every row that is not used.

``chat`` formats text. ``PromptLoader`` gives prompts in a seeded order, with a position that can be saved and resumed exactly.
Every prompt comes once per episode over any sequence of takes, saves and resumes. The order depends only on the seed, the
episode and the number of prompts, not on ranks or on how many are taken at once.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import islice
from typing import Any, overload

import numpy as np

from togi.data.chat import Tokenizer, adds_bos, check_rendering, encode, plain_prompt, render_messages, visible
from togi.data.faults import SHOWN_FAULTS, Note, RowError, check_present, check_whole, named
from togi.data.faults import Drop as FaultKind
from togi.data.fields import is_empty, prompt_dialogue, row_frame
from togi.data.items import DEFAULT_SPLIT
from togi.data.messages import without_answers
from togi.data.precheck import missing_field
from togi.data.report import (
    DataReport,
    Fault,
    Faults,
    Lengths,
    check_faults,
    loss_warning,
    note_warnings,
    source_reports,
)
from togi.data.source import Mixture, load_mixture
from togi.data.tables import BadRow, Row
from togi.data.turns import is_held, lost
from togi.errors import DataError
from togi.sample import Prompt


@dataclass(frozen=True, slots=True)
class LoaderState:
    """The position of a loader: ``position`` prompts of ``episode`` (from 0) have been taken."""

    episode: int
    position: int
    seed: int
    num_prompts: int
    fingerprint: str

    def to_json(self) -> dict[str, int | str]:
        return asdict(self)


class PromptLoader:
    """Returns the prompts of a set ``episodes`` times, each time in another seeded order."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, episodes: int) -> None:
        assert len(prompts) > 0 and episodes > 0
        self._prompts = prompts
        self._seed = seed
        self._episodes = episodes
        self._fingerprint = fingerprint(prompts)
        self._start(0)

    @property
    def episode(self) -> int:
        """The episode of the next prompt, from 0; equal to the number of episodes when all are done."""
        return self._episode

    @property
    def remaining(self) -> int:
        """Prompts left over all episodes (negative after resuming a run that had more episodes)."""
        return (self._episodes - self._episode) * len(self._prompts) - self._position

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts; fewer at the end of an episode, which no batch crosses; empty when all are done."""
        assert n > 0
        if self.remaining <= 0:
            return []
        chosen = self._order[self._position : self._position + n]
        self._position += len(chosen)
        if self._position == len(self._prompts):
            self._start(self._episode + 1)
        return [self._prompts[i] for i in chosen]

    def state(self) -> LoaderState:
        """The position, to be saved in a checkpoint."""
        return LoaderState(self._episode, self._position, self._seed, len(self._prompts), self._fingerprint)

    def load_state(self, state: LoaderState) -> None:
        """Resume at ``state``. Raises DataError if it was saved with other prompts or another seed."""
        if state.num_prompts != len(self._prompts):
            raise DataError(
                f"The checkpoint was made with {state.num_prompts} prompts but the prompt set now has "
                f"{len(self._prompts)}: resume with the same data, or start a new run."
            )
        if state.fingerprint != self._fingerprint:
            raise DataError(
                "The checkpoint was made with other prompts (as many, but not the same): "
                "resume with the same data and templates, or start a new run."
            )
        if state.seed != self._seed:
            raise DataError(
                f"The checkpoint was made with --seed {state.seed} but this run has --seed {self._seed}, which is "
                "another order of the prompts: resume with the same seed."
            )
        self._start(state.episode)
        self._position = state.position

    def _start(self, episode: int) -> None:
        self._episode = episode
        self._position = 0
        self._order = np.random.default_rng([self._seed, episode]).permutation(len(self._prompts)).tolist()


logger = logging.getLogger(__name__)

CHUNK = 4096
EXAMPLES = 3
DEFAULT_DATASOURCE = "default"
DATASOURCE_COLUMNS = ("datasource", "data_source")


class Drop(StrEnum):
    """Why a prompt is not used."""

    EMPTY = "empty"
    TOO_LONG = "too long"


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """Which prompts to load and how to format them. Fields are named as their flags.

    ``prompt_max_len``: in tokens; longer prompts are dropped and counted, never truncated. ``max_bad_rows``: the share
    of faulty rows up to which they are skipped; with 0 the first one is an error.
    """

    prompt_data: str
    input_key: str = "input"
    label_key: str | None = None
    prompt_data_probs: str | None = None
    split: str = DEFAULT_SPLIT
    apply_chat_template: bool = False
    input_template: str | None = None
    prompt_max_len: int = 1024
    max_samples: int = 100_000_000
    seed: int = 42
    max_bad_rows: float = 0.0


class PromptSet(Sequence[Prompt]):
    """Prompts in the order of the mixture, and the report on their rows."""

    def __init__(self, prompts: Sequence[Prompt], report: DataReport) -> None:
        self._prompts = tuple(prompts)
        self.report = report
        assert len({prompt.id for prompt in self._prompts}) == len(self._prompts), "prompt ids are not unique"

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Prompt, ...]: ...
    def __getitem__(self, index: int | slice) -> Prompt | tuple[Prompt, ...]:
        return self._prompts[index]

    def fingerprint(self) -> str:
        """A digest of ids and texts: equal for the same prompts in the same order."""
        return fingerprint(self._prompts)


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A digest of ids and texts, which changes if other rows have the same ids."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        text = prompt.text.encode("utf-8", "surrogatepass")
        digest.update(f"{prompt.id}\n{len(text)}\n".encode())
        digest.update(text)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Rendered:
    """One distinct row: its prompt without an id, or why there is none. ``faults`` holds at most one."""

    text: str
    tokens: tuple[int, ...]
    label: Any
    datasource: str
    length: int
    drop: Drop | FaultKind | None
    faults: tuple[Fault, ...] = ()
    notes: frozenset[Note] = frozenset()


def load_prompts(spec: PromptSpec, tokenizer: Tokenizer) -> PromptSet:
    """Load, mix, format and tokenise the prompts of ``spec``. Raises DataError naming set, row and field."""
    check_rendering(tokenizer, apply_chat_template=spec.apply_chat_template, input_template=spec.input_template)
    mixture = load_mixture(
        spec.prompt_data, spec.prompt_data_probs, split=spec.split, seed=spec.seed, max_samples=spec.max_samples
    )
    # Distinct rows are formatted once; a repeated pick shares its tokens.
    vocabulary = tuple(range(len(tokenizer)))
    rendered = [dict(_render_source(mixture, s, spec, tokenizer, vocabulary)) for s in range(len(mixture.sources))]
    prompts = []
    for pick in mixture.picks:
        row = rendered[pick.source][pick.row]
        if row.drop is None:
            prompts.append(Prompt(pick.id, row.tokens, row.text, row.label, row.datasource))
    # Report first: the errors below quote it.
    report = _report(mixture, rendered, prompts, spec, tokenizer)
    check_faults(report.faults, spec.max_bad_rows)
    if not prompts:
        raise DataError(
            f"No prompt of {spec.prompt_data} can be used (dropped: {report.drop_reasons()}; longest: "
            f"{report.lengths.max} tokens): check --input_key {spec.input_key} and --prompt_max_len "
            f"{spec.prompt_max_len}."
        )
    for warning in report.warnings:
        logger.warning("%s: %s", spec.prompt_data, warning)
    return PromptSet(prompts, report)


def _render_source(
    mixture: Mixture, index: int, spec: PromptSpec, tokenizer: Tokenizer, vocabulary: Sequence[int]
) -> Iterator[tuple[int, _Rendered]]:
    """Format and tokenise every used row of one source. Yields (row number, result)."""
    source, fallback = mixture.sources[index], _datasource_names(mixture)[index]
    numbers = iter(mixture.rows_used(index))
    while chunk := list(islice(numbers, CHUNK)):
        rows = list(zip(chunk, source.rows.fetch(chunk), strict=True))
        read = [_read(row, source.rows.place(number), spec, tokenizer) for number, row in rows]
        texts = ["" if isinstance(found, Fault) else found.text for found in read]
        try:
            ids = encode(texts, tokenizer, add_special_tokens=not spec.apply_chat_template)
        except DataError as error:
            raise DataError(f"In {source.text}: {error}") from None
        for (number, row), found, tokens in zip(rows, read, ids, strict=True):
            if isinstance(found, Fault):
                yield number, _Rendered("", (), "", fallback, 0, FaultKind(found.kind), (found,))
                continue
            assert not isinstance(row, BadRow), "a row that cannot be read has no text"
            drop = _why_dropped(found.text, len(tokens), spec.prompt_max_len)
            # One int object per token id instead of one per token: this keeps large prompt sets small.
            kept = tuple(map(vocabulary.__getitem__, tokens)) if drop is None else ()
            label = "" if spec.label_key is None else row[spec.label_key]
            datasource = _datasource(row, fallback)
            yield number, _Rendered(found.text, kept, label, datasource, len(tokens), drop, notes=found.notes)


@dataclass(frozen=True, slots=True)
class _Text:
    """A formatted prompt, "" if it is empty, and notes on what was converted."""

    text: str
    notes: frozenset[Note] = frozenset()


def _read(row: Row | BadRow, where: str, spec: PromptSpec, tokenizer: Tokenizer) -> _Text | Fault:
    """The formatted prompt of a row, or its fault. Raises DataError if no faulty row is allowed."""
    try:
        return _text(row, where, spec, tokenizer)
    except RowError as error:
        if spec.max_bad_rows == 0:
            raise
        return Fault(where, error.kind, str(error))


def _text(row: Row | BadRow, where: str, spec: PromptSpec, tokenizer: Tokenizer) -> _Text:
    if isinstance(row, BadRow):
        raise RowError(FaultKind.UNREADABLE, f"{where} {row.reason}")
    for flag, key in (("input_key", spec.input_key), ("label_key", spec.label_key)):
        if key is not None and key not in row:
            raise missing_field(where, flag, key, row)
        if key is not None:
            check_present(row[key], where, key)
    value = row[spec.input_key]
    if is_empty(value):
        return _Text("")
    if spec.label_key is not None:
        check_whole(row[spec.label_key], f"{where}: the field {spec.label_key!r} has")
    if spec.apply_chat_template:
        found = _chat(row, value, where, spec, tokenizer)
    else:
        with named(f"{where}: the field {spec.input_key!r}"):
            found = _Text(plain_prompt(value, spec.input_template))
    check_whole(found.text, f"{where}: the field {spec.input_key!r} has")
    for column in DATASOURCE_COLUMNS:
        check_whole(row.get(column), f"{where}: the field {column!r} has")
    return found


def _chat(row: Row, value: object, where: str, spec: PromptSpec, tokenizer: Tokenizer) -> _Text:
    """The prompt in the chat template, without an answer at its end."""
    whole = prompt_dialogue(value, where, spec.input_key, row_frame(row, where), tokenizer)
    dialogue = without_answers(whole)
    with named(f"{where}: the field {spec.input_key!r}"):
        if not dialogue.messages and whole.messages:
            raise RowError(
                FaultKind.EMPTY_PROMPT, "holds nothing but the assistant's answer: put the question before it."
            )
        text = render_messages(dialogue, tokenizer, add_generation_prompt=True)
        if dialogue.messages and not is_held(dialogue.messages[-1]["content"], text):
            raise RowError(
                FaultKind.TEMPLATE,
                "has its last message left out or changed by the chat template (it says "
                f"{dialogue.messages[-1]['content'][:60]!r}): use a template that keeps what is asked.",
            )
    return _Text(text, dialogue.notes | (lost(dialogue, text) if text else set()))


def _why_dropped(text: str, length: int, limit: int) -> Drop | None:
    if not text:
        return Drop.EMPTY
    return Drop.TOO_LONG if length > limit else None


def _datasource(row: Row, fallback: str) -> str:
    for column in DATASOURCE_COLUMNS:
        if row.get(column) is not None:
            return str(row[column])
    return fallback


def _datasource_names(mixture: Mixture) -> list[str]:
    """The datasource of prompts without such a column: the name of their set, if there are several sets."""
    if len(mixture.sources) == 1:
        return [DEFAULT_DATASOURCE]
    names = [source.name for source in mixture.sources]
    return [s.text if names.count(s.name) > 1 else s.name for s in mixture.sources]


def _report(
    mixture: Mixture,
    rendered: Sequence[Mapping[int, _Rendered]],
    prompts: Sequence[Prompt],
    spec: PromptSpec,
    tokenizer: Tokenizer,
) -> DataReport:
    # Counts are over picks, since repeats count; faults and notes are over distinct rows.
    counts = [Counter[str | None]() for _ in rendered]
    for pick in mixture.picks:
        counts[pick.source][rendered[pick.source][pick.row].drop] += 1
    sources = source_reports(mixture, counts)
    warnings = loss_warning(len(mixture), len(prompts))
    if prompts and spec.apply_chat_template and adds_bos(tokenizer) and prompts[0].tokens[0] != tokenizer.bos_token_id:
        warnings += (f"the tokenizer starts plain text with {tokenizer.bos_token!r} but the chat template does not.",)
    distinct = [row for rows in rendered for row in rows.values()]
    found = [fault for row in distinct for fault in row.faults]
    faults = Faults(len(found), len(distinct), Counter(fault.kind for fault in found), tuple(found[:SHOWN_FAULTS]))
    if found:
        warnings += (faults.warning(),)
    notes = Counter(note for row in distinct if row.drop is None for note in row.notes)
    warnings += note_warnings(notes, len(distinct))
    lengths = [row.length for row in distinct if row.drop is not Drop.EMPTY and not row.faults]
    return DataReport(
        title=f"Prompts of {spec.prompt_data}",
        sources=sources,
        lengths=Lengths.of(lengths),
        examples=tuple(visible(tokenizer, prompt.tokens) for prompt in prompts[:EXAMPLES]),
        warnings=warnings,
        faults=faults,
    )
