"""Removes secrets from what a run writes: configuration files, reports, trackers and log lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

SECRET_FLAGS = frozenset({"use_wandb", "wandb_api_key", "hf_token", "api_key"})
REDACTED = "<redacted>"
_URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
_MIN_WANDB_KEY = 32


def redact_value(name: str, value: object) -> object:
    """``value`` of the flag ``name`` as it may be shown. Logins inside URLs are removed for every flag."""
    if name in SECRET_FLAGS:
        return REDACTED if value not in (None, "", False) else value
    if isinstance(value, str):
        return _URL_LOGIN.sub(f"{REDACTED}@", value)
    if isinstance(value, list | tuple):
        return [redact_value(name, item) for item in value]
    return value


def redact_values(values: Mapping[str, object]) -> dict[str, object]:
    return {name: redact_value(name, value) for name, value in values.items()}


def redact_argv(argv: Sequence[str]) -> list[str]:
    """A command line with the values of secret flags replaced, in both forms: ``--flag value`` and ``--flag=value``."""
    shown: list[str] = []
    secret_next = False
    for word in argv:
        flag, equals, _ = word.removeprefix("--").partition("=")
        secret = word.startswith("--") and flag in SECRET_FLAGS
        if secret_next and not word.startswith("--"):
            shown.append(REDACTED)
        elif secret and equals:
            shown.append(f"--{flag}={REDACTED}")
        else:
            shown.append(str(redact_value("", word)))
        secret_next = secret and not equals
    return shown


def scrub(text: str, secrets: Iterable[str]) -> str:
    """``text`` without any of ``secrets``. Words shorter than eight characters are not treated as secrets."""
    for secret in secrets:
        if len(secret) >= 8:
            text = text.replace(secret, REDACTED)
    return text


def looks_like_wandb_key(word: str) -> bool:
    """Whether ``--use_wandb`` was given a key instead of a word such as "true": W&B keys have 40 or more characters."""
    return len(word) >= _MIN_WANDB_KEY and not any(character.isspace() for character in word)
