"""builtin:length: 1 for a response of ``--length_target`` tokens, falling to 0 at none and at twice as many.

With n tokens (including the end token), the target L and the distance d = min(1, |n - L| / L):

    linear: 1 - d            cosine: (1 + cos(pi d)) / 2

The label is not used. Meant to be added to another reward: ``--reward_func builtin:math,builtin:length --reward_weights 1 0.2``.
"""

from __future__ import annotations

import math
from typing import Any

from togi.config.choices import LengthShape


def reward_func(
    queries: list[str],
    prompts: list[str],
    labels: list[Any],
    response_lengths: list[int],
    length_target: str,
    length_shape: str,
    **kwargs: Any,
) -> list[float]:
    """A reward in [0, 1] per query."""
    shape = LengthShape(length_shape)
    return [length_reward(length, int(length_target), shape) for length in response_lengths]


def length_reward(length: int, target: int, shape: LengthShape) -> float:
    """The formula above."""
    distance = min(1.0, abs(length - target) / target)
    return 1 - distance if shape is LengthShape.LINEAR else (1 + math.cos(math.pi * distance)) / 2
