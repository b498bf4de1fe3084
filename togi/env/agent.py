"""Agents that are given a base URL, as environments: a function of a file (``FILE.py:run``) or any program.

``run(base_url, task, api_key)`` may be async, may leave the last argument out, and returns the reward: a number, a dict with
"reward" and other numbers by name, or None to abstain. OPENAI_BASE_URL and OPENAI_API_KEY are set as well, so an agent that uses
the official client needs no change. A program gets these two, and the task as JSON on its standard input; the last line that it
prints is the reward as JSON.

Each episode has a process of its own, forked from one that has imported the file (``agent_process``).
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from togi.config.fields import hook_of
from togi.env.proxy import Proxy
from togi.env.session import Limits, Session
from togi.errors import ConfigError
from togi.reward.function import UserProcess
from togi.reward.wire import LENGTH, Complaint, Load, LoadKind, encode, receive, send
from togi.rollout.collect import Generate
from togi.sample import Outcome, Prompt, Rollout, Sampling, Score

MODULE = "togi.env.agent_process"
START_SECONDS = 120.0
COMPONENT = "agent"


class AgentHost:
    """The user's agent in a process that forks one for each episode. ``shown_as``: how messages name it.

    ``processes``: episodes at once.
    """

    def __init__(self, start: Mapping[str, object], shown_as: str, processes: int) -> None:
        self.shown_as = shown_as
        self._free = asyncio.Semaphore(processes)
        self._start_frame = encode(start)
        self._turn = asyncio.Lock()
        self._process: UserProcess | None = None

    @classmethod
    def of(cls, agent: str, processes: int) -> Self:
        """``FILE.py:function``, or a command line. Raises ConfigError."""
        return cls.from_command(agent, processes) if hook_of(agent) is None else cls.from_file(agent, processes)

    @classmethod
    def from_file(cls, place: str, processes: int) -> Self:
        """``FILE.py:function``. Raises ConfigError."""
        path, _, name = place.rpartition(":")
        file = Path(path).expanduser().absolute()
        if file.suffix != ".py" or not file.is_file():
            raise ConfigError(
                f"--agent {place} names no existing .py file: give FILE.py:function, or command and a program."
            )
        load = Load(LoadKind.FILE, str(file), name, content=base64.b64encode(file.read_bytes()).decode())
        return cls({"load": asdict(load)}, f"{name} in {path}", processes)

    @classmethod
    def from_command(cls, line: str, processes: int) -> Self:
        """A command line for the shell."""
        return cls({"command": line}, f"the command {line!r}", processes)

    async def check(self) -> None:
        """Import the agent. Raises ConfigError if that fails."""
        await self._ready()

    async def play(self, message: Mapping[str, object], seconds: float) -> Mapping[str, Any]:
        """Run one episode. It is killed at its time limit, and when this call is cancelled. Raises Complaint and ConfigError."""
        async with self._free:
            return await self._play((await self._ready()).channel, message, seconds)

    async def _ready(self) -> UserProcess:
        """The process that has imported the agent, a new one if it has ended. Raises ConfigError."""
        async with self._turn:
            if self._process is None or self._process.has_ended:
                self._discard()
                self._process = await asyncio.to_thread(self._started)
            return self._process

    async def _play(self, channel: socket.socket, message: Mapping[str, object], seconds: float) -> Mapping[str, Any]:
        ours, theirs = socket.socketpair()
        reader_fd, writer_fd = os.pipe()
        # The reading end stays open here too: what the episode left behind is killed also when the episode has ended.
        with open(reader_fd, "rb") as lifeline, open(writer_fd, "wb"):  # noqa: PTH123
            try:
                socket.send_fds(channel, [b"f"], [theirs.fileno(), lifeline.fileno()])
            finally:
                theirs.close()
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            try:
                async with asyncio.timeout(seconds):
                    writer.write(encode(message))
                    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                    reply: dict[str, Any] = json.loads(await reader.readexactly(length))
            except TimeoutError:
                what = f"ran longer than the limit of {seconds:g} s and was killed"
                raise Complaint(what, "make it faster or raise --agent_timeout") from None
            except (OSError, asyncio.IncompleteReadError):
                raise Complaint("ended its process", "let it return its reward, within the machine's memory") from None
            finally:
                writer.close()
        if "complaint" in reply:
            raise Complaint(**reply["complaint"])
        answer: Mapping[str, Any] = reply["answer"]
        return answer

    def close(self) -> None:
        """End the process that forks. No episode may be running."""
        self._discard()

    def _started(self) -> UserProcess:
        process = UserProcess(MODULE)
        channel = process.channel
        try:
            send(channel, self._start_frame, START_SECONDS)
            reply = receive(channel, START_SECONDS)
        except TimeoutError:
            process.kill()
            raise ConfigError(
                f"{self.shown_as} took longer than {START_SECONDS:g} s to import: do less there."
            ) from None
        except OSError:
            process.kill()
            raise ConfigError(f"{self.shown_as} ended its process at import: make the file importable.") from None
        if "complaint" in reply:
            process.kill()
            complaint = Complaint(**reply["complaint"])
            raise ConfigError(f"{self.shown_as} {complaint}; {complaint.advice}.")
        channel.setblocking(True)
        return process

    def _discard(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None


class AgentEnvironment:
    """An ``Environment`` (``togi.rollout.collect``) in which the user's agent acts through the proxy. It closes neither of them.

    ``seconds``: wall-clock limit of an episode (``--agent_timeout``). ``ended``: called with each session after its episode.
    """

    def __init__(
        self,
        proxy: Proxy,
        host: AgentHost,
        sampling: Sampling,
        limits: Limits,
        seconds: float,
        ended: Callable[[Session], None] = lambda _: None,
    ) -> None:
        self._proxy, self._host, self._sampling, self._limits = proxy, host, sampling, limits
        self._seconds, self._ended = seconds, ended

    async def run(self, prompt: Prompt, group_id: str, generate: Generate) -> Rollout:
        """One episode. What the agent does wrong is its score; what generation does wrong is raised."""
        async with self._proxy.session(prompt, generate, self._sampling, self._limits) as session:
            message = {"base_url": self._proxy.base_url, "api_key": session.key, "task": task_of(prompt)}
            playing = asyncio.create_task(self._host.play(message, self._seconds))
            try:
                either: set[asyncio.Future[Any]] = {playing, session.failed}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if session.failed.done():
                    session.failed.result()
                score = self._score(playing, session, prompt)
            finally:
                playing.cancel()
                await asyncio.gather(playing, return_exceptions=True)
        self._ended(session)
        rollout = session.rollout(group_id, score)
        failed = float(score.outcome is Outcome.ERROR)
        return replace(rollout, counts={**rollout.counts, "failed": failed})

    def _score(self, playing: asyncio.Task[Mapping[str, Any]], session: Session, prompt: Prompt) -> Score:
        try:
            answer = playing.result()
        except Complaint as complaint:
            limit = f" after it was refused a request ({session.refused})" if session.refused else ""
            message = f"{self._host.shown_as} {complaint}{limit} on prompt {prompt.id!r}; {complaint.advice}."
            return Score(Outcome.ERROR, message=message)
        components = {name: value for name, value in answer.items() if name != "reward" and value is not None}
        if answer["reward"] is None:
            return Score(Outcome.ABSTAIN, components=components, message=f"{self._host.shown_as} abstained.")
        return Score(Outcome.SCORE, answer["reward"], {COMPONENT: answer["reward"], **components})


def task_of(prompt: Prompt) -> dict[str, object]:
    """What an agent is told: the columns of the row, and under names that it does not use the prompt's own parts."""
    own = {"id": prompt.id, "messages": list(prompt.messages), "prompt": prompt.text, "label": prompt.label}
    return {**own, "datasource": prompt.datasource, **prompt.row}
