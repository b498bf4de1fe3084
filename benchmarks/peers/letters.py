"""A reward for both sides of the whole GRPO step that costs nothing: the share of the letter e in a response."""

from __future__ import annotations

from typing import Any


def share_of_e(response: str) -> float:
    return response.count("e") / max(1, len(response))


def reward_func(queries: list[str], prompts: list[str], labels: list[Any], **kwargs: Any) -> list[float]:
    """As Togi calls it: a query is a prompt and its response."""
    return [share_of_e(query[len(prompt) :]) for query, prompt in zip(queries, prompts, strict=True)]
