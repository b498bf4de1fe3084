"""Why a row is not used, and the error that says so of one row. Which rows are faulty is decided where they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum

from togi.errors import DataError


class Drop(StrEnum):
    """Why a row is not used."""

    UNREADABLE = "unreadable"
    MISSING_FIELD = "missing field"
    WRONG_TYPE = "wrong type"
    WRONG_ROLES = "wrong roles"
    WRONG_LABELS = "wrong labels"
    BAD_TEXT = "bad text"
    TEMPLATE = "refused by the template"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_ANSWER = "empty answer"
    TIE = "tie"
    NO_STEPS = "no steps"
    TOO_LONG = "too long"
    CUT_AWAY = "nothing to learn left when cut"
    CUT_EQUAL = "equal when cut"


# What depends on --max_len; every other reason is a fault of the row, for which --max_bad_rows is the limit.
LENGTH_DROPS = frozenset({Drop.TOO_LONG, Drop.CUT_AWAY, Drop.CUT_EQUAL})
FAULTS = frozenset(Drop) - LENGTH_DROPS
# So many are kept in words.
SHOWN_FAULTS = 20

# What follows the place of a row that has nothing wrong but what it lacks.
SENTENCES: Mapping[Drop, str] = {
    Drop.EMPTY_PROMPT: "has an empty prompt: fill it in or remove the row.",
    Drop.EMPTY_ANSWER: "has an empty answer: fill it in or remove the row.",
    Drop.TIE: "has one answer twice, as chosen and as rejected: correct or remove the row.",
    Drop.NO_STEPS: "has no step to label: put the placeholder after each step or remove the row.",
}


class RowError(DataError):
    """A row that cannot be used; ``kind`` is what it is counted under. The message starts with the place of the row."""

    def __init__(self, kind: Drop, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@contextmanager
def named(subject: str) -> Iterator[None]:
    """Put the subject before the message of a DataError, which starts with its verb."""
    try:
        yield
    except RowError as error:
        raise RowError(error.kind, f"{subject} {error}") from None
    except DataError as error:
        raise DataError(f"{subject} {error}") from None
