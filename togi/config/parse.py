"""From YAML file and command line to a frozen configuration that knows the source of each value.

argparse only splits the command line. pydantic checks types and limits, so values from a file and from the command line follow the
same rules and are refused with the same sentence.
"""

import argparse
import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from togi.config.fields import Settings, is_later
from togi.errors import ConfigError

C = TypeVar("C", bound=Settings)
SHOWN_CHARACTERS = 80
# pydantic's kinds of errors, by the start of their names, in words for users.
_RULES = {
    "string_too_short": "a path, not an empty text",
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_": "text",
    "tuple_": "a list",
    "missing": "a list with more numbers",
    "too_long": "a list of {max_length}",
    "greater_than_equal": "at least {ge:.15g}",
    "greater_than": "greater than {gt:.15g}",
    "less_than_equal": "at most {le:.15g}",
    "less_than": "less than {lt:.15g}",
}


class Source(StrEnum):
    DEFAULT = "default"
    FILE = "file"
    COMMAND_LINE = "command line"
    PYTHON = "python"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Parsed(Generic[C]):
    """A configuration and the source of each value: a ``Source``, or the flag that implied it."""

    config: C
    sources: Mapping[str, str]

    @property
    def given(self) -> set[str]:
        """The names of the settings that are not left at their defaults."""
        return {name for name, source in self.sources.items() if source is not Source.DEFAULT}

    def values_from(self, source: str) -> dict[str, object]:
        """The values from one source, by name."""
        return self.config.model_dump(include={name for name, origin in self.sources.items() if origin == source})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if found := re.match(r"argument --(?P<name>\w+): ignored explicit argument", message):
            raise ConfigError(_no_value(found["name"]))
        raise ConfigError(message.removeprefix("argument ") + ".")


def parse(config_class: type[C], argv: Sequence[str], command: str) -> Parsed[C]:
    """Read ``--config FILE`` and the flags in ``argv``. The command line wins over the file.

    Raises ConfigError with one sentence for the first fault.
    """
    parser = build_parser(config_class, command)
    words = list(argv)
    known, unknown = parser.parse_known_args(words)
    # "--bf16 true" leaves "true" over: say that the flag takes no value, not that the word is unknown.
    for before, word in pairwise(words):
        field = config_class.model_fields.get(name := before.removeprefix("--"))
        if word in unknown and not word.startswith("-") and field is not None and field.annotation is bool:
            raise ConfigError(_no_value(name))
    if unknown:
        raise ConfigError(_unknown(unknown[0], config_class, prefix="--"))
    # Only what was given: defaults are pydantic's, so that each value has one source.
    given = {name: value for name, value in vars(known).items() if value is not None and name != "config"}
    return over_file(config_class, known.config, given, Source.COMMAND_LINE)


def over_file(
    config_class: type[C], file: str | PathLike[str] | None, given: Mapping[str, object], source: Source
) -> Parsed[C]:
    """The settings of a YAML file (None: of none), and over them those ``given`` from ``source``. Raises ConfigError."""
    from_file = read_file(Path(file), config_class) if file is not None else {}
    sources = dict.fromkeys(from_file, Source.FILE) | dict.fromkeys(given, source)
    return build(config_class, {**from_file, **given}, sources)


def build(config_class: type[C], values: Mapping[str, object], sources: Mapping[str, Source]) -> Parsed[C]:
    """Validate flat values, for the command line and the Python API. Raises ConfigError."""
    fields = config_class.model_fields
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(_unknown(name, config_class, prefix=""))
        if value == "None" and fields[name].default is None:
            in_file = "; in YAML, write null or leave the line out."
            way_out = in_file if sources.get(name) == Source.FILE else ": leave it out."
            raise ConfigError(f"--{name} None is the text 'None', not the absence of a value{way_out}")
    # First the given values alone, so that messages are about them and not about a preset's.
    config = _validated(config_class, values)
    given = {name: value for name, value in config if name in values}
    for name, value in given.items():
        if is_later(config_class, name) and value != fields[name].default:
            default = _shown(fields[name].default)
            raise ConfigError(f"--{name} is not supported yet: leave it out (its default is {default}).")
    # Then again with the values of the preset, which never replace given ones.
    bringer, brought = config.preset(given)
    known = {**dict.fromkeys(brought, bringer), **sources}
    every = {name: known.get(name, Source.DEFAULT) for name in fields}
    return Parsed(_validated(config_class, {**brought, **values}), every)


def _validated(config_class: type[C], values: Mapping[str, object]) -> C:
    try:
        return config_class(**values)
    except ValidationError as error:
        raise ConfigError(_sentence(error, values)) from None


def read_file(path: Path, config_class: type[Settings]) -> dict[str, object]:
    """The flat mapping of a YAML file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        content, names = yaml.safe_load(text), _names(text)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read ({error.strerror}): give the path of a YAML file.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path} is not UTF-8 text: give the path of a YAML file.") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise ConfigError(f"--config {path} is not valid YAML: {error.problem} in line {line}; correct it.") from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise ConfigError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    # An empty file sets nothing.
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must be a mapping of flag names to values, such as seed: 1.")
    for name in content:
        if name not in config_class.model_fields:
            raise ConfigError(f"--config {path}: " + _unknown(str(name), config_class, prefix=""))
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--config {path} sets {name} more than once: leave one of them.")
    return content


def _names(text: str) -> list[str]:
    """The keys of a YAML mapping as written, because YAML itself silently keeps the last of equal keys."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    return [str(key.value) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []


def build_parser(config_class: type[Settings], command: str) -> argparse.ArgumentParser:
    """An argparse parser whose groups are the base classes of ``config_class``."""
    parser = _Parser(prog=f"togi {command}", description=config_class.__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with flag names and values; the command line wins.")
    for title, names in groups(config_class):
        group = parser.add_argument_group(title)
        for name in names:
            _add(group, config_class, name)
    return parser


def groups(config_class: type[Settings]) -> Iterator[tuple[str, list[str]]]:
    """(title, flag names) of each group, in the order of the class's bases."""
    owner: dict[str, type] = {}
    # A base class owns a setting even if a subclass changes its default: the last owner in the MRO wins.
    for cls in config_class.__mro__:
        for name in cls.__dict__.get("__annotations__", {}):
            if name in config_class.model_fields:
                owner[name] = cls
    for base in config_class.__mro__:
        names = [name for name in config_class.model_fields if owner[name] is base]
        if names:
            yield (base.__doc__ or base.__name__), names


def _add(group: argparse._ArgumentGroup, config_class: type[Settings], name: str) -> None:
    field = config_class.model_fields[name]
    note = " [not supported yet]" if is_later(config_class, name) else ""
    default = "" if field.default in (None, "", False) else f" (default: {_shown(field.default)})"
    text = ((field.description or "") + default + note).replace("%", "%%")
    # Switches take no value; the hidden --no_ form turns off what is on by default.
    if field.annotation is bool:
        group.add_argument(f"--{name}", dest=name, action="store_true", default=None, help=text)
        group.add_argument(f"--no_{name}", dest=name, action="store_false", default=None, help=argparse.SUPPRESS)
        return
    arity, metavar = _arity(field.annotation), _metavar(field.annotation, name)
    # A list may be given in parts.
    action = "extend" if arity == "+" else "store"
    group.add_argument(f"--{name}", dest=name, help=text, nargs=arity, metavar=metavar, action=action)


def _arity(annotation: object) -> int | str | None:
    """How many words follow the flag: the length of a fixed tuple, "+" for an open one, None for a single word."""
    for part in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(part) is tuple:
            items = typing.get_args(part)
            return "+" if items[-1] is Ellipsis else len(items)
    return None


def _metavar(annotation: object, name: str) -> str:
    choices: list[str] = []
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, StrEnum):
            choices += [str(member) for member in part]
        elif typing.get_origin(part) is typing.Literal:
            choices += [str(value) for value in typing.get_args(part) if value != "auto"]
    return "|".join(choices) if choices else name.rsplit("_", 1)[-1].upper()


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _unknown(word: str, config_class: type[Settings], prefix: str) -> str:
    name = word.split("=", 1)[0]
    if prefix and not name.startswith("-"):
        return f"Unexpected word {word!r}: every setting is a flag such as --pretrain MODEL."
    bare = name.lstrip("-").replace("-", "_")
    near = nearest(bare.removeprefix("no_"), config_class.model_fields)
    hint = f"; did you mean {prefix}{near}?" if near else "; see --help for all of them."
    kind = "flag" if prefix else "setting"
    return f"Unknown {kind} {prefix}{name.lstrip('-')}{hint}"


def _no_value(name: str) -> str:
    return f"--{name} takes no value: write --{name} to turn it on or --no_{name} to turn it off."


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The most similar of ``names``; None if nothing is similar."""
    matches = difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


def _sentence(error: ValidationError, values: Mapping[str, object]) -> str:
    """The first wrong value in words. Each member of a union reports its own error; together they are one rule."""
    errors = error.errors(include_url=False)
    name = str(errors[0]["loc"][0])
    rules = dict.fromkeys(_rule(each) for each in errors if each["loc"][0] == name)
    words = "(no value)" if values[name] in (None, "") else _shown(values[name])
    shown = words if len(words) <= SHOWN_CHARACTERS else f"{words[:SHOWN_CHARACTERS]}..."
    return f"--{name} {shown}: must be {' or '.join(rules)}."


def _rule(error: ErrorDetails) -> str:
    """What a value must be, as the end of a sentence."""
    kind, limits = error["type"], error.get("ctx", {})
    if kind in ("enum", "literal_error"):
        return str(limits["expected"]).replace("'", "")
    for start, rule in _RULES.items():
        if kind.startswith(start):
            return rule.format(**limits)
    return str(error["msg"]).removeprefix("Input should be ")
