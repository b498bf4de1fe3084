"""Labels as the built-in functions read them, and the error for unusable labels."""

from togi.reward.wire import Complaint

SHOWN_CHARACTERS = 80

# The arguments of every function: one entry per response. A label is any JSON value.
Texts = list[str]
Labels = list[object]


def unusable(label: object, why: str, advice: str = "point --label_key at the answer field") -> Complaint:
    """The error for a label. ``why``: continues the sentence after the label."""
    return Complaint(f"cannot use the label {repr(label)[:SHOWN_CHARACTERS]}: it {why}", advice)


def plain_text(label: object) -> str:
    """A text or a number as text. Raises Complaint for any other label, and for an empty one."""
    if not isinstance(label, str | int | float):
        raise unusable(label, "is no text and no number")
    if not str(label).strip():
        raise unusable(label, "is empty")
    return str(label)
