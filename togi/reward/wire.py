"""The messages between a reward worker and its owner (length-prefixed JSON over a socket), and valid return values.

Standard library only: the worker process imports this. ``function`` starts and stops processes.
"""

import json
import math
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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

    ``settings``: keyword arguments of every call. ``content``: the bytes of a file in base64, so that every worker of a run has
    the same function, also if the file is edited.
    """

    kind: LoadKind
    source: str
    name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    content: str = ""


Call = dict[str, list[Any]]
"""One group: "queries", "prompts", "labels" and known ones of ``OPTIONAL_ARGUMENTS``, each with one entry per rollout."""
Answer = dict[str, list[float | None]]
"""The checked return value: for "rewards" and each named component a finite number or None (abstain) per query."""


@dataclass(eq=False)
class Complaint(Exception):
    """Why there is no answer. ``what``: continues "reward_func in file.py ..."; ``index``: a sample or ``NO_INDEX``.

    ``during_call``: False if the function could not be loaded, so that no prompt is involved. ``is_transient``: a retry
    may succeed.
    """

    what: str
    advice: str = "return a finite number for every query, or None to abstain"
    index: int = NO_INDEX
    during_call: bool = True
    is_transient: bool = False

    def __str__(self) -> str:
        return self.what


def encode(message: Mapping[str, object]) -> bytes:
    """A message as one frame. Raises TypeError or ValueError if a label is not a JSON value."""
    body = json.dumps(message).encode()
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
    message: dict[str, object] = json.loads(_read(channel, length, deadline))
    return message


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


def checked(returned: object, count: int) -> Answer:
    """The answer in a function's return value for ``count`` queries. Raises Complaint.

    Accepted: a sequence, 1-D tensor or array with one number (or None) per query; or a dict with "rewards" like that,
    optional "scores" likewise and "extra_logs" {name: one number for all, or one per query}.
    """
    if not isinstance(returned, Mapping):
        return {"rewards": per_query(returned, count, "rewards")}
    unknown = [key for key in returned if key not in DICT_KEYS]
    if "rewards" not in returned or unknown:
        raise Complaint(
            f"returned a dict with the keys {list(returned)}",
            'return "rewards" and optionally "scores" and "extra_logs", with everything else inside "extra_logs"',
        )
    answer: Answer = {}
    if "scores" in returned:
        answer["scores"] = per_query(returned["scores"], count, '"scores"')
    logs = returned.get("extra_logs", {})
    if not isinstance(logs, Mapping):
        raise Complaint(f'returned {_show(logs)} as "extra_logs"', "return a dict of names to numbers")
    for name, value in logs.items():
        if not isinstance(name, str) or name in DICT_KEYS:
            raise Complaint(f'returned an entry {name!r} in "extra_logs"', "use another name, of type str")
        answer[name] = _log(value, count, name)
    answer["rewards"] = per_query(returned["rewards"], count, '"rewards"')
    return answer


def per_query(values: object, count: int, what: str) -> list[float | None]:
    """One number or None per query from a sequence, tensor or array. Raises Complaint."""
    plain = plain_value(values)
    if isinstance(plain, Real) and count == 1:
        plain = [plain]
    if isinstance(plain, Real):
        raise Complaint(f"returned a single number as {what} for {count} queries", "return one number per query")
    if not isinstance(plain, Sequence) or isinstance(plain, str | bytes):
        raise Complaint(f"returned {_show(values)} as {what}", "return a list with one number per query")
    if len(plain) != count:
        raise Complaint(f"returned {len(plain)} {what} for {count} queries", "return one number per query")
    return [checked_number(value, what, index) for index, value in enumerate(plain)]


def _log(value: object, count: int, name: str) -> list[float | None]:
    what = f'"extra_logs" {name!r}'
    plain = plain_value(value)
    if isinstance(plain, Real):
        return [checked_number(plain, what, NO_INDEX)] * count
    return per_query(plain, count, what)


def checked_number(value: object, what: str, index: int) -> float | None:
    """A finite number, or None. Raises Complaint."""
    plain = plain_value(value)
    if plain is None:
        return None
    if not isinstance(plain, Real):
        raise Complaint(f"returned {_show(value)} in {what}", index=index)
    try:
        number = float(plain)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Complaint(f"returned {number} in {what}", index=index)
    return number


def plain_value(value: object) -> object:
    """Tensors, arrays and their scalars as Python lists and numbers; other values unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def _show(value: object) -> str:
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    return f"a value of type {type(value).__name__}"
