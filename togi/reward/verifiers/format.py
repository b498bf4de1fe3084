"""builtin:format: 1 if the whole response matches the regular expression of ``--format_regex``, else 0.

A dot matches line breaks too. A pattern that takes too long is killed with its process (``--reward_timeout``).
"""

from __future__ import annotations

import re
from typing import Any


def reward_func(
    queries: list[str], prompts: list[str], labels: list[Any], responses: list[str], format_regex: str, **kwargs: Any
) -> list[float]:
    """1 or 0 per query."""
    pattern = re.compile(format_regex, re.DOTALL)
    return [float(pattern.fullmatch(response.strip()) is not None) for response in responses]
