"""builtin:exact: 1 if the response is the label, else 0. Surrounding and repeated white space is ignored."""

from __future__ import annotations

from typing import Any

from togi.reward.verifiers.labels import plain_text


def reward_func(
    queries: list[str], prompts: list[str], labels: list[Any], responses: list[str], **kwargs: Any
) -> list[bool]:
    """One True or False (1 or 0) per query. Raises BadReturnError for a label that is not a text or number."""
    return [response.split() == plain_text(label).split() for response, label in zip(responses, labels, strict=True)]
