"""The declaration of a setting: a typed pydantic field with a help text, and whether it is supported yet.

Also the type of a setting that may be a function of the user's: ``FILE.py:name`` as a flag, a callable from Python.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypedDict, TypeVar, Unpack

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError

from togi.errors import ConfigError

AUTO: Literal["auto"] = "auto"
_LATER = "not_supported_yet"


def _integral(value: object) -> object:
    """Accept 1e8 and "1e8" as integers, as is common for these flags; 1.5 stays an error."""
    if isinstance(value, str) and not value.lstrip("+-").isdigit():
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _path(value: object) -> object:
    """A ``pathlib`` path as text, with ~ expanded, because a YAML file has no shell to do it."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111  an unknown ~user stays


Int = Annotated[int, BeforeValidator(_integral)]
Count = Annotated[Int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
FromZero = Annotated[float, Field(ge=0)]
SEEDS = 2**32  # the seeds that every random generator takes, from 0
Seed = Annotated[Int, Field(ge=0, le=SEEDS - 1)]
CountOrAuto = Count | Literal["auto"]
PathText = Annotated[str, Field(min_length=1), BeforeValidator(_path)]


class Settings(BaseModel):
    """Frozen and closed: an unknown name is an error, nothing changes after parsing, and every number is finite."""

    # Deferred: the validator is built for the class that a command parses, not for every imported class.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=False, defer_build=True
    )

    def changed(self, *names: str) -> dict[str, object]:
        """The settings in ``names`` that are not at their defaults, with their values."""
        values, fields = dict(self), type(self).model_fields
        return {name: values[name] for name in names if values[name] != fields[name].default}

    def preset(self, given: Mapping[str, object]) -> tuple[str, Mapping[str, object]]:
        """Values that one setting implies for others not ``given``, and its flag with its value; none by default."""
        return "", {}


Value = TypeVar("Value")


class Limits(TypedDict, total=False):
    """The range of a number, as pydantic names it."""

    ge: float
    gt: float
    le: float
    lt: float


def flag(default: Value, help_text: str, **limits: Unpack[Limits]) -> Value:
    """A supported setting. For the type checker it is its default, as for pydantic's own ``Field``."""
    field: Value = Field(default, description=help_text, **limits)
    return field


def later(default: Value, help_text: str) -> Value:
    """A known setting that is not supported yet: any value but its default is refused."""
    field: Value = Field(default, description=help_text, json_schema_extra={_LATER: True})
    return field


def refuse(config: Settings, problems: Iterable[str]) -> None:
    """Raise ConfigError with the first contradiction between settings. In it {name} stands for a flag with its value."""
    flags = {name: as_flag(name, value) for name, value in config}
    for message in problems:
        raise ConfigError(re.sub(r"{(\w+)}", lambda found: flags.get(found[1], found[0]), message))


def as_flag(name: str, value: object) -> str:
    """A setting as on the command line: "--seed 1", "--bf16", "--no_bf16"; the name alone for no value."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    words = value if isinstance(value, tuple) else () if value is None else (value,)
    return " ".join((f"--{name}", *(f"{word:.15g}" if isinstance(word, float) else str(word) for word in words)))


def missing(config: Settings, **required: str) -> Iterator[str]:
    """Required settings without a value. ``required``: what each is, in words."""
    yield from (f"--{name} is required: {words}." for name, words in required.items() if not dict(config)[name])


def unread(config: Settings, readers: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """Settings that were changed although the one that reads them is off. ``readers``: the names of each."""
    for reader, names in readers.items():
        if dict(config)[reader] in (None, False, 0):
            for name in config.changed(*names):
                yield f"{{{name}}} has no effect without --{reader}: add it, or leave the first out."


def is_later(config_class: type[BaseModel], name: str) -> bool:
    """Whether the setting is refused for now."""
    extra = config_class.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and _LATER in extra


IN_PYTHON = "python"


@dataclass(frozen=True, slots=True)
class Hook:
    """The place of a function: ``path`` of its file and ``name`` in it; or the ``function`` itself, given from Python."""

    path: str
    name: str
    function: Callable[..., object] | None = field(default=None, compare=False, repr=False)

    # A hook may stand in for a built-in estimator. What it does with groups is up to it.
    uses_groups = False

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


def hook_of(text: str) -> Hook | None:
    """The place that a text names as FILE.py:name; None for any other text."""
    path, colon, name = text.rpartition(":")
    return Hook(path, name) if colon and path.endswith(".py") and name.isidentifier() else None


def _hook(value: object, *, what: str = "function") -> Hook:
    if isinstance(value, Hook):
        return value
    if isinstance(value, str):
        if (found := hook_of(value)) is not None:
            return found
    elif callable(value):
        return Hook(IN_PYTHON, str(getattr(value, "__name__", type(value).__name__)), value)
    raise PydanticCustomError("hook", "FILE.py:name of a {what}", {"what": what})


HookField = Annotated[Hook, PlainValidator(_hook), PlainSerializer(str, return_type=str)]


def _hooks(value: object) -> dict[str, Hook]:
    if isinstance(value, Mapping):
        return {str(name): _hook(hook, what="class") for name, hook in value.items()}
    if not isinstance(value, str):
        hook = _hook(value, what="class")
        return {hook.name: hook}
    found: dict[str, Hook] = {}
    for item in filter(None, (part.strip() for part in value.split(","))):
        before, _, place = item.rpartition("=")
        hook = _hook(place, what="class")
        if (name := before or hook.name) in found:
            raise PydanticCustomError("hooks", f"a name for each, as name=FILE.py:Class, as two are named {name}")
        found[name] = hook
    return found


def _listed_hooks(hooks: Mapping[str, Hook]) -> str:
    return ",".join(str(hook) if name == hook.name else f"{name}={hook}" for name, hook in hooks.items())


HooksField = Annotated[
    Mapping[str, Hook], PlainValidator(_hooks), PlainSerializer(_listed_hooks, return_type=str, when_used="unless-none")
]
"""FILE.py:name by name; without a name by that of what it defines. From Python also what it defines itself, or a mapping."""
