"""Values as models write them: JSON, the notation of Gemma's later models, and literals of Python.

A reader gets a text and a place, and returns the value and the place after it. What cannot be read is ``Malformed``.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

DEPTH = 64


class Malformed(ValueError):
    """Why a call cannot be read. ``cut``: the text ends before the call does."""

    def __init__(self, why: str, *, cut: bool = False) -> None:
        super().__init__(why)
        self.cut = cut


def skip(text: str, place: int, also: str = "") -> int:
    """The next place without white space and the characters of ``also``."""
    match = re.compile(rf"[\s{re.escape(also)}]*").match(text, place)
    return match.end() if match is not None else place


def until(text: str, place: int, end: str) -> tuple[str, int]:
    """The text up to ``end``, and the place after ``end``."""
    found = text.find(end, place)
    if found < 0:
        raise Malformed(f"has no {end}", cut=True)
    return text[place:found], found + len(end)


def _refuse(constant: str) -> NoReturn:
    raise Malformed(f"is not valid JSON ({constant} is no JSON)")


def _number(text: str) -> float:
    value = float(text)
    return value if abs(value) != float("inf") else _refuse(text)


# Models write line breaks into strings as they are.
_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse, parse_float=_number)


def json_value(text: str, place: int) -> tuple[object, int]:
    """The JSON value at a place, and the place after it."""
    try:
        value, end = _DECODER.raw_decode(text, place)
    except json.JSONDecodeError as error:
        # The end of a text may part a string, a word such as null, a number or an escape.
        ends = (
            error.msg.startswith("Unterminated")
            or re.compile(r"[\w.+\\-]{0,12}\s*").fullmatch(text, error.pos) is not None
        )
        raise Malformed(f"is not valid JSON ({error.msg} at character {error.pos - place})", cut=ends) from None
    except Malformed:
        raise
    except (ValueError, RecursionError):  # more digits or brackets than Python reads
        raise Malformed("is not valid JSON (a number is too long, or there are too many brackets)") from None
    return value, int(end)


class Values:
    """Values in the notation of Gemma (``key:value``, strings between ``delimiter``), or of Python (``key=value``) without one."""

    def __init__(self, text: str, delimiter: str = "") -> None:
        self.text, self.delimiter = text, delimiter

    def pairs(self, place: int, closing: str, depth: int = 0) -> tuple[dict[str, object], int]:
        """Keys and values up to ``closing``."""
        found = dict[str, object]()
        assign = "=" if closing == ")" else ":"
        while not self.text.startswith(closing, place := skip(self.text, place, also=",")):
            key, place = self._value(place, assign, closing, depth)
            place = skip(self.text, place)
            if not self.text.startswith(assign, place):
                raise Malformed(f"has an argument without {assign!r}", cut=place >= len(self.text))
            found[str(key)], place = self._value(skip(self.text, place + 1), ",", closing, depth + 1)
        return found, place + 1

    def _value(self, place: int, after: str, closing: str, depth: int) -> tuple[object, int]:
        """A value, or a key if it is not a comma that comes after. A bare word goes on up to ``after`` or ``closing``."""
        text, delimiter = self.text, self.delimiter
        if place >= len(text):
            raise Malformed("has no end", cut=True)
        if depth > DEPTH:
            raise Malformed("has too many brackets in each other")
        if delimiter and text.startswith(delimiter, place):
            return until(text, place + len(delimiter), delimiter)
        if text[place] == '"' or (text[place] == "'" and not delimiter):
            return self._quoted(place)
        if text[place] == "{":
            return self.pairs(place + 1, "}", depth)
        if text[place] == "[":
            items, place = list[object](), place + 1
            while not text.startswith("]", place := skip(text, place, also=",")):
                item, place = self._value(place, ",", "]", depth + 1)
                items.append(item)
            return items, place + 1
        match = re.compile(f"[^{re.escape(after + closing)}]+").match(text, place)
        if match is None:
            raise Malformed(f"has no value before {text[place]!r}")
        return self._word(match.group().strip(), is_key=after != ","), match.end()

    def _word(self, word: str, *, is_key: bool) -> object:
        constants = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
        if is_key or word in constants:
            return word if is_key else constants[word]
        if re.fullmatch(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", word):
            return json_value(word, 0)[0]
        if not self.delimiter:
            raise Malformed(f"has a value that is no literal ({word[:20]!r})")
        return word

    def _quoted(self, place: int) -> tuple[object, int]:
        quote = self.text[place]
        # The possessive quantifier never goes back.
        match = re.compile(rf"{quote}(?:[^{quote}\\]|\\.)*+{quote}", re.DOTALL).match(self.text, place)
        if match is None:
            raise Malformed("has no end", cut=True)
        try:
            literal = json_value(match.group(), 0)[0] if self.delimiter else ast.literal_eval(match.group())
        except (ValueError, SyntaxError):
            raise Malformed(f"has a string that cannot be read ({match.group()[:20]})") from None
        return literal, match.end()


def quoted(text: str) -> str:
    """A JSON string."""
    return json.dumps(text, ensure_ascii=False)


def escaped(value: object) -> str:
    """JSON that holds no tag."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def notation(value: object, delimiter: str) -> str:
    """A value in the notation of Gemma."""
    if isinstance(value, str):
        # A string that holds the delimiter, or ends with its start, would end too early.
        return (
            f"{delimiter}{value}{delimiter}" if f"{value}{delimiter}".find(delimiter) == len(value) else escaped(value)
        )
    if isinstance(value, Mapping):
        pairs = (
            (key if re.fullmatch(r"[\w.-]+", key) else notation(key, delimiter), item) for key, item in value.items()
        )
        return "{" + ",".join(f"{key}:{notation(item, delimiter)}" for key, item in pairs) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(notation(item, delimiter) for item in value) + "]"
    return json.dumps(value)
