"""The token ids that end a sequence, from the files of a model folder. Never guessed from token values or the pad token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from togi.errors import ConfigError


def end_token_ids(folder: str) -> frozenset[int]:
    """All end-of-sequence ids of generation_config.json, config.json and the tokenizer. May be empty.

    Models often have several (Llama 3: end of text and end of turn), and the files often disagree: each of the ids ends a
    sequence. Raises ConfigError if the folder has no config.json.
    """
    root = Path(folder)
    if not (root / "config.json").is_file():
        raise ConfigError(f"{folder!r} is not a model folder: it has no config.json")
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        eos = _read(root / name).get("eos_token_id")
        if eos is not None:
            found.update(eos if isinstance(eos, list) else [eos])
    # the tokenizer configuration has the text of the token: look up its id
    token = _read(root / "tokenizer_config.json").get("eos_token")
    content = token["content"] if isinstance(token, dict) else token
    added = _read(root / "tokenizer.json").get("added_tokens", [])
    found.update(entry["id"] for entry in added if entry["content"] == content)
    return frozenset(found)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Empty if there is no such file, since not every model folder has all of them."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
