"""Rewards from HTTP servers (``--remote_rm_url``), by the established protocol.

One POST a group: {"query": [prompt + response, ...], "prompts": [...], "labels": [...]}, a query with its special tokens as
text, so that a response that ended by itself ends in the end token. The answer is {"rewards": [...]}, with optional
"scores" and "extra_logs" {name: [...]}, or the bare list of rewards; null abstains. What else it holds is ignored.

A server that is away is waited for, up to ``max_pause`` seconds a group; a request that fails is tried again ``retries`` times;
one that is refused (4xx) is not. The environment variable TOGI_REWARD_TOKEN holds a bearer token.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from togi.errors import RewardError
from togi.obs.progress import duration
from togi.reward.http_server import FIRST_DELAY_SECONDS, ConnectionLimits, FaultKind, HttpServer, ServerFaultError
from togi.reward.returned import DICT_KEYS, BadReturnError, checked
from togi.reward.scores import as_call, as_scores, failed, without_errors
from togi.reward.wire import NO_INDEX, Answer
from togi.sample import Rollout, Score

TOKEN_VARIABLE = "TOGI_REWARD_TOKEN"
REWARDS = 'answer {"rewards": [one number per query]}'


@dataclass(frozen=True, slots=True)
class Patience:
    """``retries``: how often a failed request is repeated (``--reward_retries``). ``max_pause``: seconds to wait for a
    server that is away (``--remote_rm_max_pause``)."""

    retries: int = 1
    max_pause: float = 3600.0


class RemoteReward:
    """One reward from one server, or from several equal ones that share the groups.

    ``response``: a rollout's response as text with its special tokens. ``component`` names the reward in logs.
    """

    def __init__(
        self,
        urls: Sequence[str],
        limits: ConnectionLimits,
        patience: Patience,
        response: Callable[[Rollout], str],
        component: str = "remote",
    ) -> None:
        self._servers = [HttpServer(url, limits) for url in urls]
        self._patience = patience
        self._response = response
        self._component = component

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        """One score per rollout, in order; all of them errors when the request failed for good.

        Raises RewardError when no server came back in time.
        """
        body = self._body(group)
        deadline = time.monotonic() + self._patience.max_pause
        failures, lost_at = 0, math.inf
        while True:
            server = min(self._servers, key=lambda each: (each.wait_seconds, each.unfinished))
            await self._wait_for(server, deadline)
            try:
                return self._scores(await server.post(body), server, group)
            except ServerFaultError as fault:
                sentence = f"The reward server {server.shown_url} {fault.what}"
                # a server that breaks on this request and serves others since is not away: it cannot serve this one
                failures += fault.kind is FaultKind.FAILED or (fault.was_lost and server.answered_at > lost_at)
                lost_at = time.monotonic() if fault.was_lost else lost_at
                if fault.kind is FaultKind.REFUSED or failures > self._patience.retries:
                    return failed(len(group), f"{sentence} (prompt {group[0].prompt.id!r}).")
                if fault.kind is FaultKind.AWAY and time.monotonic() > deadline:
                    pause = duration(self._patience.max_pause)
                    raise RewardError(
                        f"{sentence}, and the longest pause of {pause} is over (--remote_rm_max_pause): "
                        "start the server again and resume."
                    ) from None
                if fault.kind is FaultKind.FAILED:
                    await asyncio.sleep(FIRST_DELAY_SECONDS * 2 ** (failures - 1) * random.uniform(0.5, 1.0))

    async def check(self, group: Sequence[Rollout]) -> list[Score]:
        """Ask every server once for real; what the last one says. Raises RewardError for every failure, also of a server that
        is away.
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
        """Seconds since the last call in which a server was away, the longest of all servers."""
        return max(server.take_paused_seconds() for server in self._servers)

    async def _wait_for(self, server: HttpServer, deadline: float) -> None:
        """Until the server is due for another try, but not beyond the deadline."""
        while (wait := min(server.wait_seconds, deadline - time.monotonic())) > 0:
            await asyncio.sleep(wait)

    def _body(self, group: Sequence[Rollout]) -> bytes:
        call = as_call(group, self._response)
        return json.dumps({"query": call.queries, "prompts": call.prompts, "labels": call.labels}).encode()

    def _scores(self, content: bytes, server: HttpServer, group: Sequence[Rollout]) -> list[Score]:
        """The scores in an answer; errors where it is not one."""
        shown_as = f"The reward server {server.shown_url}"
        try:
            answer = read_answer(content, len(group), server.shown)
        except BadReturnError as error:
            where = f" for sample {error.index}" if error.index != NO_INDEX else ""
            return failed(
                len(group), f"{shown_as} {error.what}{where} of prompt {group[0].prompt.id!r}; let it {error.advice}."
            )
        return as_scores(answer, self._component, shown_as, len(group))


def read_answer(content: bytes, count: int, shown: Callable[[bytes], str]) -> Answer:
    """The answer of a server to ``count`` queries; ``shown`` is how it is quoted. Raises BadReturnError."""
    try:
        reply: Any = json.loads(content)
    except ValueError:
        raise BadReturnError(f"returned {shown(content)!r}, which is not JSON", REWARDS) from None
    if isinstance(reply, dict) and "rewards" not in reply:
        raise BadReturnError(f"returned no rewards (but {shown(content)!r})", REWARDS)
    if isinstance(reply, dict):
        optional = ("scores", "extra_logs")
        reply = {
            key: reply[key] for key in DICT_KEYS if key in reply and (key not in optional or reply[key] is not None)
        }
    return checked(reply, count)
