"""Why a row is not used, and the error for one row. The modules that read rows decide which are faulty.

Values that rows hold as text, and values in words. Standard library only; knows nothing of records.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from enum import StrEnum
from itertools import chain

from togi.errors import DataError

SHOWN = 60
# A list of messages printed by Python, pandas or NumPy contains these, with either kind of quotes.
_SPEAKS = re.compile(r"['\"](role|from)['\"]\s*:")
_SAYS = re.compile(r"['\"](content|value|tool_calls)['\"]\s*:")
_ARRAY = re.compile(r"array\((.*?)(,\s*dtype=object)?\)", re.DOTALL)
_NEXT_ROW = re.compile(r"\}\s*\n\s*\{")


def parsed(text: str, fits: Callable[[Mapping[str, object]], bool]) -> object:
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
        raise Drop.WRONG_TYPE.error(
            f"is a text that looks like a list of messages but is not JSON ({short(start)}): write the list itself, or as JSON."
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

    def error(self, message: str) -> RowError:
        """The error for a row that is not used for this reason."""
        return RowError(self, message)


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
    IMPLICIT_PROMPT = (
        "have no prompt of their own, so that what both texts begin with counts as the prompt, and is not learned: set "
        "--prompt_key if the data has it apart"
    )
    ANSWER_LEFT_OUT = "end with the assistant's answer, which is left out of the prompt"
    MARKED_OFF = "have turns of the assistant that are marked with weight 0 or train false, and are not learned"
    TOOLS_UNSEEN = "have tools that the chat template does not show to the model: use a template that renders tools"
    CONTEXT_LOST = (
        "have a message in the context that the chat template leaves out or changes: look at the rendered examples"
    )
    REASONING_LOST = "have reasoning beside the content that the chat template leaves out, so that it is not learned"
    CONTROL_TOKENS = (
        "have content with special tokens that the chat template itself writes, and the model reads them so, for example as the "
        "end of a turn: remove them from the content, or give text that is rendered already without the template"
    )


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
    """A row that cannot be used; ``kind``: the reason that it is counted under.

    The message is what ``at`` puts after the place of the row: it starts with its verb, or with "the" and the field.
    """

    def __init__(self, kind: Drop, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def at(place: str, said: object) -> str:
    """What is said of a row, after its place: "Line 3 of a.csv has no field 'q' ...", "Line 3 of a.csv: the field 'q' is ..."."""
    colon = ":" if str(said).startswith(("the ", "label ")) else ""
    return f"{place}{colon} {said}"


@contextmanager
def named(subject: str) -> Iterator[None]:
    """Prefix the message of a DataError, which starts with its verb, with its subject: a field, or the place of a row."""
    try:
        yield
    except RowError as error:
        raise RowError(error.kind, at(subject, error)) from None
    except DataError as error:
        raise DataError(at(subject, error)) from None


def of_field(key: str) -> AbstractContextManager[None]:
    """``named`` with a field of the row as the subject."""
    return named(f"the field {key!r}")


def check_whole(value: object, subject: str) -> None:
    """Raise RowError if a text, or a text at any depth of a value, has a lone surrogate.

    JSON can hold one, where a text was cut inside an emoji; tokenizers and files cannot.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start : error.end].encode("ascii", "backslashreplace").decode()
            raise Drop.BAD_TEXT.error(
                f"{subject} half a character ({half}) in its text: correct or remove the row."
            ) from None
    elif isinstance(value, Mapping | list | tuple):
        for item in chain.from_iterable(value.items()) if isinstance(value, Mapping) else value:
            check_whole(item, subject)
