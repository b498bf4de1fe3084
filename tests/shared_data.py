"""Public data sets that lie outside the repository: TOGI_SHARED_DATA names their folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def shared_file(name: str) -> Path:
    """The path of a set. Skips the test where there is no such folder: the rows may not be copied into the repository."""
    folder = os.environ.get("TOGI_SHARED_DATA")
    if folder is None or not (Path(folder) / name).is_file():
        pytest.skip(f"set TOGI_SHARED_DATA to the folder that holds {name}")
    return Path(folder) / name


def shared_rows(name: str) -> list[dict[str, Any]]:
    """The rows of a set of JSON lines. A line ends with a line feed and nothing else."""
    return [json.loads(line) for line in shared_file(name).read_text(encoding="utf-8").split("\n") if line]
