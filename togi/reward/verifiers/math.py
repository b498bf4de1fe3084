"""builtin:math: is the response's answer mathematically equal to the label? By math-verify (``pip install 'togi[rewards]'``).

The label is a number or LaTeX, alone or in a text with its answer in \\boxed{}; in a GSM8K solution the text after the last "####"
counts. The answer is the response's last boxed expression, or else its last expression. No answer, or one that cannot be judged
within seconds, counts as wrong: a model must not gain by confusing its judge.
"""

from functools import lru_cache

from math_verify import parse, verify

from togi.reward.verifiers import Labels, Texts, plain_text, unusable


def reward_func(queries: Texts, prompts: Texts, labels: Labels, responses: Texts, **kwargs: object) -> list[float]:
    """1 or 0 per query. Raises Complaint for a label without an answer."""
    return [
        float(verify(gold(plain_text(label)), parse(response)))
        for response, label in zip(responses, labels, strict=True)
    ]


@lru_cache(maxsize=64)
def gold(label: str) -> list[object]:
    """The expressions of a label. Raises Complaint if there are none."""
    text = label.rsplit("####", 1)[-1].strip()
    found: list[object] = parse(text if "\\boxed" in text else rf"\boxed{{{text}}}")
    if not found:
        raise unusable(label, "holds no answer")
    return found
