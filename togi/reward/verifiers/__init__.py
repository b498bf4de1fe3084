"""Labels as the built-in functions read them, and the error for unusable labels.

Functions with labels of a form of their own are also called without responses, before a run: then they only check the labels.
"""

from collections.abc import Callable
from decimal import Decimal
from math import isfinite  # the package has a module math

from togi.reward.wire import Complaint

SHOWN_CHARACTERS = 80

# The arguments of every function: one entry per response. A label is any JSON value.
Texts = list[str]
Labels = list[object]


def unusable(label: object, why: str, advice: str = "point --label_key at the answer field") -> Complaint:
    """The error for a label. ``why``: continues the sentence after the label."""
    return Complaint(f"cannot use the label {repr(label)[:SHOWN_CHARACTERS]}: it {why}", advice)


def judged(
    labels: Labels, responses: Texts | None, check: Callable[[object], object], judge: Callable[[str, object], float]
) -> list[float | None]:
    """``judge`` of each response and its label. Without responses ``check`` of each label; a Complaint has its index."""
    if responses is not None:
        return [judge(response, label) for response, label in zip(responses, labels, strict=True)]
    for index, label in enumerate(labels):
        try:
            check(label)
        except Complaint as complaint:
            complaint.index = index
            raise
    return [None] * len(labels)


def plain_text(label: object) -> str:
    """A text or a number as text, without an exponent. Raises Complaint for any other label, and for an empty one."""
    if not isinstance(label, str | int | float):
        raise unusable(label, "is no text and no number")
    if isinstance(label, float) and not isfinite(label):
        raise unusable(label, "is no finite number")
    if isinstance(label, float):
        return format(Decimal(repr(label)), "f")
    if not str(label).strip():
        raise unusable(label, "is empty")
    return str(label)
