"""The process that holds a user's agent: ``python -m togi.env.agent_process CHANNEL LIFELINE`` (file descriptors).

It imports the user's file once and forks a process for each episode, so none waits for imports. The owner (``agent``) sends a
socket and a lifeline for each, and kills an episode, with all that it started, by closing its lifeline.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict

from togi.reward.wire import Complaint, Load, encode, per_query, receive, send
from togi.reward.worker import describe, die_with_owner, load_object

FORM = "(base_url, task, api_key)"
RETURNED = 'return a number, {"reward": a number, and others by name}, or None to abstain'
Agent = Callable[..., object]


def main(channel_fd: int, lifeline_fd: int) -> None:
    """Load the agent, report it, then fork episodes until the owner closes the channel."""
    die_with_owner(lifeline_fd)
    channel = socket.socket(fileno=channel_fd)
    start = receive(channel, math.inf)
    try:
        agent = command(start["command"]) if "command" in start else function(Load(**start["load"]))
    except Complaint as complaint:
        send(channel, encode({"complaint": asdict(complaint)}), math.inf)
        return
    send(channel, encode({"answer": {}}), math.inf)
    # Nobody waits for these children: the kernel reaps them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        _, descriptors, _, _ = socket.recv_fds(channel, 1, 2)
        if not descriptors:  # the owner is gone
            return
        if os.fork() == 0:
            channel.close()
            os.close(lifeline_fd)
            episode(agent, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def episode(agent: Agent, channel_fd: int, lifeline_fd: int) -> None:
    """The life of a forked process: one call of the agent."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    die_with_owner(lifeline_fd)
    random.seed()
    channel = socket.socket(fileno=channel_fd)
    asked = receive(channel, math.inf)
    os.environ |= {"OPENAI_BASE_URL": asked["base_url"], "OPENAI_API_KEY": asked["api_key"]}
    # Requests to this machine do not leave it, whatever proxy it has for others.
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))
    try:
        returned = agent(asked["base_url"], asked["task"], asked["api_key"])
        if inspect.iscoroutine(returned):
            returned = asyncio.run(returned)
        reply: dict[str, object] = {"answer": checked(returned)}
    except Complaint as complaint:
        reply = {"complaint": asdict(complaint)}
    except BaseException as error:  # noqa: BLE001  the user's code may raise anything, SystemExit included
        file = inspect.unwrap(agent).__code__.co_filename if inspect.isfunction(agent) else ""
        reply = {"complaint": asdict(Complaint(f"raised {describe(error, file)}", "correct it"))}
    send(channel, encode(reply), math.inf)
    sys.stderr.flush()
    os._exit(0)


def function(load: Load) -> Agent:
    """The user's function, to be called with three arguments. Raises Complaint."""
    advice = f"define {load.name}{FORM}"
    found = load_object(load, "function", inspect.isfunction, advice)
    if not callable(found):
        raise Complaint(f"is of type {type(found).__name__}, not a function", advice, during_call=False)
    call: Agent = found

    @functools.wraps(call)
    def without_key(base_url: str, task: object, _: str) -> object:
        return call(base_url, task)

    for agent, arguments in ((call, 3), (without_key, 2)):
        with contextlib.suppress(TypeError):
            inspect.signature(call).bind(*range(arguments))
            return agent
    raise Complaint("cannot be called with a base URL, a task and a key", advice, during_call=False)


def command(line: str) -> Agent:
    """A program that gets the task as JSON on its standard input, and whose last line of output is the reward."""

    def run(base_url: str, task: object, api_key: str) -> object:
        given = json.dumps(task).encode()
        done = subprocess.run(["/bin/sh", "-c", line], input=given, stdout=subprocess.PIPE, check=False)
        if done.returncode != 0:
            raise Complaint(f"ended with exit code {done.returncode}", "let it end with 0")
        lines = done.stdout.decode(errors="replace").strip().splitlines()
        try:
            return json.loads(lines[-1] if lines else "")
        except ValueError:
            last = repr(lines[-1][:80]) if lines else "nothing"
            raise Complaint(f"printed {last} as its last line", "print the reward as JSON in the last line") from None

    return run


def checked(returned: object) -> dict[str, float | None]:
    """The reward, and other numbers by their names. Raises Complaint."""
    named = returned if isinstance(returned, Mapping) else {"reward": returned}
    if "reward" not in named or not all(isinstance(name, str) for name in named):
        raise Complaint(f"returned a dict with the keys {list(named)}", RETURNED)
    try:
        # A missing value is not looked at as a list.
        return {name: None if value is None else per_query(value, 1, repr(name))[0] for name, value in named.items()}
    except Complaint as complaint:
        raise Complaint(complaint.what, RETURNED) from None


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
