"""OpenAI's chat and text completions: bodies to requests (``Ask``), answers to bodies and to events of a stream.

The Responses interface is in ``responses_wire``. What a request continues and who samples is in ``session``.

A field that changes nothing is ignored. One that would change what an answer means, and cannot be followed, is refused. Settings
of sampling are the run's own, since training must know the distribution: ``unheeded`` names those that a client wants otherwise.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from togi.data.faults import RowError, at
from togi.data.messages import ASSISTANT, SYSTEM, USER, Message, Tool, dialogue_of, read_tools
from togi.sample import Sampling

Json: TypeAlias = dict[str, object]
Body: TypeAlias = Mapping[str, object]

MOST_CHOICES = 128
MOST_STOPS = 16
# What the text interface generates if a request does not say.
TEXT_TOKENS = 16
# Streams are cut into pieces of so many characters: the answer is whole before the first one leaves.
PIECE = 256
TEXT_PARTS = ("text", "input_text", "output_text")
DONE = b"data: [DONE]\n\n"

# Fields that change what an answer is, the values that do not, and what to do instead.
_REFUSED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "response_format": (({"type": "text"},), "answers are not constrained; ask for the format in a message"),
    "logit_bias": (({},), "the distribution is the policy's own; leave it out"),
    "top_logprobs": ((0,), "only the sampled token's log-probability is known; use logprobs alone"),
    "functions": (([],), "it is the older form; use tools"),
    "function_call": (("none", "auto"), "it is the older form; use tool_choice"),
    "modalities": ((["text"],), "the policy writes text only"),
    "audio": ((), "the policy writes text only"),
    "prediction": ((), "leave it out"),
    "web_search_options": ((), "no search is built in; give a tool"),
    "echo": ((False,), "put prompt and answer together yourself"),
    "suffix": (("",), "the policy writes on from the end of a prompt only"),
    "best_of": ((1,), "use n, and choose yourself"),
    "background": ((False,), "wait for the answer"),
    "conversation": ((), "use previous_response_id, or send all items"),
}


class RequestError(Exception):
    """A request that is refused. The message is one sentence for the client."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status

    def body(self) -> Json:
        """The error in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class Ask:
    """A request: a conversation to answer (``messages``), or ``prompts`` (text or token ids) to continue.

    ``head``: messages of this request alone, before all others; one that names this request as ``previous`` does not inherit them.
    ``max_tokens`` None: as many as the episode allows. ``reads_calls``: whether calls of tools are looked for in an answer.
    """

    body: Body
    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    head: tuple[Message, ...] = ()
    previous: str | None = None
    n: int = 1
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    reads_calls: bool = True
    logprobs: bool = False

    @property
    def model(self) -> str:
        """The model that the client named."""
        return str(self.body.get("model") or "")


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer. ``text``: without special tokens and stop string. ``message``: the same as an assistant turn in OpenAI's form.

    ``pieces``: the text of each token, with special tokens. ``finish``: stop, length or tool_calls.
    """

    message: Message
    text: str
    finish: str
    pieces: tuple[str, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """The choices of all prompts, ``n`` for each in order. ``context``: how many tokens each prompt has."""

    context: tuple[int, ...]
    choices: tuple[Choice, ...]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def sampled(self) -> int:
        """How many tokens were sampled."""
        return sum(len(choice.pieces) for choice in self.choices)

    def usage(self) -> Json:
        """Tokens in and out."""
        read, written = sum(self.context), self.sampled
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


# ---- reading ----


def read_body(data: bytes) -> Body:
    """The object of a body without fields that would change the meaning of an answer. Raises RequestError."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise RequestError("The body is not JSON: send an object.") from None
    if not isinstance(body, dict):
        raise RequestError("The body is not an object: send an object.")
    for name, (harmless, advice) in _REFUSED.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise RequestError(f"{name!r} cannot be followed here: {advice}.", param=name, code="unsupported_parameter")
    return body


def read_chat(body: Body, template: str) -> Ask:
    """A request of the chat interface. ``template``: the text of the chat template. Raises RequestError."""
    most = whole(body, "max_completion_tokens", 1)
    return Ask(
        body,
        messages=conversation(body.get("messages"), template),
        tools=functions(body.get("tools")),
        n=whole(body, "n", 1, MOST_CHOICES) or 1,
        max_tokens=whole(body, "max_tokens", 1) if most is None else most,
        stops=_stops(body),
        reads_calls=may_call(body),
        logprobs=bool(body.get("logprobs")),
    )


def read_text(body: Body, template: str) -> Ask:
    """A request of the text interface. Raises RequestError."""
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    prompts = prompt if several and isinstance(prompt, list) else [prompt]
    if len(prompts) > MOST_CHOICES:
        raise RequestError(f"'prompt' holds {len(prompts)} prompts, more than {MOST_CHOICES}.", param="prompt")
    most = whole(body, "logprobs", 0)
    if most is not None and most > 1:
        raise RequestError("'logprobs' must be 0 or 1: alternatives are not known.", param="logprobs")
    return Ask(
        body,
        prompts=tuple(map(_prompt, prompts)),
        n=whole(body, "n", 1, MOST_CHOICES) or 1,
        max_tokens=whole(body, "max_tokens", 1) or TEXT_TOKENS,
        stops=_stops(body),
        logprobs=most is not None,
    )


def _prompt(value: object) -> str | tuple[int, ...]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(token) is int and token >= 0 for token in value):
        return tuple(value)
    raise RequestError(
        "'prompt' must be a text, token ids, or a list of either, and none may be empty.", param="prompt"
    )


def conversation(value: object, template: str) -> tuple[Message, ...]:
    """Messages in the form of chat templates: text as content, calls with arguments as objects. Raises RequestError."""
    if not isinstance(value, list) or not value:
        raise RequestError("'messages' must be a list with at least one message.", param="messages")
    read = []
    for number, message in enumerate(value):
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
            if kind not in TEXT_PARTS:
                raise RequestError(
                    f"Message {number} has a part of type {kind!r}: the policy reads text only.", param="messages"
                )
        # Few templates know the newer name of the system's turn.
        renamed = isinstance(message, Mapping) and message.get("role") == "developer"
        read.append({**message, "role": SYSTEM} if renamed else message)
    try:
        return dialogue_of(read, USER, template).messages
    except RowError as error:
        raise RequestError(at("The request", error), param="messages") from None


def functions(value: object) -> tuple[Tool, ...]:
    """The tools, without ``strict``, which nothing here enforces. Raises RequestError."""
    for tool in value if isinstance(value, list) else ():
        kind = tool.get("type", "function") if isinstance(tool, Mapping) else "function"
        if kind != "function":
            raise RequestError(f"A tool of type {kind!r} is not built in: give it as a function.", param="tools")
    try:
        tools = read_tools(value, set())
    except RowError as error:
        raise RequestError(at("The field 'tools'", error), param="tools") from None
    result = []
    for tool in tools:
        function = tool["function"]
        assert isinstance(function, Mapping), "read_tools gives functions"
        result.append({**tool, "function": {name: item for name, item in function.items() if name != "strict"}})
    return tuple(result)


def may_call(body: Body) -> bool:
    """Whether ``tool_choice`` lets the model call tools. Raises RequestError if it says that it must."""
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise RequestError(
            "'tool_choice' can be 'auto' or 'none': a call cannot be forced, since answers are not constrained.",
            param="tool_choice",
            code="unsupported_parameter",
        )
    return choice != "none"


def whole(body: Body, name: str, least: int, most: int | None = None) -> int | None:
    """A whole number of the body; None if it is not given. Raises RequestError."""
    value = body.get(name)
    if value is None or (name == "logprobs" and value is False):
        return None
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise RequestError(f"{name!r} must be a whole number, {bounds}.", param=name)
    return value


def _stops(body: Body) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [value] if isinstance(value, str) else value or []
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(stop, str) and stop for stop in stops)
    ):
        raise RequestError(
            f"'stop' must be a text or a list of up to {MOST_STOPS} texts that are not empty.", param="stop"
        )
    return tuple(stops)


def unheeded(body: Body, sampling: Sampling) -> list[str]:
    """The fields that ask for another sampling than the run's, which is used in spite of them."""
    own: Mapping[str, tuple[object, ...]] = {
        "temperature": (sampling.temperature,),
        "top_p": (sampling.top_p,),
        "top_k": (0, -1),
        "min_p": (0,),
        "repetition_penalty": (sampling.repetition_penalty,),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "seed": (),
        "parallel_tool_calls": (True,),
    }
    return [name for name, values in own.items() if body.get(name) is not None and body[name] not in values]


# ---- answering ----


def chat_reply(ask: Ask, answer: Answer) -> Json:
    """The body of an answer of the chat interface."""
    choices = [
        {
            "index": index,
            "message": {"refusal": None, **choice.message},
            "finish_reason": choice.finish,
            "logprobs": _chat_logprobs(ask, choice),
        }
        for index, choice in enumerate(answer.choices)
    ]
    return {**_chat_head(ask, answer, "chat.completion"), "choices": choices, "usage": answer.usage()}


def chat_events(ask: Ask, answer: Answer) -> Iterator[bytes]:
    """The stream of an answer of the chat interface."""
    head = _chat_head(ask, answer, "chat.completion.chunk")
    for index, choice in enumerate(answer.choices):
        logprobs = _chat_logprobs(ask, choice)
        for delta in _deltas(choice.message):
            yield event(
                {**head, "choices": [{"index": index, "delta": delta, "finish_reason": None, "logprobs": logprobs}]}
            )
            logprobs = None
        yield event(
            {**head, "choices": [{"index": index, "delta": {}, "finish_reason": choice.finish, "logprobs": None}]}
        )
    yield from _end(ask, answer, head)


def _deltas(message: Message) -> Iterator[Json]:
    """A message as its parts in order."""
    yield {"role": ASSISTANT, "content": ""}
    for name in ("reasoning_content", "content"):
        for piece in pieces(message.get(name) or ""):
            yield {name: piece}
    for index, call in enumerate(message.get("tool_calls", ())):
        function = call["function"]
        opened = {"index": index, "id": call["id"], "type": "function"}
        yield {"tool_calls": [{**opened, "function": {"name": function["name"], "arguments": ""}}]}
        for piece in pieces(function["arguments"]):
            yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}


def text_reply(ask: Ask, answer: Answer) -> Json:
    """The body of an answer of the text interface."""
    choices = [
        {
            "index": index,
            "text": choice.text,
            "finish_reason": choice.finish,
            "logprobs": _text_logprobs(choice) if ask.logprobs else None,
        }
        for index, choice in enumerate(answer.choices)
    ]
    return {**_text_head(ask, answer), "choices": choices, "usage": answer.usage()}


def text_events(ask: Ask, answer: Answer) -> Iterator[bytes]:
    """The stream of an answer of the text interface."""
    head = _text_head(ask, answer)
    for index, choice in enumerate(answer.choices):
        logprobs = _text_logprobs(choice) if ask.logprobs else None
        for piece in pieces(choice.text):
            yield event({**head, "choices": [{"index": index, "text": piece, "finish_reason": None, "logprobs": None}]})
        yield event(
            {**head, "choices": [{"index": index, "text": "", "finish_reason": choice.finish, "logprobs": logprobs}]}
        )
    yield from _end(ask, answer, head)


def _end(ask: Ask, answer: Answer, head: Json) -> Iterator[bytes]:
    options = ask.body.get("stream_options")
    if isinstance(options, Mapping) and options.get("include_usage"):
        yield event({**head, "choices": [], "usage": answer.usage()})
    yield DONE


def event(data: Json, name: str = "") -> bytes:
    """One server-sent event."""
    return (f"event: {name}\n" if name else "").encode() + f"data: {json.dumps(data)}\n\n".encode()


def pieces(text: str) -> Sequence[str]:
    """A text in parts; none for an empty one."""
    return [text[start : start + PIECE] for start in range(0, len(text), PIECE)]


def _chat_head(ask: Ask, answer: Answer, kind: str) -> Json:
    return {"id": f"chatcmpl-{answer.id}", "object": kind, "created": answer.created, "model": ask.model}


def _text_head(ask: Ask, answer: Answer) -> Json:
    return {"id": f"cmpl-{answer.id}", "object": "text_completion", "created": answer.created, "model": ask.model}


def _chat_logprobs(ask: Ask, choice: Choice) -> Json | None:
    if not ask.logprobs:
        return None
    content = [
        # A token that is a part of a character has no text of its own.
        {
            "token": piece,
            "logprob": value,
            "bytes": None if "\ufffd" in piece else list(piece.encode()),
            "top_logprobs": [],
        }
        for piece, value in zip(choice.pieces, choice.logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(choice: Choice) -> Json:
    return {"tokens": choice.pieces, "token_logprobs": choice.logprobs, "top_logprobs": None, "text_offset": None}
