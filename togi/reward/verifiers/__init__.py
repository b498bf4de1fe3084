"""Labels as the built-in functions read them, and the error for unusable labels."""

from __future__ import annotations

from typing import Any

from togi.reward.wire import BadReturnError

SHOWN_CHARACTERS = 80


def unusable(label: Any, why: str, advice: str = "point --label_key at the answer field") -> BadReturnError:
    """The error for a label. ``why``: continues the sentence after the label."""
    return BadReturnError(f"cannot use the label {repr(label)[:SHOWN_CHARACTERS]}: it {why}", advice)


def plain_text(label: Any) -> str:
    """A text or a number as text. Raises BadReturnError for any other label, and for an empty one."""
    if not isinstance(label, str | int | float):
        raise unusable(label, "is no text and no number")
    if not str(label).strip():
        raise unusable(label, "is empty")
    return str(label)
