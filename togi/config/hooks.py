"""A user's function in place of a built-in choice: ``FILE.py:name`` as a flag, a callable from Python.

This module parses it; ``togi.learn.hooks`` loads and tries it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError

IN_PYTHON = "python"


@dataclass(frozen=True, slots=True)
class Hook:
    """The place of a function: ``path`` of its file and ``name`` in it; or the ``function`` itself, given from Python."""

    path: str
    name: str
    function: Callable[..., Any] | None = field(default=None, compare=False, repr=False)

    # A hook may stand in for a built-in estimator. What it does with groups is up to it.
    uses_groups = False

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


def _hook(value: Any) -> Hook:
    if isinstance(value, Hook):
        return value
    if isinstance(value, str):
        path, colon, name = value.rpartition(":")
        if colon and path.endswith(".py") and name.isidentifier():
            return Hook(path, name)
    elif callable(value):
        return Hook(IN_PYTHON, str(getattr(value, "__name__", type(value).__name__)), value)
    raise PydanticCustomError("hook", "FILE.py:name of a function")


HookField = Annotated[Hook, PlainValidator(_hook), PlainSerializer(str, return_type=str)]
