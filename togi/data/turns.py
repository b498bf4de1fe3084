"""The text of a conversation, and the characters of the assistant turns to train on.

A template that marks turns with ``{% generation %}`` is trusted. For other templates the whole conversation is formatted once,
and each turn lies between two formatted prefixes: the messages before it with the generation prompt, and those including it.
Templates that format the newest turn with more around it than older turns are handled in ``_kept``. In both cases the text of
each turn must be in its part. What generation does not write is not trained: the generation prompt, even inside marks, and
white space after the closing token of a turn. Then the whole text is tokenised once. The offsets of the fast tokenizer map
characters to tokens. A token that ends inside a trained part belongs to it, even if it starts before: where BPE merges the end
of a prompt with the start of an answer, the merged token is the first of the answer. ``records`` decides what is too long.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from togi.data.chat import Tokenizer, closing_text, holds_controls, marks_turns, render_marked, render_messages, visible
from togi.data.faults import Drop, Note
from togi.data.messages import ASSISTANT, Dialogue, Message, argument_texts, call_names, is_marked_off, reasoning_of
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
    found = zip(drafts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [_code(draft, ids, offsets, tokenizer.eos_token_id, enders) for draft, ids, offsets in found]


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
    cuts = [0, *chain.from_iterable(coded.runs), len(coded.tokens)]
    parts = [visible(tokenizer, coded.tokens[start:end].tolist()) for start, end in pairwise(cuts)]
    return "".join(f"⟦{part}⟧" if number % 2 == 1 else part for number, part in enumerate(parts))


def check_start(coded: Coded, tokenizer: Tokenizer) -> None:
    """Raise RowError if the sequence starts with two BOS tokens."""
    bos = tokenizer.bos_token_id
    if bos is not None and coded.tokens[:2].tolist() == [bos, bos]:
        raise Drop.BAD_TEXT.error(
            f"would start with the BOS token {tokenizer.bos_token!r} twice: remove it from the data or the template."
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
    # The characters of each token; special tokens that the tokenizer adds are at (0, 0). Some tokenizers leave white space out
    # of offsets, so a token starts at the latest where the previous one ended.
    firsts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    reached = np.maximum.accumulate(np.concatenate([np.zeros(1, np.int64), ends[:-1]]))[: len(ends)]
    starts = np.minimum(firsts, reached)
    runs = [_run(span, starts, ends) for span in draft.spans]
    tokens = np.array(ids, dtype=np.int32)
    # End the answer, unless it was truncated or already has an end token.
    if draft.complete and runs and runs[-1][0] < len(ids) and ids[-1] not in enders:
        tokens = np.append(tokens, np.int32(eos))
        runs[-1] = (runs[-1][0], len(tokens))
    first = runs[0][0] if runs else len(tokens)
    merged = bool(runs) and first < len(starts) and bool(starts[first] < draft.spans[0][0])
    return Coded(tokens, tuple(runs), first, merged, draft.labels, draft.values)


def _run(span: Span, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Span:
    """The (start, end) tokens from the first to the last that overlap the span; (n, n) if there are none."""
    inside = np.flatnonzero((ends > span[0]) & (starts < span[1]))
    return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (len(ends), len(ends))


def _squashed(text: str) -> str:
    return "".join(text.split())


_SHOWN = 60
_MARK = "mark the assistant's turns in the template with {% generation %} and {% endgeneration %} (--tokenizer_chat_template)"


def check_last(messages: Sequence[Message]) -> None:
    """Raise RowError if the last message is not the assistant's."""
    if messages[-1]["role"] != ASSISTANT:
        raise Drop.WRONG_ROLES.error(
            f"ends with a message of role {messages[-1]['role']!r}, which cannot be learned: end it with one of role "
            f"{ASSISTANT!r}, or leave the row out."
        )


def says_something(message: Message) -> bool:
    """Whether a message has text, reasoning or a tool call to train on."""
    return bool(message["content"].strip() or "".join(reasoning_of(message)).strip() or message.get("tool_calls"))


def conversation(dialogue: Dialogue, first: int, tokenizer: Tokenizer) -> Draft | Drop:
    """The conversation up to its last trained turn: every assistant turn from message ``first`` on that says something.

    Turns with nothing before them are context. Raises RowError.
    """
    messages = dialogue.messages
    # an answer beside its prompt that holds no message is empty; a conversation lacks its answer
    if first == 0 and not any(message["role"] == ASSISTANT for message in messages):
        raise Drop.WRONG_ROLES.error(
            "has no turn of the assistant, so there is nothing to learn: add the answer or remove the row."
        )
    # Stage 1: the turns to train on.
    said = [i for i in range(max(first, 1), len(messages)) if messages[i]["role"] == ASSISTANT]
    turns = [i for i in said if says_something(messages[i])]
    if turns and all(is_marked_off(messages[i]) for i in turns):
        raise Drop.EMPTY_ANSWER.error(
            "has nothing to learn, since each answer is marked with weight 0 or train false: remove the row."
        )
    turns = [i for i in turns if not is_marked_off(messages[i])]
    if not turns:
        return Drop.EMPTY_ANSWER
    # Stage 2: the text, and where these turns are in it.
    if marks_turns(tokenizer):
        text, spans = _marked(dialogue, turns, tokenizer)
    else:
        text = render_messages(dialogue, tokenizer)
        spans = [_place(dialogue, turn, text, tokenizer) for turn in turns]
    spans = [(start, start + len(text[start:end].rstrip())) for start, end in spans]
    # Stage 3: is everything in the text that the messages say?
    notes = set(dialogue.notes)
    for turn, (start, end) in zip(turns, spans, strict=True):
        notes |= _check_text(messages[turn], turn, text[start:end])
    start, end = spans[-1]
    notes |= lost(dialogue.until(turns[-1]), text[:start], learned=frozenset(turns))
    notes |= control_notes(messages[: turns[-1] + 1], tokenizer)
    return Draft(text[:end], tuple(spans), complete=True, notes=frozenset(notes))


def control_notes(messages: Sequence[Message], tokenizer: Tokenizer) -> set[Note]:
    """A note if the text of a message would be read as control tokens."""
    texts = (text for message in messages for text in (message["content"], *reasoning_of(message)))
    return {Note.CONTROL_TOKENS} if holds_controls(texts, tokenizer) else set()


def lost(dialogue: Dialogue, text: str, *, learned: frozenset[int] = frozenset()) -> set[Note]:
    """What of a dialogue is missing in its formatted text. Messages in ``learned`` are checked separately."""
    notes, called = set[Note](), [name for message in dialogue.messages for name in call_names(message)]
    parts = (part for message in dialogue.messages for part in (message["content"], *reasoning_of(message)))
    said = [part for part in parts if is_held(part, text)]

    def named(name: str) -> int:
        """How often the messages call a tool or mention it."""
        spoken: int = sum(part.count(name) for part in said)
        return called.count(name) + spoken

    # A tool that is shown has its name in the text more often than the messages say it.
    if dialogue.tools and not any(text.count(name) > named(name) for name in dialogue.tool_names):
        notes.add(Note.TOOLS_UNSEEN)
    # Tools inside a message are objects, or text.
    inside = json.dumps([message["tools"] for message in dialogue.messages if message.get("tools")]).replace('\\"', '"')
    in_system = re.findall(r'"name": ?"([^"]+)"', inside)
    if in_system and not any(name in text for name in in_system):
        notes.add(Note.TOOLS_UNSEEN)
    # Messages and calls of the context.
    context = [message for number, message in enumerate(dialogue.messages) if number not in learned]
    is_whole = all(is_held(message["content"], text) for message in context)
    if not is_whole or any(text.count(name) < named(name) for name in set(called)):
        notes.add(Note.CONTEXT_LOST)
    return notes


def is_held(said: str, text: str) -> bool:
    """Whether ``said`` is in the text, verbatim or as a JSON string: some templates quote tool answers."""
    return all(piece in text or json.dumps(piece, ensure_ascii=False)[1:-1] in text for piece in _pieces(said))


def _pieces(content: str) -> list[str]:
    """Reasoning and answer. Templates rewrite the tags, and the first may be in the generation prompt."""
    return [piece.strip() for piece in re.split("</?think>", content)]


def _marked(dialogue: Dialogue, turns: Sequence[int], tokenizer: Tokenizer) -> tuple[str, list[Span]]:
    text, marks = render_marked(dialogue, tokenizer)
    assistants = [i for i, message in enumerate(dialogue.messages) if message["role"] == ASSISTANT]
    if len(marks) != len(assistants):
        raise Drop.TEMPLATE.error(
            f"has {len(assistants)} messages of the assistant, but the chat template marks {len(marks)} parts with "
            "{% generation %}: let it mark each message of the assistant once."
        )
    spans = []
    for turn in turns:
        start, end = marks[assistants.index(turn)]
        before = render_messages(dialogue.until(turn), tokenizer, add_generation_prompt=True)
        # Some templates mark the header of a turn too.
        within = start < len(before) <= end and text.startswith(before)
        spans.append((len(before) if within else start, end))
    return text, spans


def _place(dialogue: Dialogue, turn: int, text: str, tokenizer: Tokenizer) -> Span:
    """The (start, end) of a turn in the ``text`` of the whole dialogue. Raises RowError saying why it is unknown."""
    messages = dialogue.messages
    before = render_messages(dialogue.until(turn), tokenizer, add_generation_prompt=True)
    # The usual case needs no further formatting.
    if text.startswith(before) and (plain := _plainly_closed(messages[turn], text, len(before), tokenizer)) > 0:
        return len(before), len(before) + plain
    after = text if turn + 1 == len(messages) else render_messages(dialogue.until(turn + 1), tokenizer)
    if text.startswith(before):
        # The prefixes agree with the whole: the turn is between them.
        if text.startswith(after) and len(after) > len(before):
            return len(before), len(after)
        # The newest turn is formatted with more around it than older turns.
        own = after.removeprefix(before) if after.startswith(before) else ""
        if (length := _kept(own, text[len(before) :], messages[turn]["content"], tokenizer)) is not None:
            return len(before), len(before) + length
        *thoughts, _ = _pieces(messages[turn]["content"])
        how = "differently" if all(thought in text for thought in thoughts) else "without its reasoning"
        raise Drop.TEMPLATE.error(
            f"has its message {turn} rendered {how} by the chat template when more messages follow, so that its place is not "
            f"known: {_way_out(messages, turn)}"
        )
    # The rest are templates that cannot be used, told apart for the message.
    history = render_messages(dialogue.until(turn), tokenizer)
    opening = before.removeprefix(history)
    if text.startswith(history) and before.startswith(history):
        rendered = text[len(history) : len(history) + len(opening) + _SHOWN]
        raise Drop.TEMPLATE.error(
            f"has its message {turn} rendered by the chat template without the generation prompt {opening!r} that answers are "
            f"generated after (it renders {rendered!r}), so that no answer would be learned as it is generated: use a template "
            f"in which both are alike, or {_MARK}."
        )
    raise Drop.TEMPLATE.error(
        f"has the messages before its message {turn} rendered differently by the chat template when more messages follow, so "
        f"that it would be learned after another text than it is generated after: {_way_out(messages, turn)}"
    )


def _plainly_closed(message: Message, text: str, start: int, tokenizer: Tokenizer) -> int:
    """The length of a turn that is its content plus the closing text, without formatting it again; 0 if it is not."""
    closing = closing_text(tokenizer)
    if not closing or message.get("tool_calls") or reasoning_of(message):
        return 0
    plain = message["content"] + closing
    return len(plain) if text.startswith(plain, start) else 0


def _way_out(messages: Sequence[Message], turn: int) -> str:
    """The remedy if a turn is formatted differently as the newest message and with messages after it."""
    if any(message["role"] == ASSISTANT for message in (*messages[turn - 1 : turn], *messages[turn + 1 : turn + 2])):
        return "join messages of the assistant that follow each other."
    if turn + 1 == len(messages):
        return f"use a template that renders them alike, or {_MARK}."
    return f"{_MARK}, or train on its last turn only."


def _kept(own: str, rest: str, content: str, tokenizer: Tokenizer) -> int | None:
    """The length of a turn at the start of ``rest``, if its ``own`` rendering as the newest turn ends with it; else None.

    Templates put reasoning, or an empty place for it, before the newest turn only, and EOS after it.
    """
    ended = own.removesuffix(str(tokenizer.eos_token))
    closes = ended.rstrip().endswith(tuple(str(token) for token in tokenizer.added_tokens_decoder.values()))
    for whole in (own, ended) if closes else (own,):
        start = whole.find(rest[:1])
        while start >= 0:
            kept = whole[start:]
            if rest.startswith(kept) and all(piece in kept for piece in _pieces(content)):
                return len(kept)
            start = whole.find(rest[:1], start + 1)
    return None


def _check_text(message: Message, turn: int, part: str) -> set[Note]:
    """Notes on what a trained message loses harmlessly. Raises RowError if its content or calls are not in ``part``."""
    content, reasoning = message["content"].strip(), reasoning_of(message)
    if not all(piece in part for piece in _pieces(content)):
        raise Drop.TEMPLATE.error(
            f"has its message {turn} changed by the chat template (the part to learn is {part[:_SHOWN]!r}, the message "
            f"{content[:_SHOWN]!r}): use a template that keeps the text of the assistant."
        )
    calls = call_names(message)
    if any(part.count(name) < content.count(name) + calls.count(name) for name in calls):
        raise Drop.TEMPLATE.error(
            f"has tool calls in its message {turn} that the chat template leaves out: use a template that renders tool_calls."
        )
    for text, written in argument_texts(message):
        if text not in part and written not in part:
            raise Drop.TEMPLATE.error(
                f"has a tool call in its message {turn} whose arguments the chat template leaves out (it renders "
                f"{part[:_SHOWN]!r}): use a template that renders them."
            )
    if all(thought.strip() in part for thought in reasoning):
        return set()
    if not content and not call_names(message):
        raise Drop.TEMPLATE.error(
            f"has nothing but reasoning in its message {turn}, which the chat template leaves out: use a template that renders "
            "reasoning_content, or put the text into content."
        )
    return {Note.REASONING_LOST}
