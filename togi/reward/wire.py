"""The messages between a reward worker and its owner (length-prefixed JSON over a socket), and valid return values.

Standard library only: the worker process imports this. ``function`` starts and stops processes.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from numbers import Real
from typing import Any

LENGTH = struct.Struct("!Q")
NO_INDEX = -1
OPTIONAL_ARGUMENTS = ("responses", "datasources", "finish_reasons", "response_lengths")


class LoadKind(StrEnum):
    """The source of the function: a Python file, an importable module, or bytes of cloudpickle in base64."""

    FILE = "file"
    MODULE = "module"
    PICKLE = "pickle"


@dataclass(frozen=True, slots=True)
class Load:
    """The first message to a worker. ``source``: a path, a module name or base64. ``name``: the qualified function name.

    ``settings``: keyword arguments of every call.
    """

    kind: LoadKind
    source: str
    name: str
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    """One group: lists with one entry per rollout. ``optional``: a list for each known name of ``OPTIONAL_ARGUMENTS``."""

    queries: list[str]
    prompts: list[str]
    labels: list[Any]
    optional: Mapping[str, Sequence[str | int]]


@dataclass(frozen=True, slots=True)
class Answer:
    """The checked return value: a finite reward or None (abstain) per query, and named components likewise."""

    rewards: list[float | None] = field(default_factory=list)
    components: Mapping[str, list[float | None]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Complaint:
    """Why there is no answer. ``what``: continues "reward_func in file.py ..."; ``index``: a sample or ``NO_INDEX``.

    ``during_call``: False if the function could not be loaded, so that no prompt is involved. ``is_transient``: a retry
    may succeed.
    """

    what: str
    advice: str
    index: int = NO_INDEX
    during_call: bool = True
    is_transient: bool = False


def encode(message: Load | Call | Answer | Complaint) -> bytes:
    """A message as one frame. Raises TypeError or ValueError if a label is not a JSON value."""
    body = json.dumps({"type": type(message).__name__, **asdict(message)}).encode()
    return LENGTH.pack(len(body)) + body


def send(channel: socket.socket, frame: bytes, timeout: float) -> None:
    """Write one frame within ``timeout`` seconds.

    Raises TimeoutError, and ConnectionError if the other side is gone.
    """
    channel.settimeout(None if timeout == math.inf else timeout)
    channel.sendall(frame)


def receive(channel: socket.socket, timeout: float) -> dict[str, Any]:
    """Read one message within ``timeout`` seconds (``math.inf``: no limit).

    Raises TimeoutError, and ConnectionError if the other side is gone.
    """
    deadline = time.monotonic() + timeout
    (length,) = LENGTH.unpack(_read(channel, LENGTH.size, deadline))
    message: dict[str, Any] = json.loads(_read(channel, length, deadline))
    return message


def as_reply(message: Mapping[str, Any]) -> Answer | Complaint:
    """The record of a worker's message."""
    if message["type"] == Complaint.__name__:
        return Complaint(
            message["what"], message["advice"], message["index"], message["during_call"], message["is_transient"]
        )
    assert message["type"] == Answer.__name__
    return Answer(message["rewards"], message["components"])


def _read(channel: socket.socket, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        # The limit is for the whole message, so each read has what is left of it.
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        channel.settimeout(None if left == math.inf else left)
        chunk = channel.recv(min(size - len(data), 1 << 20))
        if not chunk:
            raise ConnectionError("the other side closed the connection")
        data += chunk
    return bytes(data)


# Second part: the return value of a reward function, checked and converted. Tensors and arrays are recognised by their
# ``tolist``, so neither torch nor NumPy is imported for functions that do not use them. ``worker`` calls the function.

DICT_KEYS = ("rewards", "scores", "extra_logs")
RETURN_A_NUMBER = "return a finite number for every query, or None to abstain"
SCORES = "scores"


class BadReturnError(Exception):
    """A return value that is not a list of scores."""

    def __init__(self, what: str, advice: str = RETURN_A_NUMBER, index: int = NO_INDEX) -> None:
        super().__init__(what)
        self.what = what
        self.advice = advice
        self.index = index


def checked(returned: Any, count: int) -> Answer:
    """The answer in a function's return value for ``count`` queries. Raises BadReturnError.

    Accepted: a sequence, 1-D tensor or array with one number (or None) per query; or a dict with "rewards" like that,
    optional "scores" likewise and "extra_logs" {name: one number for all, or one per query}.
    """
    if not isinstance(returned, Mapping):
        return Answer(per_query(returned, count, "rewards"))
    unknown = [key for key in returned if key not in DICT_KEYS]
    if "rewards" not in returned or unknown:
        raise BadReturnError(
            f"returned a dict with the keys {list(returned)}",
            'return "rewards" and optionally "scores" and "extra_logs", with everything else inside "extra_logs"',
        )
    components: dict[str, list[float | None]] = {}
    if SCORES in returned:
        components[SCORES] = per_query(returned[SCORES], count, '"scores"')
    logs = returned.get("extra_logs", {})
    if not isinstance(logs, Mapping):
        raise BadReturnError(f'returned {_show(logs)} as "extra_logs"', "return a dict of names to numbers")
    for name, value in logs.items():
        if not isinstance(name, str) or name in DICT_KEYS:
            raise BadReturnError(f'returned an entry {name!r} in "extra_logs"', "use another name, of type str")
        components[name] = _log(value, count, name)
    return Answer(per_query(returned["rewards"], count, '"rewards"'), components)


def per_query(values: Any, count: int, what: str) -> list[float | None]:
    """One number or None per query from a sequence, tensor or array. Raises BadReturnError."""
    plain = _plain(values)
    if isinstance(plain, Real) and count == 1:
        plain = [plain]
    if isinstance(plain, Real):
        raise BadReturnError(f"returned a single number as {what} for {count} queries", "return one number per query")
    if not isinstance(plain, Sequence) or isinstance(plain, str | bytes):
        raise BadReturnError(f"returned {_show(values)} as {what}", "return a list with one number per query")
    if len(plain) != count:
        raise BadReturnError(f"returned {len(plain)} {what} for {count} queries", "return one number per query")
    return [_checked_number(value, what, index) for index, value in enumerate(plain)]


def _log(value: Any, count: int, name: str) -> list[float | None]:
    what = f'"extra_logs" {name!r}'
    plain = _plain(value)
    if isinstance(plain, Real):
        return [_checked_number(plain, what, NO_INDEX)] * count
    return per_query(plain, count, what)


def _checked_number(value: Any, what: str, index: int) -> float | None:
    plain = _plain(value)
    if plain is None:
        return None
    if not isinstance(plain, Real):
        raise BadReturnError(f"returned {_show(value)} in {what}", index=index)
    try:
        number = float(plain)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadReturnError(f"returned {number} in {what}", index=index)
    return number


def _plain(value: Any) -> Any:
    """Tensors, arrays and their scalars as Python lists and numbers; other values unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def _show(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    return f"a value of type {type(value).__name__}"
