"""Why a row is not used, and the error for one row. The modules that read rows decide which are faulty."""

from __future__ import annotations

import math
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


class Note(StrEnum):
    """What is converted, or lost on the way to the model, in a row that is used.

    The value completes a sentence that starts with "3 of 40 rows".
    """

    SHAREGPT = "have from and value in place of role and content, and are read so"
    ALIAS = "call a role by another name (human, gpt, model, Assistant, observation, ...), and are read as user, assistant or tool"
    AS_TEXT = "hold messages or tools as text, which is read as the list that it stands for"
    ONE_MESSAGE = "hold one message, or columns of messages, where a list is expected, and are read as one"
    CALL = "write tool calls otherwise than OpenAI's tool_calls with arguments (function_call, parameters, input), and are read so"
    SYSTEM_FIELD = "have a field system or system_prompt, which is read as the system turn"
    PARTS = "have content in parts of text, which are joined"
    MISSING_WORD = (
        "have an answer or a prompt that says nan, None or null: if that stands for a missing value, remove the row"
    )
    PROMPT_TWICE = "repeat the prompt in the conversation of the answer; it is used once, as the conversation has it"
    PROMPT_IN_ANSWER = (
        "have an answer that begins with the whole prompt: if it is there twice, leave it out of one field"
    )
    ANSWER_LEFT_OUT = "end with the assistant's answer, which is left out of the prompt"
    MARKED_OFF = "have turns of the assistant that are marked with weight 0 or train false, and are not learned"
    TOOLS_UNSEEN = "have tools that the chat template does not show to the model: use a template that renders tools"
    CONTEXT_LOST = (
        "have a message in the context that the chat template leaves out or changes: look at the rendered examples"
    )
    REASONING_LOST = "have reasoning beside the content that the chat template leaves out, so that it is not learned"


# Reasons that depend on --max_len. Every other reason is a fault of the row and counts for --max_bad_rows.
LENGTH_DROPS = frozenset({Drop.TOO_LONG, Drop.CUT_AWAY, Drop.CUT_EQUAL})
FAULTS = frozenset(Drop) - LENGTH_DROPS
# The number of faults that are kept in words.
SHOWN_FAULTS = 20

# The sentence, after the place of the row, for reasons that need no details.
SENTENCES: Mapping[Drop, str] = {
    Drop.EMPTY_PROMPT: "has an empty prompt: fill it in or remove the row.",
    Drop.EMPTY_ANSWER: "has an empty answer: fill it in or remove the row.",
    Drop.TIE: "has one answer twice, as chosen and as rejected: correct or remove the row.",
    Drop.NO_STEPS: "has no step to label: put the placeholder after each step or remove the row.",
}


class RowError(DataError):
    """A row that cannot be used; ``kind``: the reason that it is counted under. The message starts with the row's place."""

    def __init__(self, kind: Drop, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def check_present(value: object, where: str, key: str) -> None:
    """Raise RowError for NaN, which tables contain where a value is missing."""
    if isinstance(value, float) and math.isnan(value):
        raise RowError(
            Drop.WRONG_TYPE, f"{where}: the field {key!r} is NaN, a missing value: fill it in or remove the row."
        )


@contextmanager
def named(subject: str) -> Iterator[None]:
    """Prefix the message of a DataError, which starts with its verb, with its subject."""
    try:
        yield
    except RowError as error:
        raise RowError(error.kind, f"{subject} {error}") from None
    except DataError as error:
        raise DataError(f"{subject} {error}") from None


def check_whole(value: object, subject: str) -> None:
    """Raise RowError if a text, or a text at any depth of a value, has a lone surrogate.

    JSON can hold one, where a text was cut inside an emoji; tokenizers and files cannot.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start : error.end].encode("ascii", "backslashreplace").decode()
            raise RowError(
                Drop.BAD_TEXT, f"{subject} half a character ({half}) in its text: correct or remove the row."
            ) from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_whole(key, subject)
            check_whole(item, subject)
    elif isinstance(value, list | tuple):
        for item in value:
            check_whole(item, subject)
