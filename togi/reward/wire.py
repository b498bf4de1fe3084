"""What a reward worker and its owner say to each other: length-prefixed JSON over a socket.

Standard library only: the worker process imports this. Not here: starting and stopping processes (``pool``).
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
from typing import Any

LENGTH = struct.Struct("!Q")
NO_INDEX = -1
OPTIONAL_ARGUMENTS = ("responses", "datasources", "finish_reasons", "response_lengths")


class LoadKind(StrEnum):
    """Where the function comes from: a Python file, an importable module, or bytes of cloudpickle in base64."""

    FILE = "file"
    MODULE = "module"
    PICKLE = "pickle"


@dataclass(frozen=True, slots=True)
class Load:
    """The first message to a worker. ``source``: a path, a module name or base64. ``name``: the qualified function.

    ``settings`` are keyword arguments of every call.
    """

    kind: LoadKind
    source: str
    name: str
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    """One group: lists with one entry per rollout. ``optional``: a list for each of ``OPTIONAL_ARGUMENTS`` that is known."""

    queries: list[str]
    prompts: list[str]
    labels: list[Any]
    optional: Mapping[str, Sequence[str | int]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the function said, checked: a finite reward or None (abstain) per query, and named components likewise."""

    rewards: list[float | None] = field(default_factory=list)
    components: Mapping[str, list[float | None]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Complaint:
    """Why there is no answer. ``what`` continues "reward_func in file.py ..."; ``index``: a sample or ``NO_INDEX``.

    ``during_call`` is False when the function could not even be loaded, so that no prompt has to do with it.
    ``is_transient``: the same call may well succeed if it is made again.
    """

    what: str
    advice: str
    index: int = NO_INDEX
    during_call: bool = True
    is_transient: bool = False


def encode(message: Load | Call | Answer | Complaint) -> bytes:
    """A message as one frame. Raises TypeError or ValueError when a label is not a JSON value."""
    body = json.dumps({"type": type(message).__name__, **asdict(message)}).encode()
    return LENGTH.pack(len(body)) + body


def send(channel: socket.socket, frame: bytes, timeout: float) -> None:
    """Write one frame within ``timeout`` seconds.

    Raises TimeoutError, and ConnectionError when the other side is gone.
    """
    channel.settimeout(None if timeout == math.inf else timeout)
    channel.sendall(frame)


def receive(channel: socket.socket, timeout: float) -> dict[str, Any]:
    """Read one message within ``timeout`` seconds (``math.inf``: wait).

    Raises TimeoutError, and ConnectionError when the other side is gone.
    """
    deadline = time.monotonic() + timeout
    (length,) = LENGTH.unpack(_read(channel, LENGTH.size, deadline))
    message: dict[str, Any] = json.loads(_read(channel, length, deadline))
    return message


def as_reply(message: Mapping[str, Any]) -> Answer | Complaint:
    """A worker's message as a record."""
    if message["type"] == Complaint.__name__:
        return Complaint(
            message["what"], message["advice"], message["index"], message["during_call"], message["is_transient"]
        )
    assert message["type"] == Answer.__name__
    return Answer(message["rewards"], message["components"])


def _read(channel: socket.socket, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        channel.settimeout(None if left == math.inf else left)
        chunk = channel.recv(min(size - len(data), 1 << 20))
        if not chunk:
            raise ConnectionError("the other side closed the connection")
        data += chunk
    return bytes(data)
