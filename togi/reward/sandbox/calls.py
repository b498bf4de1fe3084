"""Tests on this side, the tested code on another: calls cross between two processes, and only plain values with them.

``serve`` holds the tested code and answers calls of what it defines. ``judge`` runs the tests, in which a name that is not their
own stands for the other side's. So the code under test cannot reach the tests, what compares, or the verdict: whatever it does
in its process, the tests see values of built-in types that it returned, or an exception.

Plain values: None, bool, int, float, complex, str, bytes, and lists, tuples, sets, frozensets and dicts of them; no
subclasses, whose ``==`` could say anything. What a call changed in its list, dict and set arguments is changed here too.
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
SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
SCALARS: dict[type, Callable[[Any], str]] = {int: hex, float: repr, complex: repr, bytes: bytes.hex}
PASSED, FAILED, UNUSABLE = "1", "0", "?"


class NotPlainError(Exception):
    """A value that does not cross."""


class OtherSideError(Exception):
    """The tested code raised something, ended, or said what nobody understands."""


class Remote:
    """A function of the other side."""

    def __init__(self, name: str, channel: Channel) -> None:
        self._name = name
        self._channel = channel

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = {
            "call": self._name,
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
        for ours, theirs in zip(args, after, strict=False):
            _make_equal(ours, theirs)
        return value

    @property
    def packed(self) -> dict[str, str]:
        return {"name": self._name}


class Channel:
    """One JSON object a line, either way."""

    def __init__(self, reader: BinaryIO, writer: BinaryIO) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    def take(cls) -> Channel:
        """From standard input and output, which become /dev/null: what code prints must not get between."""
        reader, writer = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1):
            os.dup2(null, number)
        return cls(reader, writer)

    def say(self, message: dict[str, Any]) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")
        self._writer.flush()

    def hear(self) -> dict[str, Any]:
        """Raises OtherSideError when the other side has ended or speaks nonsense."""
        line = self._reader.readline(LONGEST_MESSAGE)
        try:
            message = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise OtherSideError("the other side is gone")
        return message

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            self.say(message)
        except OSError:
            raise OtherSideError("the other side is gone") from None
        return self.hear()


def pack(value: Any) -> Any:
    """A plain value as JSON that keeps its type. Raises NotPlainError."""
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is Remote:
        return value.packed
    if kind in SCALARS:
        return {kind.__name__: SCALARS[kind](value)}
    if kind.__name__ in SEQUENCES and kind is SEQUENCES[kind.__name__]:
        return {kind.__name__: [pack(item) for item in value]}
    if kind is dict:
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    raise NotPlainError(f"a value of type {kind.__name__} does not cross")


def unpack(packed: Any) -> Any:
    """The plain value. Raises ValueError, TypeError or RecursionError for what is none."""
    if packed is None or isinstance(packed, bool | str):
        return packed
    if not isinstance(packed, dict) or len(packed) != 1:
        raise ValueError("no plain value")
    kind, content = next(iter(packed.items()))
    if kind == "int":
        return int(content, 16)
    if kind in ("float", "complex"):
        return float(content) if kind == "float" else complex(content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind in SEQUENCES:
        return SEQUENCES[kind]([unpack(item) for item in content])
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in content}
    raise ValueError(f"{kind} is no plain value")


def _make_equal(ours: Any, theirs: Any) -> None:
    """Do to our argument what the call did to its copy."""
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
        with contextlib.suppress(TypeError):  # few want more than a text
            return kind("raised by the tested code")
    return OtherSideError(name)


def serve(code: str, channel: Channel) -> None:
    """Run the tested code, then answer calls until the judge hangs up."""
    namespace: dict[str, Any] = {"__name__": "answer"}
    exec(compile(code, "<answer>", "exec"), namespace)  # noqa: S102  what this process is for
    wanted = channel.hear()["describe"]
    channel.say({"names": {name: _described(namespace[name]) for name in wanted if name in namespace}})
    while True:
        request = channel.hear()
        channel.say(_answer(request, namespace))


def _described(value: Any) -> dict[str, Any]:
    """A constant as it is; nothing of what may be called."""
    try:
        return {"value": pack(value)}
    except (NotPlainError, RecursionError):
        return {}


def _answer(request: dict[str, Any], namespace: dict[str, Any]) -> dict[str, Any]:
    def argument(packed: Any) -> Any:
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
    """Run the tests in order, in one namespace, and write a character for each as soon as it is known.

    ``setup`` is run before anything of the other side is there, so that it cannot depend on it.
    """
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(setup, "<setup>", "exec"), namespace)  # noqa: S102
    except Exception:  # noqa: BLE001  the label's fault, whatever it is
        verdict.write(UNUSABLE * len(tests))
        verdict.flush()
        return
    _bind(namespace, tests, channel)
    for number, test in enumerate(tests):
        try:
            exec(compile(test, f"<test {number}>", "exec"), namespace)  # noqa: S102
            outcome = PASSED
        except NotPlainError:  # only our side raises it: the test hands over what cannot cross
            outcome = UNUSABLE
        except Exception:  # noqa: BLE001  a test fails by whatever exception
            outcome = FAILED
        verdict.write(outcome)
        verdict.flush()


def _bind(namespace: dict[str, Any], tests: Sequence[str], channel: Channel) -> None:
    """Give the tests what they name but do not have: modules of the standard library, then the other side's definitions."""
    wanted = free_names(tests) - namespace.keys()
    modules = wanted & sys.stdlib_module_names
    namespace.update({name: __import__(name) for name in modules})
    try:
        names = channel.ask({"describe": sorted(wanted - modules)})["names"]
        for name in (wanted - modules) & names.keys():
            namespace[name] = unpack(names[name]["value"]) if "value" in names[name] else Remote(name, channel)
    except (OtherSideError, AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return  # the tested code ended, or answers nonsense: every test that needs it fails


def free_names(tests: Sequence[str]) -> set[str]:
    """Names that tests read but neither define, nor import, nor have as built-ins."""
    read: set[str] = set()
    own = set(vars(builtins))
    for node in (node for test in tests for node in ast.walk(ast.parse(test))):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else own).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
        elif isinstance(node, ast.alias):
            own.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            own.add(node.name)
    return read - own
