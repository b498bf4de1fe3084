"""What a reward function returned, checked and made plain.

Standard library only: runs in the worker process. Tensors and arrays are recognised by their ``tolist``, so that
neither torch nor NumPy is imported for functions that do not use them. Not here: calling the function (``worker``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from togi.reward.wire import NO_INDEX, Answer

DICT_KEYS = ("rewards", "scores", "extra_logs")
RETURN_A_NUMBER = "return a finite number for every query, or None to abstain"
SCORES = "scores"


class BadReturnError(Exception):
    """A returned value that is not a list of scores."""

    def __init__(self, what: str, advice: str = RETURN_A_NUMBER, index: int = NO_INDEX) -> None:
        super().__init__(what)
        self.what = what
        self.advice = advice
        self.index = index


def checked(returned: Any, count: int) -> Answer:
    """The answer in a function's return value for ``count`` queries.

    Accepted: a sequence, 1-D tensor or array with one number (or None) per query; or a dict with "rewards" like that,
    optional "scores" likewise and "extra_logs" {name: one number for all, or one per query}. Raises BadReturnError.
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
    """One number or None per query out of a sequence, tensor or array. Raises BadReturnError."""
    plain = _plain(values)
    if isinstance(plain, Real) and count == 1:
        plain = [plain]
    if isinstance(plain, Real):
        raise BadReturnError(f"returned a single number as {what} for {count} queries", "return one number per query")
    if not isinstance(plain, Sequence) or isinstance(plain, str | bytes):
        raise BadReturnError(f"returned {_show(values)} as {what}", "return a list with one number per query")
    if len(plain) != count:
        raise BadReturnError(f"returned {len(plain)} {what} for {count} queries", "return one number per query")
    return [_number(value, what, index) for index, value in enumerate(plain)]


def _log(value: Any, count: int, name: str) -> list[float | None]:
    what = f'"extra_logs" {name!r}'
    plain = _plain(value)
    if isinstance(plain, Real):
        return [_number(plain, what, NO_INDEX)] * count
    return per_query(plain, count, what)


def _number(value: Any, what: str, index: int) -> float | None:
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
    """Tensors, arrays and their scalars as Python lists and numbers; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _show(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    return f"a value of type {type(value).__name__}"
