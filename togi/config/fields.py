"""The declaration of a setting: a typed pydantic field with a help text, and whether it is supported yet."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

AUTO: Literal["auto"] = "auto"
_LATER = "not_supported_yet"


def _integral(value: Any) -> Any:
    """Accept 1e8 and "1e8" as integers, as is common for these flags; 1.5 stays an error."""
    if isinstance(value, str) and not value.lstrip("+-").isdigit():
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _path(value: Any) -> Any:
    """A ``pathlib`` path as text, with ~ expanded, because a YAML file has no shell to do it."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111  an unknown ~user stays


Int = Annotated[int, BeforeValidator(_integral)]
Count = Annotated[Int, Field(ge=1)]
CountOrAuto = Count | Literal["auto"]
PathText = Annotated[str, BeforeValidator(_path)]


class Settings(BaseModel):
    """Frozen and closed: an unknown name is an error and nothing changes after parsing."""

    # Deferred: the validator is built for the class that a command parses, not for every imported class.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, validate_default=False, defer_build=True)

    def changed(self, *names: str) -> dict[str, Any]:
        """The settings in ``names`` that are not at their defaults, with their values."""
        values = self.model_dump(include=set(names))
        return {name: values[name] for name in names if values[name] != type(self).model_fields[name].default}

    def preset(self, given: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        """Values that one setting implies for others not ``given``, and its flag with its value; none by default."""
        return "", {}


def flag(default: Any, help_text: str, **constraints: Any) -> Any:
    """A supported setting."""
    return Field(default, description=help_text, **constraints)


def later(default: Any, help_text: str) -> Any:
    """A known setting that is not supported yet: any value but its default is refused."""
    return Field(default, description=help_text, json_schema_extra={_LATER: True})


def is_later(config_class: type[BaseModel], name: str) -> bool:
    """Whether the setting is refused for now."""
    extra = config_class.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and _LATER in extra
