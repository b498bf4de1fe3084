"""The HTTP side of a reward server: the established protocol, limits, authentication, metrics. Scoring is elsewhere.

POST /get_reward takes {"query": [...], "prompts": [...], "labels": [...]}, the last two optional, and answers {"rewards": [...]},
with "scores" and "extra_logs" if the source has them; null abstains. GET /health needs no token; GET /metrics (Prometheus text)
does. Errors are {"error": sentence}. The text of a request is never logged.
"""

import asyncio
import hmac
import json
import logging
import time
import traceback
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from aiohttp import web

from togi.reward.wire import Answer, Call, Complaint

# Batches queries of many requests into one forward pass: all waiting ones when the model is free, up to a token budget.

Tokens = Sequence[int]


@dataclass(frozen=True, slots=True)
class _Waiting:
    tokens: Tokens
    score: asyncio.Future[float]


class Batcher:
    """Batches calls of ``forward``, which maps token sequences to one number each. It runs on its own thread, one call at a time.

    A call gets the oldest sequences, as many as ``max_tokens`` and ``max_sequences`` (None: any number) allow, and at least one.
    """

    def __init__(
        self, forward: Callable[[Sequence[Tokens]], Sequence[float]], max_tokens: int, max_sequences: int | None
    ) -> None:
        self._forward = forward
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences
        self._queue: deque[_Waiting] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="togi-forward")
        self._worker: asyncio.Task[None] | None = None

    async def score(self, sequences: Sequence[Tokens]) -> list[float]:
        """One number per sequence. Raises what ``forward`` raised on a batch with one of them."""
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(tokens, loop.create_future()) for tokens in sequences]
        self._queue.extend(waiting)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._drain())
        return list(await asyncio.gather(*(each.score for each in waiting)))

    def close(self) -> None:
        """End the thread. No call may be in flight."""
        self._thread.shutdown()

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            taken = self._take()
            call = loop.run_in_executor(self._thread, self._forward, [each.tokens for each in taken])
            try:
                scores = await call
            except Exception as error:  # noqa: BLE001  any error is raised in the callers
                for each in taken:
                    if not each.score.done():  # the caller may be gone
                        each.score.set_exception(error)
                continue
            for each, score in zip(taken, scores, strict=True):
                if not each.score.done():
                    each.score.set_result(score)

    def _take(self) -> list[_Waiting]:
        """The sequences of the next call, oldest first."""
        most = len(self._queue) if self._max_sequences is None else self._max_sequences
        taken: list[_Waiting] = []
        tokens = 0
        while self._queue and len(taken) < most:
            tokens += len(self._queue[0].tokens)
            if taken and tokens > self._max_tokens:
                break
            taken.append(self._queue.popleft())
        return taken


SHUTDOWN_SECONDS = 30.0
KEEPALIVE_SECONDS = 75.0
PATH = "/get_reward"
PREFIX = "togi_reward"
# The HTTP statuses for a complaint of the scoring source: permanent or transient.
REFUSED, BROKEN = 422, 500
# The status that counts a client that closed the connection before its answer, as nginx does.
GONE = 499
NEEDS_TOKEN = ("a bearer token is needed", {"WWW-Authenticate": "Bearer"})

_KINDS: Mapping[type, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
}

logger = logging.getLogger(__name__)
ScoreCall = Callable[[Call], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """``body_bytes`` and ``items`` per request; ``queue``: items that may wait at once. ``token`` "": no authentication."""

    body_bytes: int
    items: int
    queue: int
    token: str = ""


class BadRequestError(Exception):
    """A request that violates the protocol. The message is sent to the client."""


@dataclass(slots=True)
class Counts:
    """The counters of /metrics."""

    requests: Counter[int] = field(default_factory=Counter)
    items: int = 0
    seconds: float = 0.0
    waiting: int = 0

    def text(self) -> str:
        """The counters in Prometheus' text format."""
        lines = [f"# TYPE {PREFIX}_requests_total counter"]
        lines += [f'{PREFIX}_requests_total{{status="{status}"}} {n}' for status, n in sorted(self.requests.items())]
        for name, kind, value in (
            ("items_total", "counter", self.items),
            ("request_seconds_total", "counter", f"{self.seconds:.6f}"),
            ("waiting_items", "gauge", self.waiting),
        ):
            lines += [f"# TYPE {PREFIX}_{name} {kind}", f"{PREFIX}_{name} {value}"]
        return "\n".join(lines) + "\n"


class RewardServer:
    """Answers requests with the scores of ``score``. Start and ``close`` it in the same event loop."""

    def __init__(self, score: ScoreCall, limits: ServerLimits) -> None:
        self.counts = Counts()
        self._score = score
        self._limits = limits
        app = web.Application(client_max_size=limits.body_bytes, middlewares=[self._guard])
        app.router.add_post(PATH, self._get_reward)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS, keepalive_timeout=KEEPALIVE_SECONDS
        )

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port. Raises OSError."""
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        taken: int = self._runner.addresses[0][1]
        return taken

    async def close(self) -> None:
        """Accept no more requests, answer pending ones, and end."""
        await self._runner.cleanup()

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Authenticate, convert errors to JSON, and count."""
        start = time.monotonic()
        response: web.StreamResponse
        try:
            response = await handler(request) if self._may(request) else _error(401, *NEEDS_TOKEN)
        except BadRequestError as error:
            response = _error(400, str(error))
        except web.RequestPayloadError:
            response = _error(400, "the body cannot be unpacked; send it whole, in the encoding that its header names")
        except ConnectionError:  # nobody is left to hear an answer
            response = _error(GONE, "the client went away")
        except web.HTTPException as error:  # aiohttp's own: no such path, body too large, and so on
            response = _error(error.status, error.reason)
        # A bug must not end the server. Its message may quote the request, so only its places in the code are logged.
        except Exception as error:  # noqa: BLE001
            places = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a request failed with %s:\n%s", type(error).__name__, places)
            response = _error(BROKEN, f"the server failed ({type(error).__name__})")
        if request.path == PATH:
            self.counts.requests[response.status] += 1
            self.counts.seconds += time.monotonic() - start
        return response

    def _may(self, request: web.Request) -> bool:
        if not self._limits.token or request.path == "/health":
            return True
        # RFC 6750: the name of the scheme, in any case, and the token. Bytes that are no UTF-8 arrive as lone surrogates.
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._limits.token.encode())
        return same and scheme.lower() == "bearer"

    async def _get_reward(self, request: web.Request) -> web.Response:
        call = read_call(await request.read(), self._limits.items)
        count = len(call["queries"])
        # Refuse early when too much is waiting: the client then backs off.
        if self.counts.waiting + count > self._limits.queue:
            return _error(429, f"{self.counts.waiting} queries are waiting, come back later", {"Retry-After": "1"})
        self.counts.waiting += count
        try:
            answer = await self._score(call)
        except Complaint as complaint:  # it is the source's, not the protocol's
            return _error(BROKEN if complaint.is_transient else REFUSED, f"the reward {complaint}; {complaint.advice}")
        finally:
            self.counts.waiting -= count
        self.counts.items += count
        known = {name: answer[name] for name in ("rewards", "scores") if name in answer}
        logs = {name: values for name, values in answer.items() if name not in known}
        return web.json_response(known | ({"extra_logs": logs} if logs else {}))

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=self.counts.text())


def read_call(body: bytes, most: int) -> Call:
    """Parse the body of a request. Raises BadRequestError."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):  # no JSON, or lists nested too deeply
        raise BadRequestError('the body is not JSON; send {"query": [texts]}') from None
    if not isinstance(request, dict) or "query" not in request:
        raise BadRequestError('the body has no "query"; send {"query": [texts]}')
    queries = request["query"]
    queries = [queries] if isinstance(queries, str) else queries
    if not isinstance(queries, list) or not queries:
        raise BadRequestError('"query" must be a text or a list of at least one text')
    _check_texts("query", queries)
    if len(queries) > most:
        raise BadRequestError(f'"query" has {len(queries)} texts, more than the {most} of one request')
    # One value may stand for all queries.
    call: Call = {"queries": queries}
    for key in ("prompts", "labels"):
        value = request.get(key)
        values = value if isinstance(value, list) else ["" if value is None else value] * len(queries)
        if len(values) != len(queries):
            raise BadRequestError(f'"{key}" has {len(values)} entries for {len(queries)} queries')
        call[key] = values
    _check_texts("prompts", call["prompts"])
    pairs = zip(queries, call["prompts"], strict=True)
    return call | {"responses": [query.removeprefix(prompt) for query, prompt in pairs]}


def _check_texts(key: str, values: Sequence[object]) -> None:
    """Raise BadRequestError for the first entry that is not a text, or that has a lone surrogate."""
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise BadRequestError(f'"{key}" {index} is {_KINDS.get(type(value), "an object")}, not a text')
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRequestError(
                f'"{key}" {index} has half of a surrogate pair at character {error.start}: a text was cut inside an emoji '
                "or another such character; leave the half out"
            ) from None


def _error(status: int, sentence: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": sentence}, status=status, headers=headers)
