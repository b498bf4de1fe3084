"""Read a row as what a command trains on or scores.

Supervised fine-tuning: an answer, every assistant turn, or a whole text. Pairs: a chosen and a rejected answer to one prompt.

``join_pair`` finds the tokens that both share. All tokens after them are trained in both, so the two logprobs are of the same
continuation, even if BPE merges the end of the prompt with the start of only one answer.

Unpaired: an answer with a label, desirable or not. Steps: a text with a placeholder token after each step, and a label for
each, for process reward models. The prediction is at the placeholder: the next-token prediction of its hidden state is compared
with the label. Hard labels are tokens (their ids are in the stream), soft labels are the probability of the positive token.

Outputs: a prompt and an output as the token ids for a reward model, formatted as in its training. The text is made and tokenised
as that of pairs: prompt and output as one text with an end token. Unlike there, an empty output
has a score too.
"""

import json
import logging
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from togi.data.chat import Tokenizer, check_rendering, encode, plain_prompt, render_messages, visible
from togi.data.faults import SENTENCES, Drop, Note, check_whole, named, of_field
from togi.data.fields import Fields, is_empty, plain_draft
from togi.data.precheck import RecordSpec
from togi.data.report import note_warnings
from togi.data.source import Mixture
from togi.data.tables import Row
from togi.data.turns import Coded, Draft, check_last, conversation, end_tokens
from togi.errors import DataError


@dataclass(frozen=True, slots=True)
class RowReader(ABC):
    """How rows are read. Picklable; its repr names everything that the result depends on."""

    spec: RecordSpec

    @abstractmethod
    def read(self, fields: Fields) -> tuple[Draft, ...] | Drop:
        """The drafts to tokenise, or why there are none. Raises RowError."""

    def finish(self, coded: tuple[Coded, ...], tokenizer: Tokenizer) -> tuple[Coded, ...] | Drop:
        """Check or change the sequences, which fit --max_len now. Raises RowError."""
        return coded


@dataclass(frozen=True, slots=True)
class AnswerReader(RowReader):
    """Supervised rows."""

    def read(self, fields: Fields) -> tuple[Draft, ...] | Drop:
        """One draft, in one of the modes of the module's title."""
        spec = self.spec
        value = fields.value("input_key", spec.input_key)
        if spec.pretrain_mode:
            # All of a text is trained, and nothing ends it.
            text = fields.text(spec.input_key, chat=False) if not is_empty(value) else ""
            draft = Draft(text, ((0, len(text)),), complete=False) if text else Drop.EMPTY_PROMPT
        elif spec.output_key is None or (spec.apply_chat_template and spec.output_key == spec.input_key):
            assert spec.apply_chat_template, "--output_key is not set"
            draft = Drop.EMPTY_PROMPT if is_empty(value) else self._conversation(fields)
        else:
            fields.value("output_key", spec.output_key)
            draft = fields.draft((spec.input_key, spec.output_key), spec)
        return draft if isinstance(draft, Drop) else (draft,)

    def _conversation(self, fields: Fields) -> Draft | Drop:
        key, multiturn = self.spec.input_key, self.spec.multiturn
        dialogue = fields.whole(key, "output_key")
        last = len(dialogue.messages) - 1
        if not multiturn:
            with of_field(key):
                check_last(dialogue.messages)
            if last == 0:
                return Drop.EMPTY_PROMPT
        return conversation(dialogue, 0 if multiturn else last, fields.tokenizer)


MARGIN = "margin"


@dataclass(frozen=True, slots=True)
class PairReader(RowReader):
    """Rows with a chosen and a rejected answer."""

    def read(self, fields: Fields) -> tuple[Draft, ...] | Drop:
        """Two drafts, chosen first, with values "chosen" (1 or 0) and "margin" (0 without ``margin_loss``)."""
        spec = self.spec
        keys = spec.chosen_key, spec.rejected_key
        answers = fields.value("chosen_key", keys[0]), fields.value("rejected_key", keys[1])
        empty_prompt = spec.prompt_key is not None and is_empty(fields.value("prompt_key", spec.prompt_key))
        margin = _margin(fields.row) if spec.margin_loss else 0.0
        # Cheap reasons to drop the row, before anything is formatted.
        if empty_prompt:
            return Drop.EMPTY_PROMPT
        if any(is_empty(answer) for answer in answers):
            return Drop.EMPTY_ANSWER
        if answers[0] == answers[1]:
            return Drop.TIE
        drafts = self._chats(fields, keys) if spec.apply_chat_template else [self._plain(fields, key) for key in keys]
        pair = []
        for chosen, draft in zip((1.0, 0.0), drafts, strict=True):
            if isinstance(draft, Drop):
                return draft
            pair.append(replace(draft, values={"chosen": chosen, "margin": margin}))
        return tuple(pair)

    def finish(self, coded: tuple[Coded, ...], tokenizer: Tokenizer) -> tuple[Coded, ...] | Drop:
        """The pair with a common ``prompt_length``: the equal leading tokens that neither side trains on."""
        chosen, rejected = coded
        if np.array_equal(chosen.tokens, rejected.tokens):
            return Drop.CUT_EQUAL
        lengths = len(chosen.tokens), len(rejected.tokens)
        limit = min(lengths) if self._implicit else min(chosen.prompt_length, rejected.prompt_length)
        differs = np.flatnonzero(chosen.tokens[:limit] != rejected.tokens[:limit])
        shared = int(differs[0]) if len(differs) else limit
        return tuple(
            replace(side, prompt_length=shared, runs=((shared, side.runs[0][1]), *side.runs[1:])) for side in coded
        )

    @property
    def _implicit(self) -> bool:
        return self.spec.implicit_prompt and self.spec.prompt_key is None and not self.spec.apply_chat_template

    def _plain(self, fields: Fields, key: str) -> Draft | Drop:
        """A draft in plain text. Without a prompt field the answer is the whole text; ``finish`` finds an implicit prompt."""
        if self.spec.prompt_key is None:
            return plain_draft("", fields.text(key), frozenset({Note.IMPLICIT_PROMPT} if self._implicit else ()))
        return fields.draft((self.spec.prompt_key, key), self.spec)

    def _chats(self, fields: Fields, keys: tuple[str, str]) -> list[Draft | Drop]:
        """Both conversations, checked to answer the same history."""
        found = []
        for key in keys:
            if self.spec.prompt_key is not None:
                found.append(fields.exchange((self.spec.prompt_key, key)))
                continue
            # Without a prompt field each conversation holds its own prompt, and its last message is the answer.
            dialogue = fields.whole(key, "prompt_key")
            with of_field(key):
                check_last(dialogue.messages)
            found.append((dialogue, len(dialogue.messages) - 1))
        (chosen, chosen_first), (rejected, rejected_first) = found
        if chosen.messages[:chosen_first] != rejected.messages[:rejected_first]:
            names = " and ".join(map(repr, keys))
            raise Drop.WRONG_ROLES.error(
                f"the conversations in {names} differ before their last message: both must answer the same history."
            )
        if chosen_first == 0:
            return [Drop.EMPTY_PROMPT] * 2
        if chosen.messages == rejected.messages:
            return [Drop.TIE] * 2
        return [conversation(dialogue, first, fields.tokenizer) for dialogue, first in found]


def _margin(row: Row) -> float:
    """The margin, a number or its text as in a CSV cell."""
    if row.get(MARGIN) is None:
        raise Drop.MISSING_FIELD.error(f"has no {MARGIN!r}, which --margin_loss needs: fill it in, or remove the row.")
    value = row[MARGIN]
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        with suppress(ValueError):
            if math.isfinite(margin := float(value)):
                return margin
    raise Drop.WRONG_TYPE.error(
        f"the field {MARGIN!r} is {value!r}, not a finite number: correct it or remove the row."
    )


# CSV cells are strings: labels as written by hand, by Python and by tables with missing values.
LABELS: Mapping[object, float] = {0: 0.0, 1: 1.0} | {
    text: label for label, texts in ((0.0, ("0", "0.0", "false")), (1.0, ("1", "1.0", "true"))) for text in texts
}


@dataclass(frozen=True, slots=True)
class UnpairedReader(AnswerReader):
    """Rows with an answer and whether it is desirable."""

    def read(self, fields: Fields) -> tuple[Draft, ...] | Drop:
        """One draft as for supervised fine-tuning, with values "desirable" (1 or 0) and "mismatched" (0)."""
        label = fields.value("label_key", self.spec.label_key)
        known = label.strip().lower() if isinstance(label, str) else label
        if not isinstance(known, str | int | float) or known not in LABELS:
            raise Drop.WRONG_LABELS.error(
                f"the field {self.spec.label_key!r} is {label!r}: a label must be true or 1 (desirable), or false or 0."
            )
        drafts = AnswerReader.read(self, fields)
        if isinstance(drafts, Drop):
            return drafts
        values = {"desirable": LABELS[known], "mismatched": 0.0}
        return tuple(replace(draft, values=values) for draft in drafts)


@dataclass(frozen=True, slots=True)
class StepLabels:
    """How steps are marked and labelled. ``reward_ids``: in the order of ``--reward_tokens``; None: any token.

    ``soft``: labels are probabilities of the first reward token instead of tokens; a data set has one kind only.
    """

    placeholder: str
    reward_tokens: tuple[str, ...] | None
    reward_ids: tuple[int, ...] | None
    soft: bool


def step_labels(spec: RecordSpec, first_label: object, tokenizer: Tokenizer) -> StepLabels:
    """Check that each named text is one token, and that soft labels have two tokens. Raises DataError."""
    token_id(spec.placeholder_token, "--placeholder_token", tokenizer)
    tokens = spec.reward_tokens
    ids = None if tokens is None else tuple(token_id(token, "--reward_tokens", tokenizer) for token in tokens)
    if ids is not None and len(set(ids)) < len(ids):
        raise DataError(f"Two of --reward_tokens {' '.join(tokens or ())} are the same token: choose other texts.")
    soft = isinstance(first_label, int | float)
    if soft and (ids is None or len(ids) != 2):
        raise DataError(
            f"The labels in {spec.label_key!r} are numbers, which need two tokens to divide the probability: give "
            "--reward_tokens POSITIVE NEGATIVE."
        )
    return StepLabels(spec.placeholder_token, tokens, ids, soft)


def token_id(text: str, flag: str, tokenizer: Tokenizer) -> int:
    """The id of a text that is one token. Raises RowError naming the flag if it is not."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise Drop.WRONG_LABELS.error(
            f"{flag} {text!r} is {len(ids)} tokens of this tokenizer, not one: choose a text that is a token of its own."
        )
    return ids[0]


@dataclass(frozen=True, slots=True)
class StepReader(RowReader):
    """Rows with a label after each step."""

    labels: StepLabels

    def read(self, fields: Fields) -> tuple[Draft, ...] | Drop:
        """One draft whose spans are the placeholders, which must be as many as the labels."""
        keys, placeholder = (self.spec.input_key, self.spec.label_key), self.labels.placeholder
        value = fields.value("input_key", keys[0])
        labels = label_list(fields.value("label_key", keys[1]))
        if is_empty(value):
            return Drop.EMPTY_PROMPT
        text = fields.text(keys[0], chat=False)
        if not isinstance(labels, Sequence) or isinstance(labels, str):
            raise Drop.WRONG_TYPE.error(
                f"the field {keys[1]!r} is of type {type(labels).__name__}, not a list: give one label for "
                'each placeholder, in a CSV file as JSON (["+", "-"]).'
            )
        spans = tuple(found.span() for found in re.finditer(re.escape(placeholder), text))
        if len(spans) != len(labels):
            raise Drop.WRONG_LABELS.error(
                f"has {len(labels)} labels in {keys[1]!r} for {len(spans)} placeholders {placeholder!r} in {keys[0]!r}: "
                "give one label for each."
            )
        if not spans:
            return Drop.NO_STEPS
        if not text[: spans[0][0]].strip():
            raise Drop.WRONG_LABELS.error(f"starts with a placeholder in {keys[0]!r}: put the step before it.")
        numbers = tuple(_number(label, f"label {i}", self.labels, fields.tokenizer) for i, label in enumerate(labels))
        return (Draft(text, spans, complete=False, labels=numbers),)

    def finish(self, coded: tuple[Coded, ...], tokenizer: Tokenizer) -> tuple[Coded, ...] | Drop:
        """Raise RowError if a placeholder is not a single token of its own."""
        for number, (start, end) in enumerate(coded[0].runs):
            part = visible(tokenizer, coded[0].tokens[start:end].tolist())
            if end - start != 1 or part.strip() != self.labels.placeholder.strip():
                raise Drop.WRONG_LABELS.error(
                    f"has its placeholder {number} in the tokens {part!r}, together with other text: put white space around "
                    "placeholders, or choose another --placeholder_token."
                )
        return coded


def label_list(value: object) -> object:
    """The value; if it is the JSON text of a list, as in a CSV cell, that list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            return json.loads(value)
    return value


def _number(label: object, what: str, kind: StepLabels, tokenizer: Tokenizer) -> float:
    """A label as a number: the id of its token, or the probability. Raises RowError."""
    wrong = Drop.WRONG_LABELS.error
    if not isinstance(label, str | int | float):
        raise wrong(f"{what} is of type {type(label).__name__}: give a token, or a number from 0 to 1.")
    # A number, or true for 1, is a probability.
    if isinstance(label, int | float) != kind.soft:
        earlier = "numbers" if kind.soft else "tokens"
        raise wrong(f"{what} is {label!r}, but earlier labels are {earlier}: use one kind for all rows.")
    if isinstance(label, str):
        if kind.reward_tokens is not None and label not in kind.reward_tokens:
            known = " ".join(kind.reward_tokens)
            raise wrong(
                f"{what} is {label!r}, which is not among --reward_tokens {known}: add it there or correct the row."
            )
        return float(token_id(label, what, tokenizer))
    if not 0 <= label <= 1:
        raise wrong(f"{what} is {label!r}: a probability of the positive token must lie between 0 and 1.")
    return float(label)


logger = logging.getLogger(__name__)


def read_outputs(mixture: Mixture, spec: RecordSpec, tokenizer: Tokenizer) -> tuple[list[Row], list[list[int]]]:
    """The rows in the order of the mixture, and the token ids of each.

    Raises DataError naming row and field, also for a row of more than ``max_len`` tokens.
    """
    check_rendering(tokenizer, apply_chat_template=spec.apply_chat_template, input_template=spec.input_template)
    names = [mixture.place(pick) for pick in mixture.picks]
    rows = mixture.rows()
    notes = Counter[Note]()
    # Format all rows first: a bad row is reported before anything is tokenised.
    texts = []
    for row, name in zip(rows, names, strict=True):
        with named(name):
            texts.append(_text(Fields(row, tokenizer), spec, notes))
            check_whole(texts[-1], "has")
    for warning in note_warnings(notes, len(rows)):
        logger.warning("%s", warning)
    ids = encode(texts, tokenizer, add_special_tokens=not spec.apply_chat_template)
    enders = end_tokens(tokenizer, chat=spec.apply_chat_template)
    for name, tokens in zip(names, ids, strict=True):
        # The score is read at the end token, as in training.
        if tokens[-1] not in enders:
            tokens.append(tokenizer.eos_token_id)
        if len(tokens) > spec.max_len:
            raise DataError(
                f"{name} has {len(tokens)} tokens, more than --max_len {spec.max_len}: raise it, or shorten the row."
            )
    return rows, ids


def _text(fields: Fields, spec: RecordSpec, notes: Counter[Note]) -> str:
    assert spec.output_key is not None, "--output_key is not set"
    keys = spec.input_key, spec.output_key
    fields.value("input_key", keys[0])
    output = fields.value("output_key", keys[1])
    if not spec.apply_chat_template:
        prompt, answer = fields.text(keys[0]), fields.text(keys[1])
        text = plain_prompt(prompt, spec.input_template) + answer
        if not text:
            raise DataError("has neither a prompt nor an output: remove it.")
        return text
    dialogue = fields.prompt(keys[0])
    if not dialogue.messages:
        raise DataError(SENTENCES[Drop.EMPTY_PROMPT])
    # An empty output is scored at the end of the generation prompt, and so is an answer without text.
    if not isinstance(output, str) or output.strip():
        draft = conversation(*fields.exchange(keys), fields.tokenizer)
        if isinstance(draft, Draft):
            # That a model says None or repeats the prompt is no fault of the data.
            notes.update(draft.notes - {Note.MISSING_WORD, Note.PROMPT_IN_ANSWER})
            return draft.text
    return render_messages(dialogue, fields.tokenizer, add_generation_prompt=True)
