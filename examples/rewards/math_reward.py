r"""A reward for problems whose answer is a number, such as GSM8K: 1 if the response's number is the label's, else 0.

    togi rl --reward_func examples/rewards/math_reward.py --label_key target ...

The label is a number, or text that holds one (of a GSM8K solution that ends in "#### 18", what follows the last "####"
counts). The response's number is the one in its last ``\boxed{...}``, or else the last number it contains. Numbers are
compared exactly: "1,800", "$1800.00" and "1800 dollars" are equal, 0.33 and 1/3 are not. No number is a wrong answer.

FORMAT_WEIGHT pays for a boxed answer, right or wrong. It is 0 here; 0.1 helps a small model to find the format.
Standard library only, no evaluation of model output, a fraction of a millisecond per response.
"""

import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

FORMAT_WEIGHT = 0.0

UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# A minus counts as a sign unless something that can be subtracted from stands directly before it: "12-5" ends in 5.
NUMBER = re.compile(rf"((?:(?<![\w.)\]}}])-)?)\\?[$€£]?({UNSIGNED})(?:/({UNSIGNED}))?")
LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
BOX_OR_BRACE = re.compile(r"\\boxed\{|[{}]")


def reward_func(queries: list[str], prompts: list[str], labels: list[Any], **kwargs: Any) -> dict[str, Any]:
    """The rewards as the sum of ``correct`` (0 or 1) and FORMAT_WEIGHT x ``boxed`` (0 or 1)."""
    responses = [query[len(prompt) :] for query, prompt in zip(queries, prompts, strict=True)]
    boxes = [last_boxed(response) for response in responses]
    answers = [last_number(response if box is None else box) for response, box in zip(responses, boxes, strict=True)]
    correct = [float(answer == label_number(label)) for answer, label in zip(answers, labels, strict=True)]
    boxed = [float(box is not None) for box in boxes]
    return {
        "rewards": [right + FORMAT_WEIGHT * box for right, box in zip(correct, boxed, strict=True)],
        "scores": correct,
        "extra_logs": {"correct": correct, "boxed": boxed},
    }


def label_number(label: Any) -> Fraction:
    """The number of a label. Raises ValueError when there is none: such a row cannot be trained on."""
    number = last_number(str(label).rsplit("####", 1)[-1])
    if number is None:
        raise ValueError(f"the label {str(label)[:80]!r} holds no number; point --label_key at the answer field")
    return number


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly, or None. Commas, currency signs and units are ignored."""
    text = LATEX_FRACTION.sub(r"\1/\2", text).replace("{,}", ",").replace("\u2212", "-")
    numbers = NUMBER.findall(text)
    if not numbers:
        return None
    sign, numerator, denominator = numbers[-1]
    divisor = exact(denominator or "1")
    if divisor == 0:
        return None
    number = exact(numerator) / divisor
    return -number if sign else number


def exact(digits: str) -> Fraction:
    """Through Decimal, because int() refuses texts of more than 4300 digits and a model may well write one."""
    return Fraction(Decimal(digits.replace(",", "")))


def last_boxed(text: str) -> str | None:
    r"""What stands in the ``\boxed{...}`` that closes last, or None. One pass, however many boxes stay open."""
    found = None
    open_braces: list[re.Match[str]] = []
    for mark in BOX_OR_BRACE.finditer(text):
        if mark.group() != "}":
            open_braces.append(mark)
        elif open_braces:
            opening = open_braces.pop()
            if opening.group() != "{":
                found = text[opening.end() : mark.start()]
    return found
