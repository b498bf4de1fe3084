"""The process that runs a user's reward function: ``python -m togi.reward.worker CHANNEL LIFELINE`` (file descriptors).

Standard library only, so that it starts in a tenth of a second; all other imports are the user's. The function runs in the main
thread (so its own alarms work). Its output goes to stderr, never into the protocol. The owner (``function``) enforces time
limits: it kills this process together with its process group.
"""

import asyncio
import base64
import contextlib
import fcntl
import functools
import importlib.util
import inspect
import linecache
import math
import os
import pickle
import select
import signal
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict
from pathlib import Path

from togi.reward.wire import OPTIONAL_ARGUMENTS, Call, Complaint, Load, LoadKind, checked, encode, receive, send

MODULE_NAME = "togi_user_file"
FORM = "(queries, prompts, labels, **kwargs)"
LONGEST_TEXT = 300

Function = Callable[..., object]


def main(channel_fd: int, lifeline_fd: int) -> None:
    """Load the function, report it, then answer calls until the owner closes the channel."""
    die_with_owner(lifeline_fd)
    channel = socket.socket(fileno=channel_fd)
    with contextlib.suppress(ConnectionError):
        # The first reply is about the import: an empty answer, or why it failed.
        try:
            function = load_function(Load(**receive(channel, math.inf)))
        except Complaint as complaint:
            send(channel, encode({"complaint": asdict(complaint)}), math.inf)
            return
        send(channel, encode({"answer": {}}), math.inf)
        # One event loop for all calls, so that an async function can keep its connections.
        with asyncio.Runner() as runner:
            while True:
                send(channel, encode(reply(function, receive(channel, math.inf), runner.run)), math.inf)


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


def load_function(load: Load) -> Function:
    """The function. Raises Complaint if it cannot be used."""
    advice = f"define {load.name}{FORM}"
    found = load_object(load, "function", inspect.isfunction, advice)
    if not callable(found):
        raise Complaint(f"is of type {type(found).__name__}, not a function", advice, during_call=False)
    try:
        inspect.signature(found).bind([], [], [], **accepted(found, {name: [] for name in OPTIONAL_ARGUMENTS}))
    except TypeError as error:
        what = f"cannot be called with queries, prompts and labels ({error})"
        raise Complaint(what, advice, during_call=False) from None
    except ValueError:  # a callable in C has no signature to check; the first call will show
        pass
    return found


def load_object(load: Load, kind: str, is_kind: Callable[[object], bool], advice: str) -> object:
    """What is loaded. Raises Complaint if it cannot be imported, or is not there: the things of its kind that are, are named."""
    try:
        return _find(load, kind, is_kind, advice)
    except Complaint:
        raise
    except BaseException as error:
        # the user's module may raise anything, SystemExit included
        what = f"cannot be imported: {describe(error, load.source)}"
        raise Complaint(what, "make the file importable by plain Python", during_call=False) from error


def _find(load: Load, kind: str, is_kind: Callable[[object], bool], advice: str) -> object:
    if load.kind == LoadKind.PICKLE:
        # Bytes that the parent process has just made and sent over a private socket.
        return pickle.loads(base64.b64decode(load.source))  # noqa: S301
    if load.kind == LoadKind.MODULE:
        found: object = importlib.import_module(load.source)
        for part in load.name.split("."):
            found = getattr(found, part)
        return functools.partial(found, **load.settings) if load.settings and callable(found) else found
    path = Path(load.source)
    sys.path.insert(0, str(path.parent))  # as for a script: the file may import modules beside it
    spec = importlib.util.spec_from_file_location(MODULE_NAME, path)
    assert spec is not None, "the owner checked that the path ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE_NAME] = module
    content = base64.b64decode(load.content)
    code = compile(content, load.source, "exec", dont_inherit=True)
    # Tracebacks show the lines that run, not those of a file that was edited since.
    text = importlib.util.decode_source(content)
    linecache.cache[load.source] = (len(text), None, text.splitlines(keepends=True), load.source)
    exec(code, vars(module))  # noqa: S102  the file of the user, as an import runs it
    if not hasattr(module, load.name):
        there = [name for name, value in vars(module).items() if is_kind(value)]
        what = f"does not exist: the file defines {', '.join(there) or f'no {kind}'}"
        raise Complaint(what, advice, during_call=False)
    return getattr(module, load.name)


def reply(
    function: Function, call: Call, run: Callable[[Coroutine[object, object, object]], object]
) -> dict[str, object]:
    """The message about a call of the function on one group. ``run`` runs a coroutine to its end."""
    queries, prompts, labels = (call.pop(name) for name in ("queries", "prompts", "labels"))
    try:
        returned = function(queries, prompts, labels, **accepted(function, call))
        if inspect.isawaitable(returned):
            returned = run(_wait(returned))
        return {"answer": checked(returned, len(queries))}
    except Complaint as complaint:
        return {"complaint": asdict(complaint)}
    except BaseException as error:  # noqa: BLE001  user code may raise anything, SystemExit included
        file = inspect.unwrap(function).__code__.co_filename if inspect.isfunction(function) else ""
        is_transient = isinstance(error, OSError)  # the network and its like
        return {
            "complaint": asdict(
                Complaint(f"raised {describe(error, file)}", "correct the function", is_transient=is_transient)
            )
        }


async def _wait(awaitable: Awaitable[object]) -> object:
    return await awaitable


def accepted(function: Function, optional: Call) -> Call:
    """The optional keyword arguments that the function's signature accepts."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return {}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return optional
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
