"""An HTTP server that agents take for OpenAI's, one for a run: the policy answers, and every token is recorded.

Each episode is a session with a key of its own, which its requests send as bearer token. Answers come from ``session``, their
forms from ``openai_wire`` and ``responses_wire``. Keys and texts are never logged.

Streams begin at once, but their text follows when the whole answer is there, since engines answer whole. Until then comments keep
the connection open.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import NamedTuple, Self

from aiohttp import web

from togi.data.chat import Tokenizer, template_text
from togi.env.openai_wire import (
    DONE,
    Answer,
    Ask,
    Body,
    Json,
    RequestError,
    chat_events,
    chat_reply,
    event,
    read_body,
    read_chat,
    read_text,
    text_events,
    text_reply,
    unheeded,
)
from togi.env.responses_wire import read_responses, responses_events, responses_reply
from togi.env.session import Call, Limits, Pending, Rendering, Session
from togi.rollout.collect import Generate
from togi.sample import Prompt, Sampling

LOOPBACK = "127.0.0.1"
BODY_BYTES = 64 << 20
SHUTDOWN_SECONDS = 2.0
KEEPALIVE_SECONDS = 75.0
COMMENT_SECONDS = 10.0
# Keys of so many ended sessions are told from unknown ones.
ENDED = 10_000
# The status that counts a client that closed the connection before its answer, as nginx does.
GONE = 499

logger = logging.getLogger(__name__)


class Wire(NamedTuple):
    """An interface: how requests are read, with the text of the chat template, and how answers are written."""

    read: Callable[[Body, str], Ask]
    reply: Callable[[Ask, Answer], Json]
    events: Callable[[Ask, Answer], Iterator[bytes]]


WIRES = {
    "/v1/chat/completions": Wire(read_chat, chat_reply, chat_events),
    "/v1/completions": Wire(read_text, text_reply, text_events),
    "/v1/responses": Wire(read_responses, responses_reply, responses_events),
}


class Proxy:
    """The server. Use it as an asynchronous context manager. ``model``: the name under /v1/models; requests may name any.

    It listens on the loopback unless ``host`` says otherwise. ``port`` 0: any that is free.
    """

    def __init__(
        self, rendering: Rendering, tokenizer: Tokenizer, *, model: str = "policy", host: str = LOOPBACK, port: int = 0
    ) -> None:
        self._rendering, self._tokenizer, self._template = rendering, tokenizer, template_text(tokenizer)
        self._model, self._host, self._port = model, host, port
        self._sessions, self._ended = dict[str, Session](), dict[str, None]()
        self._warned = set[str]()
        app = web.Application(client_max_size=BODY_BYTES, middlewares=[self._guard])
        for path in WIRES:
            app.router.add_post(path, self._answer)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._models)
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS, keepalive_timeout=KEEPALIVE_SECONDS
        )

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    @property
    def base_url(self) -> str:
        """What an agent is given."""
        return f"http://{self._host}:{self._port}/v1"

    @asynccontextmanager
    async def session(
        self, prompt: Prompt, generate: Generate, sampling: Sampling, limits: Limits
    ) -> AsyncIterator[Session]:
        """One episode. Its key is good until the end of the block; what is still sampled then is cancelled."""
        key = f"sk-{secrets.token_urlsafe(32)}"
        session = Session(key, prompt, generate, sampling, limits, self._rendering, self._tokenizer)
        self._sessions[key] = session
        try:
            yield session
        finally:
            del self._sessions[key]
            self._ended[key] = None
            if len(self._ended) > ENDED:
                del self._ended[next(iter(self._ended))]
            await session.close()

    # ---- requests ----

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Errors in OpenAI's form."""
        try:
            return await handler(request)
        except RequestError as error:
            return _refusal(error)
        except web.RequestPayloadError:
            return _refusal(RequestError("The body cannot be unpacked: send it in the encoding that its header names."))
        except ConnectionError:  # nobody is left to hear an answer
            return _refusal(RequestError("The client went away.", status=GONE))
        except web.HTTPException as error:  # aiohttp's own: no such path, body too large, and so on
            return _refusal(RequestError(error.reason, status=error.status))
        # A bug must not end the server. Its message may quote the request, so only its places in the code are logged.
        except Exception as error:  # noqa: BLE001
            places = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a request failed with %s:\n%s", type(error).__name__, places)
            return _refusal(RequestError(f"The server failed ({type(error).__name__}).", status=500))

    def _session_of(self, request: web.Request) -> Session:
        """The session whose key the request names. Raises RequestError."""
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        key = key.strip()
        if scheme.lower() == "bearer" and key in self._sessions:
            return self._sessions[key]
        if key in self._ended:
            raise RequestError("The episode of this key has ended.", code="session_closed", status=410)
        raise RequestError(
            "The key belongs to no episode: use the one that the agent was given.", code="invalid_api_key", status=401
        )

    async def _models(self, request: web.Request) -> web.Response:
        self._session_of(request)
        model = {"id": self._model, "object": "model", "created": int(time.time()), "owned_by": "togi"}
        named = "name" in request.match_info
        return web.json_response(model if named else {"object": "list", "data": [model]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        session, wire = self._session_of(request), WIRES[request.path]
        data = await request.read()
        body = read_body(data)
        ask = wire.read(body, self._template)
        self._warn(body, session.sampling)
        digest = hashlib.blake2b(request.path.encode() + b"\n" + data, digest_size=16).digest()
        again = request.headers.get("x-stainless-retry-count", "0").strip() not in ("", "0")
        pending = session.begin(Call(digest, request.headers.get("Idempotency-Key"), again), ask)

        def listens() -> bool:
            return request.transport is not None and not request.transport.is_closing()

        pending.listeners.append(listens)
        try:
            if body.get("stream"):
                response = await self._stream(request, pending, ask, wire)
            else:
                await asyncio.wait([pending.task])
                response = web.json_response(wire.reply(ask, _result(pending)))
                await response.prepare(request)
                await response.write_eof()
            # A client that left before these lines has not read it.
            pending.is_delivered = pending.is_delivered or listens()
        finally:
            pending.listeners.remove(listens)
        return response

    async def _stream(self, request: web.Request, pending: Pending, ask: Ask, wire: Wire) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        while not (await asyncio.wait([pending.task], timeout=COMMENT_SECONDS))[0]:
            await response.write(b": generating\n\n")
        try:
            for each in wire.events(ask, _result(pending)):
                await response.write(each)
        except RequestError as error:  # the status has been sent
            await response.write(event(error.body(), "error") + DONE)
        await response.write_eof()
        return response

    def _warn(self, body: Body, sampling: Sampling) -> None:
        new = [name for name in unheeded(body, sampling) if name not in self._warned]
        if new:
            self._warned |= set(new)
            names = ", ".join(new)
            logger.warning("the agent asks for its own %s: the run's sampling is used, as training must know it", names)


def _result(pending: Pending) -> Answer:
    """The answer. Raises RequestError if there is none."""
    if pending.task.cancelled():
        raise RequestError("The episode of this key has ended.", code="session_closed", status=410)
    error = pending.task.exception()
    if error is not None:
        raise RequestError(f"Generation failed ({type(error).__name__}).", status=500)
    return pending.task.result()


def _refusal(error: RequestError) -> web.Response:
    # The official clients would repeat some of these, and none of them gets better.
    return web.json_response(error.body(), status=error.status, headers={"x-should-retry": "false"})
