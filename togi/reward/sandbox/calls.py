"""Remote calls between tests and tested code in two processes. Only plain values cross.

``serve`` holds the tested code and answers calls of its functions. ``judge`` runs the tests; a name that the tests do not define
stands for the other side's. So the tested code cannot reach the tests, the comparisons or the verdict: whatever it does in its
process, the tests see returned values of built-in types, or an exception.

Plain values: None, bool, int, float, complex, str, bytes, and lists, tuples, sets, frozensets and dicts of them. No subclasses,
because their ``==`` could return anything. Changes of a call to its list, dict and set arguments are copied back.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, TextIO

LONGEST_MESSAGE = 1 << 22
SEQUENCES = (list, tuple, set, frozenset)
# How each type of scalars is written, and read.
SCALARS: dict[type, tuple[Callable[..., str], Callable[..., object]]] = {
    int: (hex, lambda text: int(text, 16)),
    float: (repr, float),
    complex: (repr, complex),
    bytes: (bytes.hex, bytes.fromhex),
}
PASSED, FAILED, UNUSABLE = "1", "0", "?"

Message = dict[str, Any]
"""Parsed JSON, as this side or the other one wrote it."""


class NotPlainError(Exception):
    """A value that cannot cross."""


class OtherSideError(Exception):
    """The tested code raised an exception, ended, or sent an invalid message."""


class Remote:
    """A function of the other side."""

    def __init__(self, name: str, channel: Channel) -> None:
        self.name = name
        self._channel = channel

    def __call__(self, *args: object, **kwargs: object) -> object:
        request = {
            "call": self.name,
            "args": [pack(value) for value in args],
            "kwargs": {name: pack(value) for name, value in kwargs.items()},
        }
        reply = self._channel.ask(request)
        if "raised" in reply:
            raise _as_exception(str(reply["raised"]))
        try:
            value, after = unpack(reply["value"]), [unpack(each) for each in reply["args"]]
        except (KeyError, TypeError, ValueError, RecursionError):
            raise OtherSideError("an answer that is none") from None
        # The call may have changed its arguments in place.
        for ours, theirs in zip(args, after, strict=False):
            _make_equal(ours, theirs)
        return value


class Channel:
    """JSON objects over two pipes, one per line."""

    def __init__(self, reader: BinaryIO, writer: BinaryIO) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    def take(cls) -> Channel:
        """Take over standard input and output, and redirect both to /dev/null: printed text must not mix with messages."""
        reader, writer = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1):
            os.dup2(null, number)
        return cls(reader, writer)

    def say(self, message: Message) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")
        self._writer.flush()

    def hear(self) -> Message:
        """Read a message. Raises OtherSideError if the other side has ended or sent an invalid one."""
        line = self._reader.readline(LONGEST_MESSAGE)
        try:
            message = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise OtherSideError("the other side is gone")
        return message

    def ask(self, message: Message) -> Message:
        try:
            self.say(message)
        except OSError:
            raise OtherSideError("the other side is gone") from None
        return self.hear()


def pack(value: object) -> object:
    """A plain value as JSON that keeps its type. Raises NotPlainError."""
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if isinstance(value, Remote):
        return {"name": value.name}
    if kind in SCALARS:
        return {kind.__name__: SCALARS[kind][0](value)}
    if kind in SEQUENCES and isinstance(value, SEQUENCES):
        return {kind.__name__: [pack(item) for item in value]}
    if kind is dict and isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    raise NotPlainError(f"a value of type {kind.__name__} does not cross")


def unpack(packed: object) -> Any:
    """The plain value of packed JSON. Raises ValueError, TypeError or RecursionError if it is invalid."""
    if packed is None or isinstance(packed, bool | str):
        return packed
    if not isinstance(packed, dict) or len(packed) != 1:
        raise ValueError("no plain value")
    name, content = next(iter(packed.items()))
    if name == "dict":
        return {unpack(key): unpack(item) for key, item in content}
    for kind in SEQUENCES:
        if name == kind.__name__:
            return kind([unpack(item) for item in content])
    for scalar, (_, read) in SCALARS.items():
        if name == scalar.__name__:
            return read(content)
    raise ValueError(f"{name} is no plain value")


def _make_equal(ours: Any, theirs: Any) -> None:
    """Copy the changes of a call's argument back to ours."""
    if type(ours) is not type(theirs):
        return
    if isinstance(ours, list):
        ours[:] = theirs
    elif isinstance(ours, dict | set):
        ours.clear()
        ours.update(theirs)


def _as_exception(name: str) -> Exception:
    kind = vars(builtins).get(name)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(TypeError):  # a few exceptions need more than a text
            return kind("raised by the tested code")
    return OtherSideError(name)


def serve(code: str, channel: Channel) -> None:
    """Run the tested code, then answer calls until the judge closes the channel."""
    namespace: dict[str, Any] = {"__name__": "answer"}
    exec(compile(code, "<answer>", "exec"), namespace)  # noqa: S102  what this process is for
    wanted = channel.hear()["describe"]
    channel.say({"names": {name: _described(namespace[name]) for name in wanted if name in namespace}})
    while True:
        request = channel.hear()
        channel.say(_answer(request, namespace))


def _described(value: object) -> Message:
    """The value of a constant; empty for what can be called."""
    try:
        return {"value": pack(value)}
    except (NotPlainError, RecursionError):
        return {}


def _answer(request: Message, namespace: Message) -> Message:
    def argument(packed: object) -> object:
        return namespace[packed["name"]] if isinstance(packed, dict) and "name" in packed else unpack(packed)

    try:
        args = [argument(packed) for packed in request["args"]]
        kwargs = {name: argument(packed) for name, packed in request["kwargs"].items()}
        value = pack(namespace[request["call"]](*args, **kwargs))
        after = [
            None if isinstance(packed, dict) and "name" in packed else pack(arg)
            for packed, arg in zip(request["args"], args, strict=True)
        ]
    except Exception as error:  # noqa: BLE001  the tested code may raise anything
        return {"raised": type(error).__name__}
    return {"value": value, "args": after}


def judge(setup: str, tests: Sequence[str], channel: Channel, verdict: TextIO) -> None:
    """Run the tests in order in one namespace, and write one character per test as soon as it is known.

    ``setup`` runs before the other side is connected, so that it cannot depend on it.
    """
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(setup, "<setup>", "exec"), namespace)  # noqa: S102
    except Exception:  # noqa: BLE001  whatever it is, the label is at fault
        verdict.write(UNUSABLE * len(tests))
        verdict.flush()
        return
    _bind(namespace, tests, channel)
    for number, test in enumerate(tests):
        try:
            exec(compile(test, f"<test {number}>", "exec"), namespace)  # noqa: S102
            outcome = PASSED
        except NotPlainError:  # raised on our side only: the test passes an argument that cannot cross
            outcome = UNUSABLE
        except Exception:  # noqa: BLE001  a test fails by whatever exception
            outcome = FAILED
        verdict.write(outcome)
        verdict.flush()


def _bind(namespace: Message, tests: Sequence[str], channel: Channel) -> None:
    """Define the names that the tests use but do not define: standard library modules, then the other side's names."""
    wanted = free_names(tests) - namespace.keys()
    modules = wanted & sys.stdlib_module_names
    namespace.update({name: __import__(name) for name in modules})
    try:
        names = channel.ask({"describe": sorted(wanted - modules)})["names"]
        for name in (wanted - modules) & names.keys():
            namespace[name] = unpack(names[name]["value"]) if "value" in names[name] else Remote(name, channel)
    except (OtherSideError, AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return  # the tested code has ended or sends invalid messages: every test that needs it fails


def free_names(tests: Sequence[str]) -> set[str]:
    """Names that tests read but neither define nor import, and that are not built-ins."""
    read: set[str] = set()
    own = set(vars(builtins))
    for node in (node for test in tests for node in ast.walk(ast.parse(test))):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                read.add(name)
            case (
                ast.Name(id=name)
                | ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.ClassDef(name=name)
                | ast.arg(arg=name)
                | ast.ExceptHandler(name=str(name))
            ):
                own.add(name)
            case ast.alias():
                own.add((node.asname or node.name).split(".")[0])
    return read - own
