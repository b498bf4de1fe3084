"""Read rows as ``Prompt``, formatted and tokenised once, with a report of every row that is not used.

``chat`` formats text. ``PromptLoader`` gives prompts in a seeded order, with a position that can be saved and resumed exactly.
Every prompt comes once per episode over any sequence of takes, saves and resumes. The order depends only on the seed, the
episode and the number of prompts, not on ranks or on how many are taken at once.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from itertools import islice
from typing import Self

import numpy as np

from togi.data import report as reports
from togi.data.chat import Tokenizer, check_rendering, encode, plain_prompt, render_messages, visible
from togi.data.faults import SHOWN_FAULTS, Note, RowError, check_whole, named, of_field
from togi.data.faults import Drop as FaultKind
from togi.data.fields import Fields, is_empty
from togi.data.items import DEFAULT_SPLIT
from togi.data.messages import Message, without_answers
from togi.data.source import DATASOURCE_COLUMNS, Mixture, Pick, load_mixture
from togi.data.tables import readable
from togi.data.turns import control_notes, is_held, lost
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

    @cached_property
    def prompts(self) -> Mapping[str, Prompt]:
        """All prompts by id."""
        return {prompt.id: prompt for prompt in self._prompts}

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
        problem = ""
        if state.num_prompts != len(self._prompts):
            problem = f"{state.num_prompts} prompts but the prompt set now has {len(self._prompts)}: resume with the same data"
        elif state.fingerprint != self._fingerprint:
            problem = "other prompts (as many, but not the same): resume with the same data and templates"
        elif state.seed != self._seed:
            problem = f"--seed {state.seed} but this run has --seed {self._seed}: resume with the same order of prompts"
        if problem:
            raise DataError(f"The checkpoint was made with {problem}, or start a new run.")
        self._start(state.episode)
        self._position = state.position

    def _start(self, episode: int) -> None:
        self._episode = episode
        self._position = 0
        self._order = np.random.default_rng([self._seed, episode]).permutation(len(self._prompts)).tolist()


CHUNK = 4096
EXAMPLES = 3
ENVIRONMENT = "environment"
"""The column of a row that names its environment, where there are several; it is the data source if no other column is."""


class Drop(StrEnum):
    """Why a prompt is not used."""

    EMPTY = "empty"
    TOO_LONG = "too long"


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """Which prompts to load and how to format them. Fields are named as their flags.

    ``prompt_max_len``: in tokens; longer prompts are dropped and counted, never truncated. ``max_bad_rows``: the share
    of faulty rows up to which they are skipped; with 0 the first one is an error. ``acts``: the prompts are for an environment,
    which gets the rows; they need not have the field of ``input_key``.
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
    acts: bool = False


class PromptSet(tuple[Prompt, ...]):
    """Prompts in the order of the mixture, and the report on their rows."""

    report: reports.DataReport
    _mixture: Mixture

    def __new__(cls, prompts: Iterable[Prompt], report: reports.DataReport, mixture: Mixture) -> Self:
        self = super().__new__(cls, prompts)
        self.report, self._mixture = report, mixture
        assert len({prompt.id for prompt in self}) == len(self), "prompt ids are not unique"
        return self

    def place(self, prompt: Prompt) -> str:
        """The place of a prompt's row, for users: "Line 3 of a.jsonl"."""
        return self._mixture.place(Pick.of(prompt.id))

    def fingerprint(self) -> str:
        """A digest of ids and texts: equal for the same prompts in the same order."""
        return fingerprint(self)


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A digest of ids and texts, which changes if other rows have the same ids."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        text = prompt.text.encode("utf-8", "surrogatepass")
        digest.update(f"{prompt.id}\n{len(text)}\n".encode())
        digest.update(text)
    return digest.hexdigest()


@dataclass(slots=True)
class _Seen:
    """The distinct rows of all sets, as the report counts them: their number, faults, notes and lengths in tokens."""

    rows: int = 0
    faults: list[reports.Fault] = field(default_factory=list)
    notes: Counter[Note] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)


def load_prompts(spec: PromptSpec, tokenizer: Tokenizer) -> PromptSet:
    """Load, mix, format and tokenise the prompts of ``spec``. Raises DataError naming set, row and field."""
    check_rendering(tokenizer, apply_chat_template=spec.apply_chat_template, input_template=spec.input_template)
    mixture = load_mixture(
        spec.prompt_data, spec.prompt_data_probs, split=spec.split, seed=spec.seed, max_samples=spec.max_samples
    )
    # Distinct rows are formatted once; a repeated pick shares its tokens.
    vocabulary, seen = tuple(range(len(tokenizer))), _Seen()
    rendered = [
        dict(_render_source(mixture, s, spec, tokenizer, vocabulary, seen)) for s in range(len(mixture.sources))
    ]
    prompts, counts = [], [Counter[str | None]() for _ in rendered]
    for pick in mixture.picks:
        row = rendered[pick.source][pick.row]
        if isinstance(row, Prompt):
            prompts.append(replace(row, id=pick.id))
        # Counts are over picks, since repeats count; faults and notes are over distinct rows.
        counts[pick.source][None if isinstance(row, Prompt) else row] += 1
    report = _report(mixture, counts, seen, prompts, spec, tokenizer)
    way_out = f"check --input_key {spec.input_key} and --prompt_max_len {spec.prompt_max_len}"
    report.check("prompt", spec.prompt_data, spec.max_bad_rows, way_out)
    return PromptSet(prompts, report, mixture)


def _render_source(
    mixture: Mixture, index: int, spec: PromptSpec, tokenizer: Tokenizer, vocabulary: Sequence[int], seen: _Seen
) -> Iterator[tuple[int, Prompt | Drop | FaultKind]]:
    """Format and tokenise every used row of one source. Yields row numbers with prompts without an id, or why there is none."""
    source, fallback = mixture.sources[index], mixture.datasources[index]
    numbers = iter(mixture.rows_used(index))
    while chunk := list(islice(numbers, CHUNK)):
        seen.rows += len(chunk)
        rows = []
        for number, row in zip(chunk, source.rows.fetch(chunk), strict=True):
            place = source.rows.place(number)
            try:
                with named(place):
                    fields = Fields(readable(row), tokenizer)
                    opening = _opening(fields, spec) if spec.acts else ({}, ())
                    rows.append((number, fields.row, opening, *_text(fields, spec)))
            except RowError as error:
                if spec.max_bad_rows == 0:
                    raise
                seen.faults.append(reports.Fault(place, error.kind, str(error)))
                yield number, error.kind
        try:
            ids = encode([text for *_, text, _ in rows], tokenizer, add_special_tokens=not spec.apply_chat_template)
        except DataError as error:
            raise DataError(f"In {source.text}: {error}") from None
        for (number, row, opening, text, notes), tokens in zip(rows, ids, strict=True):
            if not text:
                yield number, Drop.EMPTY
                continue
            if spec.acts and not opening[1]:
                tokens = tokens[: spec.prompt_max_len]  # noqa: PLW2901  only what a reader sees of a row
            seen.lengths.append(len(tokens))
            if len(tokens) > spec.prompt_max_len:
                yield number, Drop.TOO_LONG
                continue
            seen.notes.update(notes)
            # One int object per token id instead of one per token: this keeps large prompt sets small.
            kept = tuple(map(vocabulary.__getitem__, tokens))
            label = "" if spec.label_key is None else row[spec.label_key]
            columns = (*DATASOURCE_COLUMNS, ENVIRONMENT) if spec.acts else DATASOURCE_COLUMNS
            named_sources = (str(row[column]) for column in columns if row.get(column) is not None)
            yield number, Prompt("", kept, text, label, next(named_sources, fallback), *opening)


def _text(fields: Fields, spec: PromptSpec) -> tuple[str, frozenset[Note]]:
    """The formatted prompt of a row, "" if it is empty, and notes on what was converted. Raises RowError."""
    row, key = fields.row, spec.input_key
    value = json.dumps(row, default=str) if spec.acts and is_empty(row.get(key)) else fields.value("input_key", key)
    label = None if spec.label_key is None else fields.value("label_key", spec.label_key)
    if is_empty(value):
        return "", frozenset()
    check_whole(label, f"the field {spec.label_key!r} has")
    try:
        json.dumps(label)
    except (TypeError, ValueError) as error:
        raise FaultKind.WRONG_TYPE.error(
            f"the field {spec.label_key!r} is no JSON value ({error}): point --label_key at a field of texts, numbers, lists or "
            "objects."
        ) from None
    if spec.acts and is_empty(row.get(key)):
        text, notes = str(value), frozenset[Note]()  # the environment says how the episode begins
    elif spec.apply_chat_template:
        text, notes = _chat(fields, key)
    else:
        text, notes = plain_prompt(fields.text(key), spec.input_template), frozenset()
    for name, part in ((key, text), *((column, row.get(column)) for column in DATASOURCE_COLUMNS)):
        check_whole(part, f"the field {name!r} has")
    return text, notes


def _opening(fields: Fields, spec: PromptSpec) -> tuple[dict[str, object], tuple[Message, ...]]:
    """What an environment gets of a row: its columns as JSON values, and the messages of its prompt, if it has one."""
    try:
        row = json.loads(json.dumps(fields.row))
    except (TypeError, ValueError) as error:
        raise FaultKind.WRONG_TYPE.error(
            f"has a field that is no JSON value ({error}): leave it out or make it text."
        ) from None
    is_there = not is_empty(fields.row.get(spec.input_key))
    return row, tuple(without_answers(fields.prompt(spec.input_key)).messages) if is_there else ()


def _chat(fields: Fields, key: str) -> tuple[str, frozenset[Note]]:
    """The prompt in the chat template, without an answer at its end."""
    whole = fields.prompt(key)
    dialogue = without_answers(whole)
    with of_field(key):
        if not dialogue.messages and whole.messages:
            raise FaultKind.EMPTY_PROMPT.error("holds nothing but the assistant's answer: put the question before it.")
        text = render_messages(dialogue, fields.tokenizer, add_generation_prompt=True)
        if dialogue.messages and not is_held(dialogue.messages[-1]["content"], text):
            raise FaultKind.TEMPLATE.error(
                "has its last message left out or changed by the chat template (it says "
                f"{dialogue.messages[-1]['content'][:60]!r}): use a template that keeps what is asked."
            )
    notes = control_notes(dialogue.messages, fields.tokenizer) | (lost(dialogue, text) if text else set())
    return text, dialogue.notes | notes


def _report(
    mixture: Mixture,
    counts: Sequence[Mapping[str | None, int]],
    seen: _Seen,
    prompts: Sequence[Prompt],
    spec: PromptSpec,
    tokenizer: Tokenizer,
) -> reports.DataReport:
    kinds = Counter(fault.kind for fault in seen.faults)
    faults = reports.Faults(len(seen.faults), seen.rows, kinds, tuple(seen.faults[:SHOWN_FAULTS]))
    first = prompts[0].tokens[0] if prompts and spec.apply_chat_template else None
    return reports.DataReport(
        title=f"Prompts of {spec.prompt_data}",
        sources=reports.source_reports(mixture, counts),
        lengths=reports.Lengths.of(seen.lengths),
        examples=tuple(visible(tokenizer, prompt.tokens) for prompt in prompts[:EXAMPLES]),
        warnings=(
            *reports.loss_warning(len(mixture), len(prompts)),
            *reports.bos_warning(first, tokenizer),
            *faults.warnings(),
            *reports.note_warnings(seen.notes, seen.rows),
        ),
        faults=faults,
    )
