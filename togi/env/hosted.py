"""The processes of a user's environment: ``python -m togi.env.hosted CHANNEL LIFELINE`` (file descriptors).

This one imports the user's file and says what is in it. Then it forks a process for each episode, so an episode has what was
imported at once, shares its memory, and can be killed alone. The owner (``host``) sends a socket and a lifeline for each, and
kills an episode by closing its lifeline. Whatever ends, all that an episode has started ends with it.

Only JSON crosses, and what is printed goes to stderr. Time limits are the owner's.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import json
import math
import os
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from togi.env.tools import Tool, methods_of, refusal, tool_of
from togi.reward.wire import NO_INDEX, Complaint, Load, LoadKind, checked_number, encode, plain_value, receive, send
from togi.reward.worker import LONGEST_TEXT, accepted, describe, die_with_owner, load_object

# The methods that are no tools, as the user writes them.
RESET, STEP, REWARD, CLOSE = "reset", "step", "reward", "close"
SIGNATURES = {
    RESET: "reset(self, ...) -> str, list of messages or None",
    STEP: "step(self, action: str) -> (observation, reward, done)",
    REWARD: "reward(self) or reward(self, answer: str) -> a number, numbers by name, or None",
    CLOSE: "close(self)",
}
FORM = f"{SIGNATURES[RESET]}, and either public methods as tools or {SIGNATURES[STEP]}"
CALL, DONE, ANSWER = "call", "done", "answer"
# Names that a tool must not have: what they mean to a reader.
TAKEN = {DONE: "the attribute that ends an episode", "get_reward": "the reward is named reward()"}
# The name of a reward that is one number.
WHOLE = "environment"
# A first observation is a prompt, so it is never cut.
LONGEST_PROMPT = 1_000_000
# Names in it are the model's, of any length.
LONGEST_ERROR = 1000
# When memory is short the kernel kills an episode before the processes around it (-1000 to 1000, those have 0).
OUT_OF_MEMORY_SCORE = "500"
ENDED_UNREAPED = os.WEXITED | os.WNOHANG | os.WNOWAIT
REWARD_ADVICE = "return a finite number, finite numbers by name, or None to abstain"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a class offers. ``tools``: their schemas in OpenAI's form. ``is_game``: it has ``step``, and so no tools.

    ``required``, ``optional``: the columns of a row that ``reset`` takes; ``any_column``: it takes all others too.
    """

    tools: tuple[dict[str, Any], ...]
    is_game: bool
    has_reward: bool
    required: tuple[str, ...]
    optional: tuple[str, ...]
    any_column: bool


@dataclass(frozen=True, slots=True)
class Environment:
    """The user's class, and what is in it. ``file``: where it is written, for messages."""

    klass: type[Any]
    file: str
    tools: Mapping[str, Tool]
    facts: Facts
    has_close: bool


def main(channel_fd: int, lifeline_fd: int) -> None:
    """Load the class, report it, then fork episodes until the owner closes the channel."""
    die_with_owner(lifeline_fd)
    channel = socket.socket(fileno=channel_fd)
    with contextlib.suppress(ConnectionError):
        start = receive(channel, math.inf)
        try:
            environment = environment_of(Load(**start["load"]))
        except Complaint as complaint:
            send(channel, encode({"complaint": asdict(complaint)}), math.inf)
            return
        send(channel, encode({"answer": asdict(environment.facts)}), math.inf)
        # What is there by now is never collected, so that forks do not copy its pages.
        gc.collect()
        gc.freeze()
        if descriptors := Forks(channel).run():
            os.close(lifeline_fd)
            ours, lifeline = descriptors
            play(environment, ours, lifeline, start["observation_chars"])
            # What was registered at import to run at exit belongs to the process that imported it.
            os._exit(0)


def environment_of(load: Load) -> Environment:
    """The class, with its tools. Raises Complaint if it cannot be used."""
    advice = f"define class {load.name} with {FORM}"
    klass = load_object(load, "class", inspect.isclass, advice)
    if not inspect.isclass(klass):
        raise refusal(f"is of type {type(klass).__name__}, not a class", advice)
    if threading.active_count() > 1:
        sys.stderr.write(
            f"{load.name}: importing it has started threads, which no episode has: start them in reset().\n"
        )
    methods = methods_of(klass)
    if RESET not in methods:
        raise refusal(f"has no method {RESET}", advice)
    try:
        inspect.signature(klass).bind()
    except TypeError as error:
        raise refusal(
            f"has a constructor with arguments ({error})", "take what differs between rows in reset()"
        ) from None
    for name, arguments in ((STEP, ("",)), (REWARD, ()), (CLOSE, ())):
        judges = name == REWARD and name in methods and [one.name for one in methods[name].parameters] == [ANSWER]
        if name in methods and not (judges or methods[name].takes(*arguments)):
            what = f"has a method {methods[name]} that cannot be called with {len(arguments)} arguments"
            raise refusal(what, f"define {SIGNATURES[name]}")
    if not (wanted := methods.keys() - SIGNATURES.keys()) and STEP not in methods:
        raise refusal(f"has no public method that could be a tool, and no {STEP}", f"define {FORM}")
    for name, meant in TAKEN.items():
        if name in wanted and STEP not in methods:
            raise refusal(f"has a tool {methods[name]}, a name that is taken: {meant}", "rename the tool")
    tools = {name: tool_of(method) for name, method in methods.items() if name in wanted and STEP not in methods}
    schemas, reset = tuple(tool.schema for tool in tools.values()), methods[RESET].parameters
    named = [one for one in reset if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    facts = Facts(
        schemas,
        STEP in methods,
        REWARD in methods,
        tuple(one.name for one in named if one.default is one.empty),
        tuple(one.name for one in named if one.default is not one.empty),
        any(one.kind is one.VAR_KEYWORD for one in reset),
    )
    file = load.source if load.kind == LoadKind.FILE else methods[RESET].function.__code__.co_filename
    return Environment(klass, file, tools, facts, CLOSE in methods)


# The process that forks.


class Forks:
    """The processes of episodes that live, each with its lifeline. ``channel``: to the owner."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel, self._lifelines, self._poll = channel, dict[int, int](), selectors.PollSelector()
        # Python writes to it when a child ends.
        self._bell, self._ringer = socket.socketpair()
        for end in (self._bell, self._ringer):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._ringer.fileno(), warn_on_full_buffer=False)
        for readable in (channel, self._bell):
            self._poll.register(readable, selectors.EVENT_READ)

    def run(self) -> list[int]:
        """Fork a process for each socket and lifeline that come. Returns in each of them with these two.

        Here it returns an empty list once the owner has closed the channel and all are dead.
        """
        while True:
            for key, _ in self._poll.select():
                if key.fileobj is self._bell:
                    self._bell.recv(1 << 16)
                    for pid in [pid for pid in self._lifelines if os.waitid(os.P_PID, pid, ENDED_UNREAPED)]:
                        self._reap(pid)
                elif key.fileobj is not self._channel:
                    if key.data not in self._lifelines:
                        continue  # reaped since the select, when it ended by itself
                    # The owner has closed a lifeline. It stays readable, so it is not asked again.
                    self._poll.unregister(key.fileobj)
                    _kill(key.data)
                else:
                    data, descriptors, _, _ = socket.recv_fds(self._channel, 1, 2)
                    if not data:
                        for pid in [*self._lifelines]:
                            self._reap(pid)
                        return []
                    if self._fork(descriptors):
                        return descriptors

    def _fork(self, descriptors: list[int]) -> bool:
        """Whether this is the new process."""
        try:
            ours, lifeline = descriptors
            pid = os.fork()
        except (OSError, ValueError) as error:  # ValueError: there was no room for both
            for descriptor in descriptors:
                os.close(descriptor)
            self._say({"refused": str(error)})
            return False
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self._bell, self._ringer, self._channel):
                end.close()
            for other in self._lifelines.values():
                os.close(other)
            return True
        os.close(ours)
        self._lifelines[pid] = lifeline
        self._poll.register(lifeline, selectors.EVENT_READ, pid)
        self._say({"started": pid})
        return False

    def _reap(self, pid: int) -> None:
        """Kill a child and what it has started, while its id is still its own; reap and report it."""
        _kill(pid)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        lifeline = self._lifelines.pop(pid)
        with contextlib.suppress(KeyError):  # the owner has closed its end before
            self._poll.unregister(lifeline)
        os.close(lifeline)
        self._say({"ended": pid, "status": status})

    def _say(self, message: Mapping[str, object]) -> None:
        send(self._channel, encode(message), math.inf)


def _kill(pid: int) -> None:
    """Kill a child that is not reaped, and the group that it leads as soon as it runs."""
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


# The process of an episode.


def play(environment: Environment, channel_fd: int, lifeline_fd: int, observation_chars: int) -> None:
    """Answer requests about one instance until the owner closes the socket."""
    os.setsid()
    die_with_owner(lifeline_fd)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OUT_OF_MEMORY_SCORE)
    # A fork has the state of its parent's generators. Python seeds its own anew.
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.seed()
    channel = socket.socket(fileno=channel_fd)
    with asyncio.Runner() as runner, contextlib.suppress(ConnectionError):
        instance = Instance(environment, observation_chars, runner)
        while True:
            send(channel, encode(instance.reply(receive(channel, math.inf))), math.inf)


class Instance:
    """One instance of the user's class, and what it is asked."""

    def __init__(self, environment: Environment, observation_chars: int, runner: asyncio.Runner) -> None:
        self._environment, self._observation_chars, self._runner = environment, observation_chars, runner
        self._object: Any = None
        self._asked: dict[str, Callable[..., object]] = {
            RESET: self._reset,
            CALL: self._call,
            STEP: self._step,
            REWARD: self._reward,
            CLOSE: self._close,
        }

    def reply(self, request: Mapping[str, Any]) -> dict[str, object]:
        """The answer to a request, or why there is none."""
        what = request["what"]
        try:
            return {"answer": self._asked[what](*request["arguments"])}
        except Complaint as complaint:
            return {"complaint": asdict(complaint)}
        except BaseException as error:  # noqa: BLE001  user code may raise anything, SystemExit included
            said = f"raised {describe(error, self._environment.file)} in {what}()"
            return {"complaint": asdict(Complaint(said, "correct the method"))}

    def _result(self, method: str, *arguments: object, **named: object) -> Any:
        """What a method returns, awaited if it has to be."""
        returned = getattr(self._object, method)(*arguments, **named)
        return self._runner.run(_wait(returned)) if inspect.isawaitable(returned) else returned

    def _reset(self, row: dict[str, object]) -> object:
        if missing := [name for name in self._environment.facts.required if name not in row]:
            what = f"needs the column {', '.join(map(repr, missing))} in reset(), which the row lacks"
            raise Complaint(what, "name the argument as a column of the rows, or give it a default")
        self._object = self._environment.klass()
        first = self._result(RESET, **accepted(self._object.reset, row))
        if first is None:
            return []  # the row has the prompt
        if isinstance(first, str):
            checked, size = _valid(first), len(first)
        elif isinstance(first, list) and first and all(isinstance(one, dict) and "role" in one for one in first):
            try:
                text = _json(first)
            except (TypeError, ValueError, RecursionError) as error:
                raise Complaint(f"returned messages from reset() that are not JSON ({error})", "use texts") from None
            checked, size = json.loads(_valid(text)), len(text)
        else:
            advice = "return the first observation as a string or a list of messages with role and content, or None"
            raise Complaint(f"returned a value of type {type(first).__name__} from reset()", advice)
        if size > LONGEST_PROMPT:
            raise Complaint(f"returned {size:,} characters from reset(), more than {LONGEST_PROMPT:,}", "return less")
        return checked

    def _call(self, name: str, arguments: object) -> dict[str, object]:
        tool = self._environment.tools.get(name)
        try:
            if tool is None:
                raise ValueError(f"there is no tool {name!r}, only {', '.join(self._environment.tools)}")
            checked = tool.checked(arguments)
        except ValueError as fault:
            return self._observed(f"Error: {fault}", self._is_done(), str(fault))
        error = ""
        try:
            returned = self._result(name, **checked)
            text = returned if isinstance(returned, str) else _json(returned)
        except BaseException as raised:  # noqa: BLE001  what a tool raises is for the model
            text = f"Error: {type(raised).__name__}: {' '.join(str(raised).split())[:LONGEST_TEXT]}".removesuffix(": ")
            error = f"{name}() raised {describe(raised, self._environment.file)}"
        return self._observed(text, self._is_done(), error)

    def _step(self, action: str) -> dict[str, object]:
        returned, advice = self._result(STEP, action), "return (observation, reward or None, done)"
        if not isinstance(returned, tuple | list) or len(returned) != 3:
            size = f" of {len(returned)}" if isinstance(returned, tuple | list) else ""
            raise Complaint(f"returned a value of type {type(returned).__name__}{size} from step()", advice)
        observation, reward, done = returned
        number = _number(reward, "the reward of step()")
        text = observation if isinstance(observation, str) else _json(observation)
        return self._observed(text, _bool(done, "done from step()"), "") | {"reward": number}

    def _reward(self, answer: str) -> dict[str, object]:
        returned = self._result(REWARD, **accepted(self._object.reward, {ANSWER: answer}))
        if not isinstance(returned, Mapping):
            value = _number(returned, "reward()")
            return {"value": value, "parts": {} if value is None else {WHOLE: value}}
        parts = {name: _number(value, f"part {name!r} of reward()") for name, value in returned.items()}
        numbers = [value for value in parts.values() if value is not None]
        if not numbers or len(numbers) < len(parts) or not all(isinstance(name, str) for name in parts):
            raise Complaint("returned parts of reward() that are not numbers with names", REWARD_ADVICE)
        return {"value": _number(sum(numbers), "the sum of reward()"), "parts": parts}

    def _close(self) -> None:
        try:
            if self._object is not None and self._environment.has_close:
                self._result(CLOSE)
        finally:
            # What the user holds for the episode, such as a temporary folder, is given back with it.
            self._object = None
            gc.collect()

    def _is_done(self) -> bool:
        return _bool(getattr(self._object, DONE, False), f"the attribute {DONE}")

    def _observed(self, text: str, done: bool, error: str) -> dict[str, object]:
        limit = self._observation_chars
        left_out = max(len(text) - limit, 0)
        if left_out:
            head, tail = text[: limit - limit // 2], text[len(text) - limit // 2 :]
            text = f"{head}\n[... {left_out} characters left out ...]\n{tail}"
        return {"text": _valid(text), "done": done, "error": _valid(error[:LONGEST_ERROR]), "left_out": left_out}


async def _wait(awaitable: Awaitable[object]) -> object:
    return await awaitable


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_listed)


def _listed(value: object) -> object:
    """An array or its scalar as lists and numbers."""
    plain = plain_value(value)
    if plain is value:
        raise TypeError(f"a {type(value).__name__} is not JSON")
    return plain


def _valid(text: str) -> str:
    """Without halves of characters, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def _number(value: object, what: str) -> float | None:
    try:
        return checked_number(value, what, NO_INDEX)
    except Complaint as complaint:
        raise Complaint(complaint.what, REWARD_ADVICE) from None


def _bool(value: object, what: str) -> bool:
    plain = plain_value(value)
    if not isinstance(plain, bool):
        raise Complaint(f"has a value of type {type(value).__name__} as {what}", "use True or False")
    return plain


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
