"""One episode of an agent behind the proxy: what each request continues, what it may still sample, and what is recorded.

A request is sampled once, however often it is sent again. Its tokens enter the trace in one piece when all of them are there, also
if the client has left by then. Nothing here knows HTTP.

An answer stands for its tokens: a request whose messages begin with an answer that was given continues these tokens, and text is
tokenised only if nobody sampled it. Stop strings are looked for in decoded text. The answer ends with the token that completes
one: this token is recorded, as the policy chose to stop there, and the client gets the text before the stop string.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from togi.data.chat import Tokenizer, decode, encode, visible
from togi.data.faults import RowError, at
from togi.data.messages import ASSISTANT, Message, Tool
from togi.env.openai_wire import Answer, Ask, Choice, Json, RequestError
from togi.env.trace import Trace
from togi.errors import DataError
from togi.rollout.collect import Generate, all_or_none
from togi.sample import FinishReason, Generation, Prompt, Rollout, Sampling, Score

# The parts of a message in which a stop string may end.
_WRITTEN = ("reasoning_content", "content")


class Rendering(Protocol):
    """Conversations to token ids, and sampled ids to the message that they are."""

    def first(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[int, ...]:
        """The whole conversation, opened for an answer. Raises RowError."""

    def after(self, before: Sequence[int], messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[int, ...]:
        """The same, beginning with the tokens ``before`` if the conversation continues them. Raises RowError."""

    def said(self, ids: Sequence[int], tools: Sequence[Tool]) -> Message:
        """Sampled ids as an assistant message in OpenAI's form. It may have more fields, for ``after``."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of an episode: ``tokens`` to be sampled, ``requests`` to be answered, and the ``context`` of one with its answer."""

    tokens: int
    requests: int
    context: int

    def __post_init__(self) -> None:
        assert self.tokens >= 1 and self.requests >= 1 and self.context >= 2


@dataclass(frozen=True, slots=True)
class Call:
    """How a request came. ``digest``: of path and body. ``key``: its Idempotency-Key. ``again``: the client calls it a retry."""

    digest: bytes
    key: str | None = None
    again: bool = False


@dataclass(slots=True, eq=False)
class Pending:
    """A request that is answered or being answered. ``listeners``: whether those who wait for it are still there."""

    call: Call
    task: asyncio.Task[Answer]
    is_delivered: bool = False
    listeners: list[Callable[[], bool]] = field(default_factory=list)

    @property
    def has_failed(self) -> bool:
        """Whether it will never have an answer."""
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)

    @property
    def is_lost(self) -> bool:
        """Whether nobody has its answer, or waits for it."""
        return not self.is_delivered and not any(listens() for listens in self.listeners)


@dataclass(slots=True, eq=False)
class _Row:
    """Tokens in a row, shared by all points in it."""

    ids: NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class _Point:
    """A place that a request may continue: the first ``length`` tokens of a row. ``entry``: of the transcript.

    ``messages``: the conversation up to here, answers as ``Rendering.said`` gave them. ``text``: of a text prompt up to here.
    """

    row: _Row
    length: int
    entry: int
    messages: tuple[Message, ...] = ()
    text: str = ""

    @property
    def ids(self) -> list[int]:
        """The tokens up to here."""
        ids: list[int] = self.row.ids[: self.length].tolist()
        return ids

    def row_of(self, ids: NDArray[np.int32]) -> _Row:
        """The row of longer tokens: this one, if they continue all of it."""
        length = len(self.row.ids)
        return self.row if np.array_equal(ids[:length], self.row.ids) else _Row(ids)


@dataclass(frozen=True, slots=True)
class _Context:
    """The tokens of a request, the point that it continues, and what is new in it. The others are as in ``_Point``."""

    ids: list[int]
    point: _Point | None
    new: Json
    text: str = ""
    messages: tuple[Message, ...] = ()
    key: bytes = b""


class Session:
    """One episode. ``key``: the secret that its requests name. Used in one event loop."""

    def __init__(
        self,
        key: str,
        prompt: Prompt,
        generate: Generate,
        sampling: Sampling,
        limits: Limits,
        rendering: Rendering,
        tokenizer: Tokenizer,
    ) -> None:
        self.key, self.sampling, self.limits = key, sampling, limits
        self.requests, self.retries, self.redrawn = 0, 0, 0
        """Requests that were sampled; retries that got the answer of an earlier one; requests that continue the messages of an
        answer, but whose rendering does not continue its tokens."""
        self.transcript = list[Json]()
        """What was new in each request, the entry that it continues, and its answers. JSON values only."""
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when generation failed, with its error. No answer of the agent is its own from then on."""
        self.refused = ""
        """Why a request was refused for the limits of the episode; "" if none was."""
        self._generate, self._rendering, self._tokenizer = generate, rendering, tokenizer
        self._trace = Trace(prompt)
        self._finish, self._written = FinishReason.STOP, list[str]()
        self._by_digest, self._by_key = dict[bytes, list[Pending]](), dict[str, Pending]()
        self._messages, self._texts = dict[bytes, _Point](), list[_Point]()
        self._conversations = dict[str, tuple[Message, ...]]()

    @property
    def forks(self) -> int:
        """Requests that did not begin with all tokens of any row before them, further samples of one prompt included."""
        return self._trace.forks

    @property
    def left(self) -> int:
        """How many tokens may still be sampled."""
        return self.limits.tokens - self._trace.sampled

    def begin(self, call: Call, ask: Ask) -> Pending:
        """Start to answer a request, or find it if it is a retry. Raises RequestError."""
        found = self._earlier(call)
        if found is not None:
            self.retries += 1
            return found
        self._check_limits(ask)
        messages = (*ask.head, *self._before(ask), *ask.messages)
        try:
            contexts = [self._text(prompt) for prompt in ask.prompts] or [self._chat(messages, ask.tools)]
        except RowError as error:
            raise RequestError(at("The request", error)) from None
        except DataError as error:
            raise RequestError(str(error)) from None
        longest = max(len(context.ids) for context in contexts)
        if longest >= self.limits.context:
            raise self._over(f"The request has {longest} tokens, and {self.limits.context} fit with the answer.")
        self.requests += 1
        pending = Pending(call, asyncio.create_task(self._answer(ask, messages, contexts)))
        pending.task.add_done_callback(self._note_failure)
        self._by_digest.setdefault(call.digest, []).append(pending)
        if call.key is not None:
            self._by_key[call.key] = pending
        return pending

    async def close(self) -> None:
        """End all that is being sampled. Nothing of it is recorded."""
        tasks = [pending.task for each in self._by_digest.values() for pending in each]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.failed.cancel()

    def rollout(self, group_id: str, score: Score | None = None) -> Rollout:
        """The episode so far. Its messages are those of all requests, each once, in the order in which they were answered."""
        finish = FinishReason.LENGTH if self.refused else self._finish
        rollout = self._trace.rollout(group_id, "\n".join(self._written), finish, score)
        counts = {"requests": self.requests, "retries": self.retries, "forks": self.forks, "redrawn": self.redrawn}
        return replace(rollout, messages=tuple(self._shown()), counts=counts)

    def _shown(self) -> Iterator[Message]:
        for entry in self.transcript:
            for part in ("messages", "answers"):
                messages = entry[part]
                assert isinstance(messages, list), "entries are made here"
                yield from messages

    # ---- what came before ----

    def _earlier(self, call: Call) -> Pending | None:
        """The request that this one repeats."""
        named = None if call.key is None else self._by_key.get(call.key)
        if named is not None and named.call.digest != call.digest:
            message = "The Idempotency-Key was used for another request: give each request its own."
            raise RequestError(message, code="idempotency_error")
        if named is not None and not named.has_failed:
            return named
        same = [each for each in self._by_digest.get(call.digest, ()) if not each.has_failed] if call.again else []
        # Several clients may ask the same at once: first the answers that nobody got.
        return next((each for each in same if each.is_lost), same[-1] if same else None)

    def _before(self, ask: Ask) -> tuple[Message, ...]:
        if ask.previous is None:
            return ()
        if ask.previous not in self._conversations:
            message = f"There is no response {ask.previous!r} in this session."
            raise RequestError(message, param="previous_response_id", code="previous_response_not_found")
        return self._conversations[ask.previous]

    def _chat(self, messages: Sequence[Message], tools: Sequence[Tool]) -> _Context:
        # The key of a conversation is that of its start and of the message after it.
        keys = [_digest(b"", [dict(tool) for tool in tools])]
        for message in messages:
            keys.append(_digest(keys[-1], _essence(message)))
        place = next((place for place in range(len(keys) - 1, 0, -1) if keys[place] in self._messages), 0)
        point = self._messages.get(keys[place]) if place else None
        if point is None:
            own, ids = tuple(messages), self._rendering.first(messages, tools)
        else:
            # What the client sends back of an answer, such as a call with its arguments in another order, stands for the answer.
            own = (*point.messages, *messages[place:])
            ids = self._rendering.after(point.ids, own, tools)
        new: Json = {"messages": [dict(message) for message in messages[place:]]}
        return _Context([*map(int, ids)], point, new, messages=own, key=keys[-1])

    def _text(self, prompt: str | tuple[int, ...]) -> _Context:
        if not isinstance(prompt, str):
            if max(prompt) >= len(self._tokenizer):
                raise RequestError(f"The tokenizer has no token {max(prompt)}.", param="prompt")
            text = visible(self._tokenizer, prompt)
            return _Context(list(prompt), None, _as_prompt(text), text)
        begun = [point for point in self._texts if prompt.startswith(point.text)]
        point = max(begun, key=lambda each: len(each.text), default=None)
        rest = prompt if point is None else prompt[len(point.text) :]
        (ids,) = encode([rest], self._tokenizer, add_special_tokens=point is None)
        return _Context([*([] if point is None else point.ids), *ids], point, _as_prompt(rest), prompt)

    # ---- limits ----

    def _check_limits(self, ask: Ask) -> None:
        if self.requests >= self.limits.requests:
            raise self._over(f"The episode has had its {self.limits.requests} requests.")
        # Tokens of running requests are not known yet: `_answer` cuts what is too much.
        if self.left < ask.n * max(1, len(ask.prompts)):
            raise self._over(f"The episode may sample {self.limits.tokens} tokens, and {self.left} of them are left.")

    def _over(self, message: str) -> RequestError:
        self.refused = message
        return RequestError(message, code="context_length_exceeded")

    # ---- answering ----

    async def _answer(self, ask: Ask, messages: Sequence[Message], contexts: Sequence[_Context]) -> Answer:
        work = [(context, self._sampling(ask, len(context.ids))) for context in contexts for _ in range(ask.n)]
        generations = await all_or_none(self._generate(context.ids, sampling) for context, sampling in work)
        # From here to the end nothing waits, so that a request is in the trace wholly or not at all.
        entries, choices = dict[int, Json](), list[Choice]()
        for (context, _), whole in zip(work, generations, strict=True):
            generation, stop = self._cut(whole, ask.stops)
            choice = self._choice(ask, generation, stop)
            choices.append(choice)
            number = self._record(context, generation, choice, entries)
            ids = np.asarray([*context.ids, *generation.tokens], dtype=np.int32)
            row = _Row(ids) if context.point is None else context.point.row_of(ids)
            row.ids = ids
            if ask.prompts:
                self._keep_texts(context, generation, choice, row, number)
            else:
                said = self._rendering.said(generation.tokens, ask.tools)
                point = _Point(row, len(ids), number, (*context.messages, said))
                self._messages[_digest(context.key, _essence(choice.message))] = point
        answer = Answer(tuple(len(context.ids) for context in contexts), tuple(choices))
        if not ask.prompts:
            self._conversations[f"resp_{answer.id}"] = (*messages[len(ask.head) :], choices[0].message)
        return answer

    def _sampling(self, ask: Ask, context: int) -> Sampling:
        most = min(self.sampling.max_tokens, self.left, self.limits.context - context)
        most = most if ask.max_tokens is None else min(most, ask.max_tokens)
        most = max(most, 1)  # what was left may be gone since the request was admitted
        return replace(self.sampling, max_tokens=most, min_tokens=min(self.sampling.min_tokens, most))

    def _cut(self, generation: Generation, stops: Sequence[str]) -> tuple[Generation, str]:
        """What is left up to the token that completes a stop string, and within the budget; and the stop string, "" if none."""
        tokens, most = generation.tokens, max(self.left, 0)

        def found(length: int) -> list[str]:
            text = decode(self._tokenizer, tokens[:length])
            # The earliest counts.
            return sorted((stop for stop in stops if stop in text), key=text.index)

        stop = ""
        if stops and found(len(tokens)):
            low, high = 1, len(tokens)
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if found(middle) else (middle + 1, high)
            stop = found(low)[0]
            generation = _first(generation, low, FinishReason.STOP)
        if len(generation.tokens) > most:
            return _first(generation, most, FinishReason.LENGTH), ""
        return generation, stop

    def _choice(self, ask: Ask, generation: Generation, stop: str) -> Choice:
        text = decode(self._tokenizer, generation.tokens)
        message: Json = {"role": ASSISTANT, "content": text}
        if not ask.prompts and ask.reads_calls:
            said = self._rendering.said(generation.tokens, ask.tools)
            calls = [_call(call) for call in said.get("tool_calls") or ()]
            message["content"] = said.get("content") or (None if calls else "")
            message |= {"tool_calls": calls} if calls else {}
            message |= {"reasoning_content": said["reasoning_content"]} if said.get("reasoning_content") else {}
        if stop:
            text = text[: text.index(stop)]
            message |= {name: _until(message[name], stop) for name in _WRITTEN if name in message}
        # An aborted answer has no end of its own.
        finish = "stop" if generation.finish_reason is FinishReason.STOP else "length"
        finish = "tool_calls" if finish == "stop" and "tool_calls" in message else finish
        shown = tuple(visible(self._tokenizer, [token]) for token in generation.tokens)
        return Choice(message, text, finish, shown, generation.logprobs)

    def _record(self, context: _Context, generation: Generation, choice: Choice, entries: dict[int, Json]) -> int:
        """Add a choice to trace and transcript. Returns the number of the entry."""
        if generation.tokens:
            self._trace.add(context.ids, generation)
            self._finish = generation.finish_reason
        self._written.append(choice.text)
        point, entry = context.point, entries.get(id(context))
        if entry is None:
            redrawn = point is not None and context.ids[: point.length] != point.ids
            self.redrawn += redrawn
            continues = None if point is None else point.entry
            entry = {
                "continues": continues,
                "redrawn": redrawn,
                **context.new,
                "prompt_tokens": len(context.ids),
                "answers": [],
            }
            entry["number"] = len(self.transcript)
            entries[id(context)] = entry
            self.transcript.append(entry)
        answers, number = entry["answers"], entry["number"]
        assert isinstance(answers, list) and isinstance(number, int)
        answers.append({**choice.message, "finish_reason": choice.finish, "tokens": len(generation.tokens)})
        return number

    def _keep_texts(self, context: _Context, generation: Generation, choice: Choice, row: _Row, entry: int) -> None:
        """Where a later prompt may go on: after all tokens, and after those that the client has seen as text."""
        tokens = generation.tokens
        low, high = 0, len(tokens)
        while low < high:
            middle = (low + high + 1) // 2
            seen = choice.text.startswith(visible(self._tokenizer, tokens[:middle]))
            low, high = (middle, high) if seen else (low, middle - 1)
        for length in {low, len(tokens)}:
            text = context.text + visible(self._tokenizer, tokens[:length])
            self._texts.append(_Point(row, len(context.ids) + length, entry, text=text))

    def _note_failure(self, task: asyncio.Task[Answer]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.failed.done():
            self.failed.set_exception(error)
            self.failed.exception()  # it may be read nowhere else


def _first(generation: Generation, length: int, reason: FinishReason) -> Generation:
    cut = slice(length)
    return Generation(generation.tokens[cut], generation.logprobs[cut], reason, generation.versions[cut])


def _as_prompt(text: str) -> Json:
    return {"messages": [{"role": "prompt", "content": text}]}


def _call(call: Mapping[str, object]) -> Json:
    """A call of a tool as it is sent: with its arguments as JSON text."""
    function = call["function"]
    assert isinstance(function, Mapping), "a call names a function"
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    return {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": text}}


def _until(text: object, stop: str) -> object:
    return text.partition(stop)[0] if isinstance(text, str) else text


def _essence(message: Message) -> object:
    """What makes two messages the same. Reasoning is left out, as few clients send it back, and so are the names of calls."""
    calls = []
    for call in message.get("tool_calls") or ():
        arguments = call["function"].get("arguments")
        calls.append([call["function"]["name"], json.loads(arguments) if isinstance(arguments, str) else arguments])
    return [message["role"], message.get("content") or "", calls]


def _digest(start: bytes, value: object) -> bytes:
    return hashlib.blake2b(start + json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()
