"""Labels as the built-in functions read them, and the error for one that they cannot use."""

from __future__ import annotations

from typing import Any

from togi.reward.wire import BadReturnError

SHOWN_CHARACTERS = 80


def unusable(label: Any, why: str, advice: str = "point --label_key at the answer field") -> BadReturnError:
    """The error for a label: ``why`` goes on after it."""
    return BadReturnError(f"cannot use the label {repr(label)[:SHOWN_CHARACTERS]}: it {why}", advice)


def plain_text(label: Any) -> str:
    """A label that is a text or a number, as text. Raises BadReturnError for any other, and for an empty one."""
    if not isinstance(label, str | int | float):
        raise unusable(label, "is no text and no number")
    if not str(label).strip():
        raise unusable(label, "is empty")
    return str(label)
