"""A conversation as token ids, only ever appended to.

The next request of a conversation begins with all tokens before it, sampled ones as they were sampled, if the chat template
renders the same text again. If not, it is rendered and tokenised anew: a fork, which the caller sees, as the tokens before are no
prefix. A sampled answer is put into the template in the form that brings back its text: as raw text, with its reasoning apart, or
with structured calls. Which one is tried on a short conversation. What a template knows is ``template``'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from togi.data.chat import Tokenizer, closing_token, encode, visible
from togi.data.messages import ASSISTANT, SYSTEM, TOOL, USER, Message, Tool, reasoning_of
from togi.env.template import ANSWER, CUT, KEEP, PROBE, QUESTION, Answers, Template, call_message, call_of, plain
from togi.env.tool_calls import Parsed, ToolCall, first_call, parse, reasoning_tags
from togi.errors import DataError

TOKENS = "token_ids"
"""The key of a sampled message under which its token ids are."""
FORM = "form"
"""The key of a message that is tried in this form."""
CHOICES_KEPT = 4096


class Renderer:
    """Renders conversations with the chat template of a tokenizer, which is tried once, here.

    ``ends``: further tokens that end an answer (``chat.stop_token_ids``). ``options``: variables of the template, such as
    ``enable_thinking``. Raises DataError if the template cannot render a question.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, ends: Iterable[int] = (), options: Mapping[str, object] = MappingProxyType({})
    ) -> None:
        self.tokenizer, self.template = tokenizer, Template(tokenizer, options)
        self.form = self.template.form
        self._ends = {*ends, closing_token(tokenizer), tokenizer.eos_token_id}
        self._controls = self.template.controls
        self._lead = self._lead_token()
        self._choices = dict[tuple[int, ...], Message]()

    def first(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[int, ...]:
        """The context of the first request: the whole conversation with a generation prompt. Raises DataError."""
        return tuple(self._ids(self._text(messages, tools)))

    def after(self, before: Sequence[int], messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[int, ...]:
        """The context of the next request. ``before``: the context of the last one and the tokens that were sampled after it.

        It begins with ``before`` if the conversation is rendered as it was; else it is the whole conversation, tokenised anew: a
        fork. Raises DataError.
        """
        text, known = self._text(messages, tools), visible(self.tokenizer, before)
        if before and plain(text).startswith(known):
            result = [*before, *self._ids(text[_at(text, len(known)) :], before[-1])]
            if visible(self.tokenizer, result) == plain(text):
                return tuple(result)
        # Some tokenizers change text, such as white space or accents, so that it must be compared after tokenisation.
        whole = self._ids(text)
        place = self._place(before, whole)
        return tuple(whole) if place is None else (*before, *whole[place:])

    def text(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The whole conversation with a generation prompt, as the template renders it. Raises DataError."""
        return plain(self._text(messages, tools))

    def parsed(self, ids: Sequence[int], tools: Sequence[Tool] = ()) -> Parsed:
        """The parts of a sampled answer."""
        return parse(self._words(self._body(ids)), self.form, tools=tools, thinking=self.template.opens is not None)

    def said(self, ids: Sequence[int], tools: Sequence[Tool] = ()) -> Message:
        """The message of a sampled answer, in OpenAI's form with arguments as objects. Its tokens are in it (``TOKENS``), and what
        the template gets is decided by them.
        """
        parsed = self.parsed(ids, tools)
        message: dict[str, Any] = {"role": ASSISTANT, "content": parsed.content, TOKENS: tuple(ids)}
        if parsed.reasoning:
            message["reasoning_content"] = parsed.reasoning
        if parsed.calls:
            message["tool_calls"] = [call_message(call, call.arguments) for call in parsed.calls]
        return message

    def observation(self, content: str, call: ToolCall | None = None) -> Message:
        """What a tool answers to a call, or what is said of a malformed call."""
        named = {} if call is None else {"tool_call_id": call.id, "name": call.name}
        return {"role": TOOL, "content": content, **named}

    def recalled(self, messages: Sequence[Message], said: Sequence[Message]) -> tuple[Message, ...]:
        """The messages of a client, those of the assistant replaced by the sampled ones that they repeat.

        A message repeats the one with the ids of its calls, or the first that has not been found yet with its content and calls.
        """
        left, found = list(said), list[Message]()
        for message in messages:
            own = self.template.read(message) if message.get("role") == ASSISTANT and TOKENS not in message else None
            match = None if own is None else next((each for each in left if _repeats(own, each)), None)
            if match is not None:
                left.remove(match)
            found.append(message if match is None else match)
        return tuple(found)

    # From a conversation to what the template reads, and its text.

    def _text(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        read = [message if TOKENS in message else self.template.read(message) for message in messages]
        known = self.template.read_tools(tools)
        prepared = self._prepared(self.template.framed(read, known))
        return self.template.render(prepared, known if self.template.shows_tools else (), opened=True)

    def _prepared(self, messages: Sequence[Message]) -> list[Message]:
        """Each message as the template reads it, with marks."""
        prepared, joins = list[Message](), False
        for message in messages:
            role = message["role"]
            if role == ASSISTANT:
                prepared.append(self._form(message))
                joins = False
                continue
            # What the author of the environment wrote may have control tokens.
            words = message["content"] if role in (SYSTEM, "developer") else self.template.words(message["content"])
            given = {**message, "content": words}
            as_user = role == TOOL and not self.template.takes(message, has_calls=_has_calls(prepared))
            if as_user:
                given = {"role": USER, "content": f"<tool_response>\n{words}\n</tool_response>"}
            elif role == TOOL and "tool_call_id" in message:
                given["tool_call_id"] = self.template.wanted_id(message["tool_call_id"])
            # Templates may want user and assistant in turn, and an id for each answer of a tool.
            follows = bool(prepared) and prepared[-1]["role"] == given["role"]
            is_part = self.template.answers is Answers.AFTER_CALLS and role == TOOL and "tool_call_id" not in message
            if follows and (as_user or joins or is_part):
                last = prepared.pop()
                given = {**last, "content": f"{last['content']}\n{given['content']}"}
            joins = as_user
            prepared.append(given)
        return prepared

    # The form of a sampled answer.

    def _body(self, ids: Sequence[int]) -> Sequence[int]:
        """The tokens without the one that ends the answer."""
        return ids[:-1] if ids and ids[-1] in self._ends else ids

    def _form(self, message: Message) -> Message:
        """A message of the assistant as the template reads it."""
        if FORM in message:
            form: Message = message[FORM]
            return form
        if TOKENS not in message:
            return self.template.outside(message)
        ids = tuple(message[TOKENS])
        if ids not in self._choices:
            if len(self._choices) >= CHOICES_KEPT:
                del self._choices[next(iter(self._choices))]
            self._choices[ids] = self._chosen(ids)
        return self._choices[ids]

    def _chosen(self, ids: tuple[int, ...]) -> Message:
        """The form of an answer in which the template brings its text back; above all before what is expected to follow."""
        parsed = self.parsed(ids)
        expected = self.template.render([QUESTION], opened=True) + self._words(ids)
        results = [
            {"role": TOOL, "content": PROBE, "tool_call_id": call.id, "name": call.name} for call in parsed.calls
        ]
        follows = [results or [{"role": TOOL, "content": PROBE}], [{"role": USER, "content": PROBE}]]
        if not (parsed.calls or parsed.problems):
            follows.reverse()
        best, most = None, 0
        for form in self._forms(ids, parsed):
            texts = [self._followed(form, follow) for follow in follows]
            score = sum(
                worth for worth, text in zip((2, 1), texts, strict=True) if texts[0] and text.startswith(expected)
            )
            # If no form brings the text back, the last that can be rendered: the most structured.
            if score > most or (most == 0 and texts[0]):
                best, most = form, score
            if most == 3:
                break
        return best or {"role": ASSISTANT, "content": _kept(self._raw(ids))}

    def _followed(self, form: Message, follow: Sequence[Message]) -> str:
        """The text of an answer that is followed by these messages; "" if the template refuses or loses them."""
        try:
            messages = self._prepared([QUESTION, {"role": ASSISTANT, FORM: form}, *follow])
            # An answer after it shows whether the template accepts how the roles follow each other.
            self.template.render([*messages, ANSWER, QUESTION], opened=True)
            text = plain(self.template.render(messages, opened=True))
        except DataError:
            return ""
        return text if PROBE in text else ""

    def _forms(self, ids: Sequence[int], parsed: Parsed) -> Iterator[Message]:
        """The forms that an answer may be given in, the most structured last."""
        raw = self._raw(ids)
        thought, rest = self._apart(raw)
        reasoning = {} if thought is None else {"reasoning_content": KEEP + thought + KEEP}
        structured = list[Message]()
        if parsed.calls and self.template.knows_calls:
            for text, apart in ((raw, {}), (rest, reasoning))[: 2 if reasoning else 1]:
                spoken = {"content": _kept(text[: _at(text, first_call(plain(text), self.form))]), **apart}
                words = [self.template.words(call.arguments) for call in parsed.calls]
                for arguments in (_sources(raw, parsed), words):
                    calls = map(self.template.call_form, parsed.calls, arguments)
                    structured.append({"role": ASSISTANT, **spoken, "tool_calls": list(calls)})
        # A template that takes answers of tools after structured calls only is trained with them.
        if self.template.answers is Answers.AFTER_CALLS:
            yield from structured
        if raw.startswith(" "):
            yield {"role": ASSISTANT, "content": _kept(raw[1:])}
        if self.template.opens is not None:
            opening = self.template.prompt[self.template.prompt.rfind(self.template.opens[0]) :]
            yield {"role": ASSISTANT, "content": _kept(opening + raw)}
        yield {"role": ASSISTANT, "content": _kept(raw)}
        if reasoning:
            yield {"role": ASSISTANT, "content": _kept(rest), **reasoning}
        yield from structured

    def _words(self, ids: Sequence[int]) -> str:
        """The text of tokens that follow others: some tokenizers leave out the white space before the first word."""
        if self._lead is None:
            return visible(self.tokenizer, ids)
        return visible(self.tokenizer, [self._lead, *ids]).removeprefix(self._controls[self._lead])

    def _raw(self, ids: Sequence[int]) -> str:
        """The text of an answer, cut where it has the text of a control token, but not the token."""
        body = self._body(ids)
        text = plain(self._words(body))
        if sum(map(text.count, set(self._controls.values()))) == sum(token in self._controls for token in body):
            return text
        parts, words = list[str](), list[int]()
        for token in (*body, None):
            if token is None or token in self._controls:
                parts.append(self.template.cut(self._words(words)))
                parts.append("" if token is None else self._controls[token])
                words.clear()
            else:
                words.append(token)
        marked = "".join(parts)
        return marked if plain(marked) == text else text

    def _apart(self, raw: str) -> tuple[str | None, str]:
        """The reasoning of an answer, or None, and what follows it, without the line breaks that templates write between them."""
        if self.template.leaves_out:
            return "", raw
        for opening, closing in reasoning_tags(self.form):
            is_open = self.template.opens == (opening, closing)
            if not (is_open or raw.startswith(opening)):
                continue
            thought, closed, rest = raw.removeprefix(opening).partition(closing)
            if closed:
                return thought.removeprefix("\n").removesuffix("\n"), rest.removeprefix("\n\n")
        return None, raw

    # From text to tokens.

    def _ids(self, text: str, last: int | None = None) -> list[int]:
        """Token ids of marked text. ``last``: the token before it."""
        ids, lead = list[int](), last if last in self._controls else None
        for piece in filter(None, text.replace(KEEP, "").split(CUT)):
            # After a special token, as some tokenizers put white space before the first word.
            start = "" if lead is None else self._controls[lead]
            (found,) = encode([start + piece], self.tokenizer, add_special_tokens=False)
            ids += found if lead is None else found[1:]
            lead = self._lead
        return ids

    def _lead_token(self) -> int | None:
        """A special token that takes no white space beside it away."""
        added, bos = self.tokenizer.added_tokens_decoder, self.tokenizer.bos_token_id
        fits = (token for token in self._controls if token != bos and added[token].special)
        return next((token for token in fits if not (added[token].lstrip or added[token].rstrip)), None)

    def _place(self, before: Sequence[int], whole: Sequence[int]) -> int | None:
        """Where in the ``whole`` conversation its part ``before`` ends, at a control token; None if it is no part of it."""
        count = sum(token in self._controls for token in before)
        places = [place for place, token in enumerate(whole) if token in self._controls]
        ends = bool(before) and before[-1] in self._controls
        if count + (not ends) > len(places) or not before:
            return None
        place = places[count - 1] + 1 if ends else places[count]
        return place if self._shown(whole[:place]) == self._shown(before) else None

    def _shown(self, ids: Sequence[int]) -> str:
        """The text of tokens, as the tokenizer normalises it."""
        text, normalizer = visible(self.tokenizer, ids), self.tokenizer.backend_tokenizer.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))


def _at(text: str, length: int) -> int:
    """Where in marked text the first ``length`` characters end that are no marks."""
    place = length
    while (seen := place - text.count(CUT, 0, place) - text.count(KEEP, 0, place)) < length:
        place += length - seen
    return place


def _sources(raw: str, parsed: Parsed) -> list[object]:
    """The arguments of calls as they were written, control tokens and all; as objects where that is not known."""
    found, place, text = list[object](), 0, plain(raw)
    for call in parsed.calls:
        start = text.find(call.source, place) if call.source else -1
        place = max(place, start + len(call.source))
        found.append(call.arguments if start < 0 else raw[_at(raw, start) : _at(raw, place)])
    return found


def _kept(text: str) -> str:
    """Text whose outer white space a template does not see as such."""
    if not text.strip():
        return text
    left = KEEP if text[0].isspace() else ""
    return left + text + (KEEP if text[-1].isspace() else "")


def _has_calls(messages: Sequence[Message]) -> bool:
    """Whether the last message of the assistant has structured calls."""
    return bool(next((message for message in reversed(messages) if message["role"] == ASSISTANT), {}).get("tool_calls"))


def _repeats(own: Message, said: Message) -> bool:
    """Whether a client's message is a sampled one: by the ids of its calls, or by content and calls."""
    calls, made = own.get("tool_calls", ()), said.get("tool_calls", ())
    if calls and [call.get("id") for call in calls] == [call["id"] for call in made]:
        return True
    thoughts = reasoning_of(own)
    agrees = not thoughts or [thought.strip() for thought in thoughts] == reasoning_of(said)
    return agrees and own["content"].strip() == said["content"] and _meant(calls) == _meant(made)


def _meant(calls: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    named = (call_of(call) for call in calls)
    return [(call.name, json.dumps(call.arguments, sort_keys=True)) for call in named]
