"""Rewards from HTTP servers (``--remote_rm_url``), by the established protocol.

One POST per group: {"query": [prompt + response, ...], "prompts": [...], "labels": [...]}. A query has its special tokens as text,
so a response that ended by itself ends with the end token. The answer is {"rewards": [...]}, with optional "scores" and
"extra_logs" {name: [...]}, or the bare list of rewards; null abstains. Other keys are ignored.

A server that is down is waited for, up to ``max_pause`` seconds per group. A failed request is retried ``retries``
times; a refused one (4xx) is not. The environment variable TOGI_REWARD_TOKEN holds a bearer token.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import math
import random
import ssl
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

import aiohttp

from togi.errors import RewardError
from togi.obs.progress import duration
from togi.obs.run_dir import redact_value, scrub
from togi.reward.scores import as_call, as_scores, failed, without_errors
from togi.reward.wire import DICT_KEYS, NO_INDEX, Answer, Complaint, checked
from togi.sample import Rollout, Score

# First part: one reward server as the client sees it, with its connections, its faults and whether it is up.
# ``RemoteReward`` below decides what is asked and how often it is retried.

CONNECT_SECONDS = 10.0
# Common servers close an idle connection after 5 s, which would look like a broken one.
KEEPALIVE_SECONDS = 4.0
FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 10.0
NOTICE_SECONDS = 30.0
SHOWN_CHARACTERS = 200
# The keys under which servers and their frameworks put an error message.
ERROR_KEYS = ("error", "detail", "message")
# The statuses of a server, or a proxy before it, that cannot serve anybody now.
AWAY_STATUSES = frozenset({429, 502, 503, 504})
PRIVATE_ENDINGS = (".localhost", ".local", ".internal", ".svc", ".lan")

logger = logging.getLogger(__name__)


_LOST = (aiohttp.ClientConnectionError, OSError)


class FaultKind(StrEnum):
    """AWAY: the server is down, wait for it. FAILED: this request failed, retry. REFUSED: it would always fail."""

    AWAY = "away"
    FAILED = "failed"
    REFUSED = "refused"


@dataclass(eq=False)
class ServerFaultError(Exception):
    """A request without a usable answer. ``what``: continues "The reward server URL ...".

    ``was_lost``: the connection broke after the request was sent, so the request itself may be the cause.
    """

    kind: FaultKind
    what: str
    was_lost: bool = False


# Faults of the configuration never pass, those of the connection mean a server that is down, the rest are retried. The first
# that fits an exception counts.
_FAULTS: Sequence[tuple[type[Exception] | tuple[type[Exception], ...], FaultKind, str]] = (
    ((aiohttp.ClientSSLError, ssl.SSLError, aiohttp.InvalidURL), FaultKind.REFUSED, "cannot be used ({reason})"),
    (aiohttp.ConnectionTimeoutError, FaultKind.AWAY, f"takes no connection within {CONNECT_SECONDS:g} s"),
    (TimeoutError, FaultKind.FAILED, "gave no answer within --reward_timeout {timeout:g} s"),
    (aiohttp.ClientPayloadError, FaultKind.FAILED, "broke off its answer ({reason})"),
    (aiohttp.ClientConnectorError, FaultKind.AWAY, "does not answer ({reason})"),
    (_LOST, FaultKind.AWAY, "broke the connection ({reason})"),
    (aiohttp.ClientError, FaultKind.FAILED, "gave no HTTP answer ({reason})"),
)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """``concurrency``: requests at the same time (``--remote_rm_concurrency``). ``timeout``: seconds for a whole request.

    ``token``: sent as a bearer token; "" sends none. ``retries``: how often a failed request is repeated (``--reward_retries``).
    ``max_pause``: seconds to wait for a server that is away (``--remote_rm_max_pause``).
    """

    concurrency: int = 64
    timeout: float = 60.0
    token: str = ""
    retries: int = 1
    max_pause: float = 3600.0


class HttpServer:
    """A client of one server. The first request opens the connections, so an instance is bound to no event loop before."""

    def __init__(self, url: str, limits: ConnectionLimits) -> None:
        self.shown_url = str(redact_value("", url))
        self.unfinished = 0
        self.answered_at = -math.inf  # monotonic seconds of the latest answer
        # Connections, then the state of a server that is down: since when, counted until when, next try, next notice.
        self._url = url
        self._limits = limits
        self._session: aiohttp.ClientSession | None = None
        self._places = asyncio.Semaphore(limits.concurrency)
        self._down_since: float | None = None
        self._counted_until = 0.0
        self._paused = 0.0
        self._next_notice = 0.0
        self._was_noticed = False
        self._delays = 0
        self._retry_at = 0.0

    @property
    def wait_seconds(self) -> float:
        """Seconds to leave the server alone; 0 if it is up or due for another try."""
        return max(0.0, self._retry_at - time.monotonic())

    def take_paused_seconds(self) -> float:
        """Seconds that the server was down since the last call."""
        self._count_pause()
        taken, self._paused = self._paused, 0.0
        return taken

    async def post(self, body: bytes) -> bytes:
        """Send a request and return the body of the answer. Raises ServerFaultError."""
        self.unfinished += 1
        try:
            async with self._places:
                answer = await self._post(body)
        except ServerFaultError as fault:
            if fault.kind is FaultKind.AWAY:
                self._is_away(fault.what)
            raise
        finally:
            self.unfinished -= 1
        self._is_up()
        return answer

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _post(self, body: bytes) -> bytes:
        if self._session is None:
            limits = aiohttp.ClientTimeout(total=self._limits.timeout, sock_connect=CONNECT_SECONDS)
            connector = aiohttp.TCPConnector(limit=self._limits.concurrency, keepalive_timeout=KEEPALIVE_SECONDS)
            self._session = aiohttp.ClientSession(timeout=limits, connector=connector)
        headers = {"Content-Type": "application/json"}
        if self._limits.token and "@" not in urlsplit(self._url).netloc:  # a login in the URL is sent instead
            headers["Authorization"] = f"Bearer {self._limits.token}"
        try:
            async with self._session.post(
                self._url, data=body, proxy=proxy_of(self._url), allow_redirects=False, headers=headers
            ) as response:
                content, status = await response.read(), response.status
        except (aiohttp.ClientError, OSError) as error:
            types, kind, what = next(fault for fault in _FAULTS if isinstance(error, fault[0]))
            reason = " ".join(str(error).split()) or type(error).__name__
            what = what.format(reason=reason, timeout=self._limits.timeout)
            raise ServerFaultError(kind, what, was_lost=types is _LOST) from None
        if status == 200:
            return content
        failure = FaultKind.FAILED if status >= 500 else FaultKind.REFUSED
        kind = FaultKind.AWAY if status in AWAY_STATUSES else failure
        said = self.shown(content)
        raise ServerFaultError(kind, f"answered with status {status}" + (f": {said}" if said else ""))

    def shown(self, content: bytes) -> str:
        """The start of the server's answer on one line, without the token; for a JSON error its message."""
        text = content.decode(errors="replace")
        with contextlib.suppress(ValueError):
            reply = json.loads(text)
            if isinstance(reply, dict):
                text = next((str(reply[key]) for key in ERROR_KEYS if reply.get(key)), text)
        # Servers may echo the request with its credentials.
        login = urlsplit(self._url)
        secrets = (self._limits.token, login.username or "", login.password or "")
        text = " ".join(scrub(str(redact_value("", text)), secrets).split())
        return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."

    def _is_away(self, what: str) -> None:
        now = time.monotonic()
        if self._down_since is None:
            self._down_since = self._counted_until = now
        if now >= self._retry_at:  # requests fail together, and only the first one counts
            delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2**self._delays)
            self._delays += 1
            self._retry_at = now + delay * random.uniform(0.5, 1.0)
        if now >= self._next_notice:
            self._next_notice = now + NOTICE_SECONDS
            self._was_noticed = True
            since = f" ({duration(now - self._down_since)} so far)" if now > self._down_since else ""
            logger.warning(
                "The reward server %s %s: its requests wait until it is back%s.", self.shown_url, what, since
            )

    def _is_up(self) -> None:
        now = time.monotonic()
        if self._down_since is not None and self._was_noticed:
            away = duration(now - self._down_since)
            logger.warning("The reward server %s answers again after %s.", self.shown_url, away)
        self._count_pause()
        self._down_since, self._was_noticed, self._delays, self._retry_at = None, False, 0, 0.0
        self.answered_at = now

    def _count_pause(self) -> None:
        if self._down_since is not None:
            now = time.monotonic()
            self._paused += now - self._counted_until
            self._counted_until = now


def proxy_of(url: str) -> str | None:
    """The proxy for ``url`` by the environment; None for this machine and private networks."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_private(host) or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def is_private(host: str) -> bool:
    """Whether a host is this machine or in a private network, judged by its name or address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(PRIVATE_ENDINGS)
    return address.is_private or address.is_loopback or address.is_link_local


TOKEN_VARIABLE = "TOGI_REWARD_TOKEN"
REWARDS = 'answer {"rewards": [one number per query]}'


class RemoteReward:
    """One reward from one server, or from several equal servers that share the groups.

    ``response``: a rollout's response as text with its special tokens. ``component``: the name of the reward in logs.
    """

    def __init__(
        self,
        urls: Sequence[str],
        limits: ConnectionLimits,
        response: Callable[[Rollout], str],
        component: str = "remote",
    ) -> None:
        self._servers = [HttpServer(url, limits) for url in urls]
        self._limits, self._response, self._component = limits, response, component

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        """One score per rollout, in order; all of them errors if the request failed for good.

        Raises RewardError if no server came back in time.
        """
        body = self._body(group)
        deadline = time.monotonic() + self._limits.max_pause
        failures, lost_at = 0, math.inf
        while True:
            # The server that is due first, and among those the one with the fewest requests.
            server = min(self._servers, key=lambda each: (each.wait_seconds, each.unfinished))
            # Until the server is due for another try, but not beyond the deadline.
            while (wait := min(server.wait_seconds, deadline - time.monotonic())) > 0:
                await asyncio.sleep(wait)
            try:
                return self._scores(await server.post(body), server, group)
            except ServerFaultError as fault:
                sentence = f"The reward server {server.shown_url} {fault.what}"
                # A server that breaks on this request but has served others since is up: it cannot serve this request.
                failures += fault.kind is FaultKind.FAILED or (fault.was_lost and server.answered_at > lost_at)
                lost_at = time.monotonic() if fault.was_lost else lost_at
                # Three ways out: give the request up, give the server up, or try again.
                if fault.kind is FaultKind.REFUSED or failures > self._limits.retries:
                    return failed(len(group), f"{sentence} (prompt {group[0].prompt.id!r}).")
                if fault.kind is FaultKind.AWAY and time.monotonic() > deadline:
                    pause = duration(self._limits.max_pause)
                    over = f"the longest pause of {pause} is over (--remote_rm_max_pause): start the server again and resume."
                    raise RewardError(f"{sentence}, and {over}") from None
                if fault.kind is FaultKind.FAILED:
                    await asyncio.sleep(FIRST_DELAY_SECONDS * 2 ** (failures - 1) * random.uniform(0.5, 1.0))

    async def check(self, group: Sequence[Rollout]) -> list[Score]:
        """Send one request to every server and return the scores of the last one. Raises RewardError for every failure, also if a
        server is down.
        """
        body, scores = self._body(group), list[Score]()
        for server in self._servers:
            try:
                scores = without_errors(self._scores(await server.post(body), server, group))
            except ServerFaultError as fault:
                raise RewardError(
                    f"The reward server {server.shown_url} {fault.what}: start it, or correct --remote_rm_url."
                ) from None
        return scores

    async def close(self) -> None:
        """Close the connections."""
        for server in self._servers:
            await server.close()

    def take_paused_seconds(self) -> float:
        """Seconds since the last call that a server was down, the longest of all servers."""
        return max(server.take_paused_seconds() for server in self._servers)

    def _body(self, group: Sequence[Rollout]) -> bytes:
        call = as_call(group, self._response)
        return json.dumps({"query": call["queries"], "prompts": call["prompts"], "labels": call["labels"]}).encode()

    def _scores(self, content: bytes, server: HttpServer, group: Sequence[Rollout]) -> list[Score]:
        """The scores in an answer; errors if it is invalid."""
        shown_as = f"The reward server {server.shown_url}"
        try:
            answer = read_answer(content, len(group), server.shown)
        except Complaint as complaint:
            where = f" for sample {complaint.index}" if complaint.index != NO_INDEX else ""
            message = f"{shown_as} {complaint}{where} of prompt {group[0].prompt.id!r}; let it {complaint.advice}."
            return failed(len(group), message)
        return as_scores(answer, self._component, shown_as, len(group))


def read_answer(content: bytes, count: int, shown: Callable[[bytes], str]) -> Answer:
    """A server's answer to ``count`` queries. ``shown``: how it is quoted in errors. Raises Complaint."""
    try:
        reply: object = json.loads(content)
    except ValueError:
        raise Complaint(f"returned {shown(content)!r}, which is not JSON", REWARDS) from None
    if isinstance(reply, dict):
        if "rewards" not in reply:
            raise Complaint(f"returned no rewards (but {shown(content)!r})", REWARDS)
        # other keys are ignored, and those of nothing
        reply = {key: reply[key] for key in DICT_KEYS if key == "rewards" or reply.get(key) is not None}
    return checked(reply, count)
