"""From a text and its trained characters to token ids and trained tokens. The whole text is tokenised once.

The offsets of the fast tokenizer map characters to tokens. A token that ends inside a trained part belongs to it, even if it
starts before: where BPE merges the end of a prompt with the start of an answer, the merged token is the first of the answer.
``turns`` and the modules of each command decide the text and its trained parts; ``records`` decides what is too long.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from togi.data.chat import Tokenizer, visible
from togi.data.faults import Drop, Note, RowError
from togi.errors import DataError
from togi.sample import Sample

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Draft:
    """A text to be tokenised.

    ``spans``: (start, end) characters of each trained part, ascending. ``complete``: an answer ends with the text, so it must end
    with an end token. ``labels``: one number per span, or empty. ``values``: as in ``Sample``. ``notes``: what was converted.
    """

    text: str
    spans: tuple[Span, ...]
    complete: bool
    labels: tuple[float, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)
    notes: frozenset[Note] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A tokenised draft, without an object per token. ``runs``: (start, end) tokens of each trained part.

    ``prompt_length``: the leading tokens that are not trained. ``merged``: the last character of the prompt and the first of the
    answer are in one token.
    """

    tokens: NDArray[np.int32]
    runs: tuple[Span, ...]
    prompt_length: int
    merged: bool
    labels: tuple[float, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)

    def cut(self, length: int) -> Coded:
        """The first ``length`` tokens; parts that start later are dropped with their labels."""
        kept = [(start, min(end, length)) for start, end in self.runs if start < length]
        return replace(
            self,
            tokens=self.tokens[:length].copy(),
            runs=tuple(kept),
            prompt_length=min(self.prompt_length, length),
            labels=self.labels[: len(kept)],
        )

    def learnable(self) -> bool:
        """Whether any token with a prediction is trained; the first token has none."""
        return any(end > max(start, 1) for start, end in self.runs)

    def loss_mask(self) -> NDArray[np.bool_]:
        """True at the trained tokens, shape (tokens)."""
        mask = np.zeros(len(self.tokens), dtype=np.bool_)
        for start, end in self.runs:
            mask[start:end] = True
        mask[:1] = False
        return mask

    def sample(self, group_id: str) -> Sample:
        """The sequence as a sample; labels become the stream "labels", NaN where there is none."""
        streams = {}
        if self.labels:
            stream = np.full(len(self.tokens), np.nan, dtype=np.float32)
            for (start, end), label in zip(self.runs, self.labels, strict=True):
                stream[start:end] = label
            streams["labels"] = stream
        tokens = self.tokens.astype(np.int64)
        return Sample(tokens, self.loss_mask(), self.prompt_length, group_id, streams, self.values)


def encode_drafts(
    drafts: Sequence[Draft], tokenizer: Tokenizer, *, add_special_tokens: bool, enders: Collection[int]
) -> list[Coded]:
    """Tokenise each draft. Appends EOS to complete drafts unless they already end with one of ``enders``."""
    if not drafts:
        return []
    encoded = tokenizer(
        [draft.text for draft in drafts],
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    coded = []
    for draft, ids, offsets in zip(drafts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        coded.append(_code(draft, ids, offsets, tokenizer.eos_token_id, enders))
    return coded


def end_tokens(tokenizer: Tokenizer, *, chat: bool) -> frozenset[int]:
    """The tokens that end a text: EOS; in a chat also every special token except BOS, because it closes a turn.

    Raises DataError if the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no EOS token, so that no answer can be ended: set eos_token in its files.")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} if chat else set()
    return frozenset(special - {tokenizer.bos_token_id} | {tokenizer.eos_token_id})


def shown(coded: Coded, tokenizer: Tokenizer) -> str:
    """The text with special tokens visible and trained parts between ⟦ and ⟧."""
    parts, position = [], 0
    for start, end in coded.runs:
        parts += [
            visible(tokenizer, coded.tokens[position:start].tolist()),
            f"⟦{visible(tokenizer, coded.tokens[start:end].tolist())}⟧",
        ]
        position = end
    return "".join([*parts, visible(tokenizer, coded.tokens[position:].tolist())])


def check_start(coded: Coded, tokenizer: Tokenizer) -> None:
    """Raise RowError if the sequence starts with two BOS tokens."""
    bos = tokenizer.bos_token_id
    if bos is not None and coded.tokens[:2].tolist() == [bos, bos]:
        raise RowError(
            Drop.BAD_TEXT,
            f"would start with the BOS token {tokenizer.bos_token!r} twice: remove it from the data or the template.",
        )


def check_decoding(draft: Draft, coded: Coded, tokenizer: Tokenizer) -> None:
    """Raise DataError if the trained tokens do not decode to the text of the trained parts (up to white space)."""
    for (first, last), (start, end) in zip(draft.spans, coded.runs, strict=True):
        text = draft.text[first:last]
        # Encode and decode the expected text too, since some tokenizers lower or normalise text.
        expected = visible(tokenizer, tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        decoded = visible(tokenizer, coded.tokens[start:end].tolist())
        if _squashed(expected) not in _squashed(decoded):
            raise DataError(
                f"has the part {text[:60]!r} to learn, but the tokens at its place say {decoded[:60]!r}: the character "
                "offsets of this tokenizer are wrong, use another one."
            )


def _code(draft: Draft, ids: list[int], offsets: list[Span], eos: int, enders: Collection[int]) -> Coded:
    starts, ends = _character_ranges(offsets)
    runs = [_run(span, starts, ends) for span in draft.spans]
    tokens = np.array(ids, dtype=np.int32)
    # End the answer, unless it was truncated or already has an end token.
    if draft.complete and runs and runs[-1][0] < len(ids) and ids[-1] not in enders:
        tokens = np.append(tokens, np.int32(eos))
        runs[-1] = (runs[-1][0], len(tokens))
    first = runs[0][0] if runs else len(tokens)
    merged = bool(runs) and first < len(starts) and bool(starts[first] < draft.spans[0][0])
    return Coded(tokens, tuple(runs), first, merged, draft.labels, draft.values)


def _character_ranges(offsets: list[Span]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The start and end characters of each token. Special tokens that the tokenizer adds are at (0, 0).

    Some tokenizers leave white space out of offsets, so a token starts at the latest where the previous one ended.
    """
    table = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    ends = table[:, 1]
    reached = np.maximum.accumulate(np.concatenate([np.zeros(1, np.int64), ends[:-1]]))[: len(ends)]
    return np.minimum(table[:, 0], reached), ends


def _run(span: Span, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Span:
    """The (start, end) tokens from the first to the last that overlap the span; (n, n) if there are none."""
    inside = np.flatnonzero((ends > span[0]) & (starts < span[1]))
    return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (len(ends), len(ends))


def _squashed(text: str) -> str:
    return "".join(text.split())
