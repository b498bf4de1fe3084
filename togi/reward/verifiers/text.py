"""The built-in functions over the text and length of a response: builtin:exact, builtin:format, builtin:length."""

import math
import re

from togi.config.choices import LengthShape
from togi.reward.verifiers import Labels, Texts, judged, plain_text


def exact(
    queries: Texts, prompts: Texts, labels: Labels, responses: Texts | None = None, **kwargs: object
) -> list[float | None]:
    """1 if the response is the label, else 0. Surrounding and repeated white space is ignored.

    A number is written without an exponent. Raises Complaint for a label that is not a text or number.
    """
    return judged(
        labels, responses, plain_text, lambda response, label: float(response.split() == plain_text(label).split())
    )


def format(
    queries: Texts, prompts: Texts, labels: Labels, responses: Texts, format_regex: str, **kwargs: object
) -> list[float]:
    """1 if the whole response matches the regular expression of ``--format_regex``, else 0.

    A dot matches line breaks too. A pattern that takes too long is killed with its process (``--reward_timeout``).
    """
    pattern = re.compile(format_regex, re.DOTALL)
    return [float(pattern.fullmatch(response.strip()) is not None) for response in responses]


def length(
    queries: Texts,
    prompts: Texts,
    labels: Labels,
    response_lengths: list[int],
    length_target: str,
    length_shape: str,
    **kwargs: object,
) -> list[float]:
    """1 for a response of ``--length_target`` tokens, falling to 0 at none and at twice as many.

    With n tokens (including the end token), the target L and the distance d = min(1, |n - L| / L):

        linear: 1 - d            cosine: (1 + cos(pi d)) / 2

    The label is not used. Meant to be added to another reward: ``--reward_func builtin:math,builtin:length
    --reward_weights 1 0.2``.
    """
    shape = LengthShape(length_shape)
    return [length_reward(tokens, int(length_target), shape) for tokens in response_lengths]


def length_reward(tokens: int, target: int, shape: LengthShape) -> float:
    """The formula of ``length``."""
    distance = min(1.0, abs(tokens - target) / target)
    return 1 - distance if shape is LengthShape.LINEAR else (1 + math.cos(math.pi * distance)) / 2
