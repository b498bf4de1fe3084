"""Users' environment classes (``--environment FILE.py:Class``), each episode in a process that can be killed at any moment.

::

    class Guess:
        done = False

        def reset(self, low: int, high: int) -> str:
            self.secret = random.randint(low, high)
            return f"Guess my number from {low} to {high}."

        def guess(self, number: int) -> str:
            \"\"\"Guess the number.

            Args:
                number: Your guess.
            \"\"\"
            self.done = number == self.secret
            return "right" if self.done else "wrong"

        def reward(self) -> float:
            return float(self.done)

* ``reset`` gets the columns of the row that it names (all, if it takes ``**row``), and returns the first observation: a string,
  a list of messages, or None where the row has the prompt. An instance is one episode; the constructor has no arguments.
* Every public method is a tool. The model sees its docstring (Google's style) and a schema made of its type hints. A tool ends
  the episode by setting the attribute ``done`` to True, which is read after each call.
* A class with ``step(action) -> (observation, reward or None, done)`` is a game instead: the model's text is the action. Its other
  methods are its own.
* ``reward``, if there is one, returns a number, numbers by name (the reward is their sum), or None to abstain. With a parameter
  ``answer`` it gets the policy's last text.
* ``close``, if there is one, is called at the end whatever happened, unless the process hung or died and so is dead already.
* Any method may be async.

What a tool raises is an observation, and so are arguments that do not fit; ``Observation.error`` tells them from answers. Where
the environment itself fails (``reset`` or ``step`` raises, a process hangs or dies) there is no observation but EpisodeFailed.

``hosted`` is the side of the processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import socket
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from togi.data.messages import Message
from togi.env.hosted import CALL, CLOSE, LONGEST_PROMPT, RESET, REWARD, STEP, Facts
from togi.errors import EpisodeFailed, UserError
from togi.obs.names import RESERVED_COMPONENTS
from togi.reward.function import UserProcess, ending, file_of, load_by_value, load_of_file
from togi.reward.wire import LENGTH, Complaint, Load, encode, send
from togi.sample import Outcome, Score

# No frame is longer: JSON writes a character as 12 bytes at most. Whoever sends more has broken out of its limits.
LONGEST_FRAME = 12 * LONGEST_PROMPT + (1 << 20)
# To be told how a process ended, and to see it gone.
GRACE_SECONDS = 10.0
# Of this process: a socket and a lifeline for each episode, and what else it needs.
DESCRIPTORS, OTHER_DESCRIPTORS = 2, 128

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostLimits:
    """``processes``: episodes at once. ``tool_seconds``: for each call of a method. ``start_seconds``: to import the file, and
    for ``reset``. ``observation_chars``: what is longer is cut in the middle, and says so.
    """

    processes: int = 256
    tool_seconds: float = 60.0
    start_seconds: float = 120.0
    observation_chars: int = 20_000

    def __post_init__(self) -> None:
        assert self.processes >= 1 and self.tool_seconds > 0 and self.start_seconds > 0
        assert 1 <= self.observation_chars <= LONGEST_PROMPT


DEFAULT = HostLimits()


@dataclass(frozen=True, slots=True)
class Observation:
    """What the model is told. ``reward``: of a game's turn. ``done``: the episode is over.

    ``error``: why the call failed, with the line of the user's file; "" if it did not. ``left_out``: characters that were cut.
    """

    text: str
    done: bool
    error: str
    left_out: int
    reward: float | None = None


class Process:
    """The process of one episode as the host sees it. Closing its lifeline kills it and all that it has started."""

    def __init__(self) -> None:
        self.channel, self.theirs = socket.socketpair()
        self.channel.setblocking(False)
        try:
            reader, writer = os.pipe()
        except OSError:
            self.channel.close()
            self.theirs.close()
            raise
        self.reader, self._lifeline = open(reader, "rb", buffering=0), open(writer, "wb", buffering=0)  # noqa: PTH123, SIM115
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[str] = loop.create_future()

    def handed_over(self) -> None:
        """The other ends are with the process now."""
        self.theirs.close()
        self.reader.close()

    def kill(self) -> None:
        """Kill it. A request in flight finds the socket closed."""
        self._lifeline.close()
        with contextlib.suppress(OSError):  # it is closed
            self.channel.shutdown(socket.SHUT_RDWR)

    def has_started(self) -> None:
        """It runs."""
        if not self.started.done():
            self.started.set_result(None)

    def has_ended(self, how: str) -> None:
        """It has ended, or was never started."""
        self.kill()
        self.has_started()
        if not self.ended.done():
            self.ended.set_result(how)

    def close(self) -> None:
        """Kill it and give everything back. No request may be in flight."""
        self.kill()
        self.handed_over()
        self.channel.close()


class Zygote:
    """The process that has imported the user's file, from which those of episodes are forked. It begins to import at once.

    If it ends, its episodes end with it. Used by one event loop.
    """

    def __init__(self, frame: bytes, limits: HostLimits) -> None:
        self._limits = limits
        self._process = UserProcess("togi.env.hosted")
        self._channel = self._process.channel
        with contextlib.suppress(OSError):  # a dead process is reported by ``load``
            send(self._channel, frame, limits.start_seconds)
        self._channel.setblocking(False)
        # Those that are asked for, in this order, and those that live.
        self._starting, self._alive = deque[Process](), dict[int, Process]()
        self._reader: asyncio.Task[None] | None = None
        self.turn = asyncio.Lock()
        self.has_ended = False

    @property
    def pid(self) -> int:
        return self._process.pid

    async def load(self) -> Facts:
        """Wait until the file is imported. Raises Complaint if it cannot be used; then this process has ended."""
        limit = self._limits.start_seconds
        try:
            async with asyncio.timeout(limit):
                reply = await receive(self._channel)
            if "complaint" in reply:
                raise Complaint(**reply["complaint"])
            self._reader = asyncio.create_task(self._read())
        except TimeoutError:
            raise Complaint(
                f"took longer than {limit:g} s to import and was killed", "do less work at import"
            ) from None
        except OSError:
            how = ending(self._process.kill())
            raise Complaint(
                f"ended its process at import ({how})", "make the file importable by plain Python"
            ) from None
        finally:
            if self._reader is None:
                self.has_ended = True
                self._process.kill()
        found: dict[str, Any] = reply["answer"]
        tuples: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in found.items()
        }
        return Facts(**tuples)

    def fork(self, process: Process) -> None:
        """Ask for a process, which then starts or ends. One at a time (``turn``), so that the socket always has room for it."""
        try:
            socket.send_fds(self._channel, [b"f"], [process.theirs.fileno(), process.reader.fileno()])
            self._starting.append(process)
        except OSError as error:
            # A process that has just ended shows here first, before ``_read`` has had its turn.
            self.has_ended |= isinstance(error, ConnectionError)
            process.has_ended(str(error))
        process.handed_over()

    async def close(self) -> None:
        """Kill all its processes. Requests in flight fail."""
        if self._reader is None:
            self._process.interrupt()
            return
        with contextlib.suppress(OSError):  # it has ended
            self._channel.shutdown(socket.SHUT_WR)
        await asyncio.wait({self._reader}, timeout=GRACE_SECONDS)
        self._process.interrupt()
        await self._reader

    def discard(self) -> None:
        """Reap this process."""
        self._process.kill()

    async def _read(self) -> None:
        """Read what becomes of the processes until this one ends."""
        try:
            while True:
                match await receive(self._channel):
                    case {"started": pid}:
                        process = self._alive[pid] = self._starting.popleft()
                        process.has_started()
                    case {"refused": why}:
                        self._starting.popleft().has_ended(why)
                    case {"ended": pid, "status": status}:
                        self._alive.pop(pid).has_ended(ending(status))
        except OSError:
            pass
        finally:
            self.has_ended = True
            how = f"the process that starts episodes has ended: {ending(self._process.kill())}"
            for process in (*self._starting, *self._alive.values()):
                process.has_ended(how)


class Episode:
    """One episode: an instance of the user's class in a process of its own. Requests are answered one after the other.

    All but ``reward`` raise EpisodeFailed.
    """

    def __init__(self, process: Process, facts: Facts, limits: HostLimits, shown_as: str, prompt_id: str) -> None:
        self._process, self._facts, self._limits = process, facts, limits
        self._shown_as, self._prompt_id = shown_as, prompt_id
        self._turn = asyncio.Lock()
        # Why nothing more can be asked.
        self._failure = ""

    async def reset(self, row: Mapping[str, Any]) -> list[Message] | str:
        """The first observation, as the user's ``reset`` returns it; no messages for None. ``row``: columns of JSON values."""
        first: list[Message] | str = await self._ask(RESET, "reset()", self._limits.start_seconds, dict(row))
        return first

    async def call(self, name: str, arguments: object) -> Observation:
        """Call a tool. ``arguments``: an object of JSON, as the model wrote it."""
        return Observation(**await self._ask(CALL, f"{name}()", self._limits.tool_seconds, name, arguments))

    async def step(self, action: str) -> Observation:
        """One turn of a game."""
        return Observation(**await self._ask(STEP, "step()", self._limits.tool_seconds, action))

    async def reward(self, answer: str = "") -> Score:
        """The reward; whatever fails is the outcome error. ``answer``: the policy's last text, for a ``reward`` that takes it."""
        if not self._facts.has_reward:
            return Score(Outcome.ABSTAIN, message=f"{self._shown_as} has no reward().")
        try:
            judged = await self._ask(REWARD, "reward()", self._limits.tool_seconds, answer)
        except EpisodeFailed as failure:
            return Score(Outcome.ERROR, message=str(failure))
        if taken := judged["parts"].keys() & RESERVED_COMPONENTS:
            what = f"returned a part of reward() named {min(taken)!r}, as a metric of Togi's own is"
            return Score(Outcome.ERROR, message=self._sentence(what, "use another name"))
        if judged["value"] is None:
            return Score(Outcome.ABSTAIN, message=f"{self._shown_as} abstained.")
        return Score(Outcome.SCORE, value=judged["value"], components=judged["parts"])

    async def end(self) -> None:
        """Have the user's ``close`` called if the process can be asked, and kill it."""
        try:
            if not self._failure:
                await self._ask(CLOSE, "close()", self._limits.tool_seconds)
        except EpisodeFailed as failure:
            logger.warning("%s", failure)
        finally:
            self._process.kill()
            try:
                await asyncio.wait({self._process.ended}, timeout=GRACE_SECONDS)
            finally:
                self._failure = self._failure or self._sentence("has ended this episode", "start another one")
                self._process.close()

    async def _ask(self, what: str, shown_as: str, seconds: float, *arguments: object) -> Any:
        """The answer to one request."""
        loop, frame = asyncio.get_running_loop(), encode({"what": what, "arguments": arguments})
        async with self._turn:
            if self._failure:
                raise EpisodeFailed(self._failure)
            # Whoever is cancelled here leaves a process that still works on it.
            self._failure = self._sentence(f"did not finish {shown_as}", "start another episode")
            try:
                async with asyncio.timeout(seconds):
                    await loop.sock_sendall(self._process.channel, frame)
                    reply = await receive(self._process.channel)
            except TimeoutError:
                late = f"ran longer than {seconds:g} s in {shown_as} and was killed"
                raise self._failed(late, "make it faster or allow more time") from None
            except OSError as error:
                # Who has ended already keeps the status that it has ended with.
                self._process.kill()
                await asyncio.wait({self._process.ended}, timeout=GRACE_SECONDS)
                how = self._process.ended.result() if self._process.ended.done() else str(error)
                died = f"ended its process in {shown_as} ({how})"
                raise self._failed(died, "let it return, within the machine's memory") from None
            self._failure = ""
        if "complaint" in reply:
            complaint = Complaint(**reply["complaint"])
            raise EpisodeFailed(self._sentence(complaint.what, complaint.advice))
        return reply["answer"]

    def _failed(self, what: str, advice: str) -> EpisodeFailed:
        self._process.kill()
        self._failure = self._sentence(what, advice)
        return EpisodeFailed(self._failure)

    def _sentence(self, what: str, advice: str) -> str:
        return f"{self._shown_as} {what} (prompt {self._prompt_id!r}); {advice}."


class EnvironmentHost:
    """A user's class, from which episodes are started. Create it with ``from_file`` or ``from_class``, and ``close`` it.

    The file is imported once, in the background. Used by one event loop.
    """

    def __init__(self, load: Load, shown_as: str, limits: HostLimits) -> None:
        needed, allowed = (
            DESCRIPTORS * limits.processes + OTHER_DESCRIPTORS,
            resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        )
        if allowed not in (resource.RLIM_INFINITY, max(allowed, needed)):
            raise UserError(
                f"{limits.processes} episodes of {shown_as} at once need {needed} open files, and this process may have "
                f"{allowed}; raise the limit (ulimit -n {needed}) or run fewer at once."
            )
        self.shown_as = shown_as
        self._limits = limits
        self._frame = encode({"load": asdict(load), "observation_chars": limits.observation_chars})
        self._zygote = Zygote(self._frame, limits)
        self._facts: Facts | None = None
        self._loading = asyncio.Lock()
        self._slots = asyncio.Semaphore(limits.processes)
        self._is_closed = False

    @classmethod
    def from_file(cls, path: str | Path, name: str, limits: HostLimits = DEFAULT) -> EnvironmentHost:
        """A class of a Python file, which is read once, here. Raises UserError if there is no such file."""
        try:
            load = load_of_file(path, name)
        except Complaint as complaint:
            raise UserError(f"The environment file {path} {complaint}; give --environment FILE.py:Class.") from None
        return cls(load, f"{name} in {path}", limits)

    @classmethod
    def from_class(cls, klass: type[Any], limits: HostLimits = DEFAULT) -> EnvironmentHost:
        """A Python class. Raises UserError if it cannot be sent to a process."""
        shown_as = f"{klass.__qualname__} in {file_of(klass)}"
        try:
            load = load_by_value(klass, klass.__qualname__)
        except Complaint as complaint:
            advice = "move it to the top level of a module or give its file to --environment"
            raise UserError(f"{shown_as} {complaint}; {advice}.") from complaint
        return cls(load, shown_as, limits)

    async def facts(self) -> Facts:
        """What the class offers. Raises UserError if it cannot be used."""
        return (await self._ready())[1]

    @contextlib.asynccontextmanager
    async def episode(self, prompt_id: str) -> AsyncIterator[Episode]:
        """A new process, which is gone when the block is left. ``prompt_id``: of the row, for messages.

        Raises EpisodeFailed if none can be started, and UserError as ``facts`` does.
        """
        process, facts = await self._started(prompt_id)
        episode = Episode(process, facts, self._limits, self.shown_as, prompt_id)
        try:
            yield episode
        finally:
            await episode.end()

    async def close(self) -> None:
        """Kill and reap all processes. Requests in flight end with EpisodeFailed."""
        self._is_closed = True
        await self._zygote.close()
        async with self._loading:  # whoever waits for the import finds it dead
            self._zygote.discard()

    @property
    def zygote_pid(self) -> int:
        """The process that starts episodes."""
        return self._zygote.pid

    async def _ready(self) -> tuple[Zygote, Facts]:
        async with self._loading:
            if self._is_closed:
                raise EpisodeFailed(f"{self.shown_as} is closed and starts no more episodes.")
            if self._zygote.has_ended:
                logger.warning(
                    "The process that starts episodes of %s has ended; another one replaces it.", self.shown_as
                )
                await self._zygote.close()
                self._zygote, self._facts = Zygote(self._frame, self._limits), None
            if self._facts is None:
                try:
                    self._facts = await self._zygote.load()
                except Complaint as complaint:
                    raise UserError(f"{self.shown_as} {complaint}; {complaint.advice}.") from None
            return self._zygote, self._facts

    async def _started(self, prompt_id: str) -> tuple[Process, Facts]:
        """A process from the zygote, or from another one if that has just ended."""
        how = ""
        for _ in range(2):
            zygote, facts = await self._ready()
            await self._slots.acquire()
            process, runs = None, False
            try:
                async with zygote.turn:
                    process = Process()
                    # A place is free again when the process is gone, not before.
                    process.ended.add_done_callback(lambda _: self._slots.release())
                    zygote.fork(process)
                    await process.started
                runs = not process.ended.done()
                if runs:
                    return process, facts
                how = process.ended.result()
            except OSError as error:
                how = str(error)
            finally:
                if process is None:
                    self._slots.release()
                elif not runs:
                    process.close()
        raise EpisodeFailed(
            f"{self.shown_as} could not start a process ({how}) (prompt {prompt_id!r}); run fewer episodes at once."
        )


async def receive(channel: socket.socket) -> dict[str, Any]:
    """Read one message. Raises ConnectionError if the other side is gone or sends what is no message."""
    (length,) = LENGTH.unpack(await _exactly(channel, LENGTH.size))
    if length > LONGEST_FRAME:
        raise ConnectionError(f"it sent a message of {length:,} bytes")
    try:
        message: dict[str, Any] = json.loads(await _exactly(channel, length))
    except ValueError:
        raise ConnectionError("it sent what is no message") from None
    return message


async def _exactly(channel: socket.socket, size: int) -> bytes:
    data, loop = bytearray(), asyncio.get_running_loop()
    while len(data) < size:
        chunk = await loop.sock_recv(channel, min(size - len(data), 1 << 20))
        if not chunk:
            raise ConnectionError("it closed the connection")
        data += chunk
    return bytes(data)
