"""The process that runs a user's reward function: ``python -m togi.reward.worker CHANNEL LIFELINE`` (file descriptors).

Standard library only, so that it starts in a tenth of a second; all other imports are the user's. The function runs in the main
thread (so its own alarms work). Its output goes to stderr, never into the protocol. The owner (``function``) enforces time
limits: it kills this process together with its process group.
"""

from __future__ import annotations

import asyncio
import base64
import fcntl
import functools
import importlib
import importlib.util
import inspect
import math
import os
import pickle
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from togi.reward.wire import (
    OPTIONAL_ARGUMENTS,
    Answer,
    BadReturnError,
    Call,
    Complaint,
    Load,
    LoadKind,
    checked,
    encode,
    receive,
    send,
)

MODULE_NAME = "togi_user_reward"
FORM = "(queries, prompts, labels, **kwargs)"
LONGEST_TEXT = 300

Function = Callable[..., Any]


class NotDefinedError(Exception):
    """The file has no function of the right name."""


def main(channel_fd: int, lifeline_fd: int) -> None:
    """Load the function, report it, then answer calls until the owner closes the channel."""
    die_with_owner(lifeline_fd)
    channel = socket.socket(fileno=channel_fd)
    try:
        message = receive(channel, math.inf)
        load = Load(LoadKind(message["kind"]), message["source"], message["name"], message["settings"])
        # The first reply is about the import: an empty answer, or why it failed.
        function = load_function(load)
        if isinstance(function, Complaint):
            send(channel, encode(function), math.inf)
            return
        send(channel, encode(Answer()), math.inf)
        # One event loop for all calls, so that an async function can keep its connections.
        with asyncio.Runner() as runner:
            while True:
                message = receive(channel, math.inf)
                call = Call(message["queries"], message["prompts"], message["labels"], message["optional"])
                send(channel, encode(answer(function, call, runner.run)), math.inf)
    except ConnectionError:
        return


def die_with_owner(lifeline_fd: int) -> None:
    """Have the kernel end this whole process group (SIGIO) when the owner's end of the lifeline pipe closes.

    Unlike a watching thread this works while C code holds the interpreter lock. Unlike PR_SET_PDEATHSIG it reaches what the user's
    function started, and does not depend on which of the owner's threads started this process.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, fcntl.fcntl(lifeline_fd, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline_fd], [], [], 0)[0]:  # it closed before O_ASYNC was set
        os._exit(1)


def load_function(load: Load) -> Function | Complaint:
    """The function, or why it cannot be used."""
    define = f"define {load.name}{FORM}"
    try:
        found = _find(load)
    except NotDefinedError as error:
        return Complaint(str(error), define, during_call=False)
    except BaseException as error:  # noqa: BLE001  the user's module may raise anything, SystemExit included
        what = f"cannot be imported: {describe(error, load.source)}"
        return Complaint(what, "make the file importable by plain Python", during_call=False)
    if not callable(found):
        return Complaint(f"is of type {type(found).__name__}, not a function", define, during_call=False)
    try:
        inspect.signature(found).bind([], [], [], **accepted(found, {name: [] for name in OPTIONAL_ARGUMENTS}))
    except TypeError as error:
        what = f"cannot be called with queries, prompts and labels ({error})"
        return Complaint(what, define, during_call=False)
    except ValueError:  # a callable in C has no signature to check; the first call will show
        pass
    function: Function = found
    return function


def _find(load: Load) -> Any:
    if load.kind is LoadKind.PICKLE:
        # Bytes that the parent process has just made and sent over a private socket.
        return pickle.loads(base64.b64decode(load.source))  # noqa: S301
    if load.kind is LoadKind.MODULE:
        found: Any = importlib.import_module(load.source)
        for part in load.name.split("."):
            found = getattr(found, part)
        return functools.partial(found, **load.settings) if load.settings else found
    path = Path(load.source)
    sys.path.insert(0, str(path.parent))  # as for a script: the file may import modules beside it
    spec = importlib.util.spec_from_file_location(MODULE_NAME, path)
    assert spec is not None and spec.loader is not None, "the owner checked that the path ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE_NAME] = module
    spec.loader.exec_module(module)
    if not hasattr(module, load.name):
        functions = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise NotDefinedError(f"does not exist: the file defines {', '.join(functions) or 'no function'}")
    return getattr(module, load.name)


def answer(function: Function, call: Call, run: Callable[[Any], Any]) -> Answer | Complaint:
    """Call the function on one group. ``run`` runs a coroutine to its end."""
    try:
        returned = function(call.queries, call.prompts, call.labels, **accepted(function, call.optional))
        if inspect.isawaitable(returned):
            returned = run(_wait(returned))
        return checked(returned, len(call.queries))
    except BadReturnError as error:
        return Complaint(error.what, error.advice, error.index)
    except BaseException as error:  # noqa: BLE001  user code may raise anything, SystemExit included
        file = inspect.unwrap(function).__code__.co_filename if inspect.isfunction(function) else ""
        what = f"raised {describe(error, file)}"
        return Complaint(
            what, "correct the function", is_transient=isinstance(error, OSError)
        )  # the network and its like


async def _wait(awaitable: Any) -> Any:
    return await awaitable


def accepted(function: Function, optional: Mapping[str, Sequence[str | int]]) -> dict[str, Sequence[str | int]]:
    """The optional keyword arguments that the function's signature accepts."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return {}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(optional)
    return {name: values for name, values in optional.items() if name in parameters}


def describe(error: BaseException, file: str) -> str:
    """An exception as one line: type, text, and the innermost line of the user's file that it passed through."""
    text = " ".join(str(error).split())[:LONGEST_TEXT]
    name = type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{name}: {text}"  # the text already ends in file and line
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if frame.filename == file]
    line = ""
    for frame in own[-1:] or frames[-1:]:
        place = f"line {frame.lineno}" if own else f"line {frame.lineno} of {frame.filename}"
        line = f" at {place} ({frame.line})" if frame.line else f" at {place}"
    return f"{name}: {text}{line}" if text else f"{name}{line}"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
