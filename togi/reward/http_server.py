"""One reward server as the client sees it: one POST at a time out of a bounded pool, what a fault means, is it up.

Not here: what is asked and how often it is tried again (``remote``).
"""

from __future__ import annotations

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
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

import aiohttp

from togi.obs.progress import duration
from togi.obs.redact import redact_value, scrub

CONNECT_SECONDS = 10.0
# Less than the 5 s after which common servers close an idle connection, which would look like one that broke.
KEEPALIVE_SECONDS = 4.0
FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 10.0
NOTICE_SECONDS = 30.0
SHOWN_CHARACTERS = 200
# Under which of its keys a JSON answer says what went wrong, as servers and their frameworks name them.
ERROR_KEYS = ("error", "detail", "message")
# What a server, or a proxy before it, answers while it cannot serve anybody.
AWAY_STATUSES = frozenset({429, 502, 503, 504})
PRIVATE_ENDINGS = (".localhost", ".local", ".internal", ".svc", ".lan")

logger = logging.getLogger(__name__)


class FaultKind(StrEnum):
    """away: nobody is served now, wait for it. failed: this request failed, perhaps not again. refused: it always will."""

    AWAY = "away"
    FAILED = "failed"
    REFUSED = "refused"


class ServerFaultError(Exception):
    """A request without a usable answer. ``what`` continues "The reward server URL ...".

    ``was_lost``: the connection broke after the request was sent, so that the request itself may be the reason.
    """

    def __init__(self, kind: FaultKind, what: str, *, was_lost: bool = False) -> None:
        super().__init__(what)
        self.kind = kind
        self.what = what
        self.was_lost = was_lost


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """``concurrency``: requests at the same time (``--remote_rm_concurrency``). ``timeout``: seconds of a whole request.

    ``token``: sent as a bearer token; "" sends none.
    """

    concurrency: int = 64
    timeout: float = 60.0
    token: str = ""


class HttpServer:
    """Connections are opened by the first request, so that an instance belongs to no event loop before."""

    def __init__(self, url: str, limits: ConnectionLimits) -> None:
        self.shown_url = str(redact_value("", url))
        self.unfinished = 0
        self.answered_at = -math.inf  # monotonic seconds of the latest answer
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
        """How long to leave the server alone; 0 when it is up or due for another try."""
        return max(0.0, self._retry_at - time.monotonic())

    def take_paused_seconds(self) -> float:
        """Seconds of being down since the last call."""
        self._count_pause()
        taken, self._paused = self._paused, 0.0
        return taken

    async def post(self, body: bytes) -> bytes:
        """The body of the answer. Raises ServerFaultError."""
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
        session = self._open()
        try:
            async with session.post(
                self._url, data=body, proxy=proxy_of(self._url), allow_redirects=False, headers=self._headers()
            ) as response:
                content = await response.read()
                status = response.status
        except (aiohttp.ClientSSLError, ssl.SSLError, aiohttp.InvalidURL) as error:
            raise ServerFaultError(FaultKind.REFUSED, f"cannot be used ({_short(error)})") from None
        except aiohttp.ConnectionTimeoutError:
            raise ServerFaultError(FaultKind.AWAY, f"takes no connection within {CONNECT_SECONDS:g} s") from None
        except TimeoutError:
            what = f"gave no answer within --reward_timeout {self._limits.timeout:g} s"
            raise ServerFaultError(FaultKind.FAILED, what) from None
        except aiohttp.ClientPayloadError as error:
            raise ServerFaultError(FaultKind.FAILED, f"broke off its answer ({_short(error)})") from None
        except aiohttp.ClientConnectorError as error:
            raise ServerFaultError(FaultKind.AWAY, f"does not answer ({_short(error)})") from None
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise ServerFaultError(FaultKind.AWAY, f"broke the connection ({_short(error)})", was_lost=True) from None
        except aiohttp.ClientError as error:
            raise ServerFaultError(FaultKind.FAILED, f"gave no HTTP answer ({_short(error)})") from None
        if status == 200:
            return content
        kind = FaultKind.FAILED if status >= 500 else FaultKind.REFUSED
        kind = FaultKind.AWAY if status in AWAY_STATUSES else kind
        said = self.shown(content)
        raise ServerFaultError(kind, f"answered with status {status}" + (f": {said}" if said else ""))

    def shown(self, content: bytes) -> str:
        """The beginning of what the server said, on one line and without our token; of a JSON error its sentence."""
        text = content.decode(errors="replace")
        with contextlib.suppress(ValueError):
            reply = json.loads(text)
            text = (
                next((str(reply[key]) for key in ERROR_KEYS if reply.get(key)), text)
                if isinstance(reply, dict)
                else text
            )
        secrets = (
            self._limits.token,
            *(part or "" for part in (urlsplit(self._url).username, urlsplit(self._url).password)),
        )
        text = " ".join(scrub(str(redact_value("", text)), secrets).split())
        return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            limits = aiohttp.ClientTimeout(total=self._limits.timeout, sock_connect=CONNECT_SECONDS)
            connector = aiohttp.TCPConnector(limit=self._limits.concurrency, keepalive_timeout=KEEPALIVE_SECONDS)
            self._session = aiohttp.ClientSession(timeout=limits, connector=connector)
        return self._session

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self._limits.token and "@" not in urlsplit(self._url).netloc:  # a login in the URL is sent instead
            headers["Authorization"] = f"Bearer {self._limits.token}"
        return headers

    def _is_away(self, what: str) -> None:
        now = time.monotonic()
        if self._down_since is None:
            self._down_since = self._counted_until = now
        if now >= self._retry_at:  # of the requests that fail together only the first one counts
            delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2**self._delays)
            self._delays += 1
            self._retry_at = now + delay * random.uniform(0.5, 1.0)
        if now >= self._next_notice:
            self._next_notice = now + NOTICE_SECONDS
            self._was_noticed = True
            so_far = f" ({duration(now - self._down_since)} so far)" if now > self._down_since else ""
            logger.warning(
                "The reward server %s %s: its requests wait until it is back%s.", self.shown_url, what, so_far
            )

    def _is_up(self) -> None:
        now = time.monotonic()
        if self._down_since is not None and self._was_noticed:
            logger.warning(
                "The reward server %s answers again after %s.", self.shown_url, duration(now - self._down_since)
            )
        self._count_pause()
        self._down_since, self._was_noticed, self._delays, self._retry_at = None, False, 0, 0.0
        self.answered_at = now

    def _count_pause(self) -> None:
        if self._down_since is not None:
            now = time.monotonic()
            self._paused += now - self._counted_until
            self._counted_until = now


def proxy_of(url: str) -> str | None:
    """The proxy that the environment names for ``url``; none for this machine and private networks."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_private(host) or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def is_private(host: str) -> bool:
    """Whether a host is this machine or in a private network, as far as its name or address tells."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(PRIVATE_ENDINGS)
    return address.is_private or address.is_loopback or address.is_link_local


def _short(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
