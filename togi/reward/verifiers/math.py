"""builtin:math: is the response's answer mathematically equal to the label? By math-verify (``pip install '.[rewards]'``).

The label is a number or LaTeX, alone or in a text with its answer in \\boxed{}; in a GSM8K solution the text after the last "####"
counts. A full stop after it is left out, and 1e-05 is read as 0.00001. The answer is the response's last boxed expression, or
else its last expression. No answer, or one that cannot be judged within seconds, counts as wrong: a model must not gain by
confusing its judge.
"""

import re
from decimal import Decimal
from functools import lru_cache

from math_verify import parse, verify

from togi.reward.verifiers import Labels, Texts, judged, plain_text, unusable

EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d{1,3}")
# A label that surely holds an answer. Every label is checked before a run, and to parse one takes milliseconds.
SURE = re.compile(r"\\boxed\{(\$?[-+(\[]?\s*(\\[a-z]++)?+\s*\{*\s*\w.*)\}|.*\\boxed\{\s*\w[^{}]*\}.*", re.DOTALL)


def reward_func(
    queries: Texts, prompts: Texts, labels: Labels, responses: Texts | None = None, **kwargs: object
) -> list[float | None]:
    """1 or 0 per query. Raises Complaint for a label without an answer."""
    return judged(
        labels, responses, check, lambda response, label: float(verify(gold(plain_text(label)), parse(response)))
    )


def check(label: object) -> None:
    """Raise Complaint for a label without an answer."""
    text = plain_text(label)
    if not SURE.fullmatch(boxed(text)):
        gold(text)


@lru_cache(maxsize=64)
def gold(label: str) -> list[object]:
    """The expressions of a label. Raises Complaint if there are none."""
    found: list[object] = parse(boxed(label))
    if not found:
        raise unusable(label, "holds no answer")
    return found


def boxed(label: str) -> str:
    """The answer of a label in a box, or the whole text if it has one."""
    text = label.rsplit("####", 1)[-1].strip()
    if "\\boxed" in text:
        return text
    text = text.removesuffix(".")
    return rf"\boxed{{{Decimal(text):f}}}" if EXPONENT.fullmatch(text) else rf"\boxed{{{text}}}"
