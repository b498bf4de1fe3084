"""Values that rows hold as text, and values in words. Standard library only; knows nothing of records."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from togi.data.faults import Drop, RowError

SHOWN = 60
# A list of messages printed by Python, pandas or NumPy contains these, with either kind of quotes.
_SPEAKS = re.compile(r"['\"](role|from)['\"]\s*:")
_SAYS = re.compile(r"['\"](content|value|tool_calls)['\"]\s*:")
_ARRAY = re.compile(r"array\((.*?)(,\s*dtype=object)?\)", re.DOTALL)
_NEXT_ROW = re.compile(r"\}\s*\n\s*\{")


def parsed(text: str, fits: Callable[[Mapping[str, Any]], bool]) -> object:
    """The value of a text that is a record that ``fits``, or a list of them, as JSON or as Python prints it; else the text.

    Raises RowError for a text that looks like a list of messages but is broken.
    """
    start = text.strip()
    if not start.startswith(("[", "{", "(", "array(", '"[', '"{')):
        return text
    value = _loaded(start)
    if isinstance(value, str):  # a list that was converted to text twice
        value = _loaded(value)
    items = [value] if isinstance(value, Mapping) else value
    if isinstance(items, list | tuple) and items and all(isinstance(item, Mapping) and fits(item) for item in items):
        return value if isinstance(value, Mapping) else list(items)
    if value is None and start[-1] in ")]}" and _SPEAKS.search(start) and _SAYS.search(start):
        raise RowError(
            Drop.WRONG_TYPE,
            f"is a text that looks like a list of messages but is not JSON ({short(start)}): write the list itself, or as JSON.",
        )
    return text


def _loaded(text: str) -> object:
    """The value of a text in JSON, or of messages as Python or NumPy print them; None if it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        if not (_SPEAKS.search(text) or "'name'" in text):
            return None
    array = _ARRAY.fullmatch(text)
    try:
        return ast.literal_eval(_NEXT_ROW.sub("}, {", array[1] if array else text))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def named_value(value: object) -> str:
    """A value that should be text, in words."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "null" if value is None else "NaN, a missing value"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"the {'number' if is_number else kind(value)} {short(value)}"


def kind(value: object) -> str:
    """The type of a value; "object" for a mapping, as in JSON."""
    return "object" if isinstance(value, Mapping) else type(value).__name__


def short(value: object) -> str:
    """The beginning of a value as a Python literal."""
    if isinstance(value, str):
        return repr(value[:SHOWN] + ("..." if len(value) > SHOWN else ""))
    return repr(value)[:SHOWN]
