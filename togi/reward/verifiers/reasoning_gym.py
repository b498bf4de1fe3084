"""builtin:reasoning_gym: the tasks of reasoning-gym, by the package's own verifiers (``pip install 'togi[rewards]'``).

The label is a JSON object {"task": name, "answer": answer, "metadata": {...}}, as in rows made like this:

    for row in reasoning_gym.create_dataset("chain_sum", size=100, seed=1):
        label = {"task": "chain_sum", "answer": row["answer"], "metadata": row["metadata"]}
        print(json.dumps({"input": row["question"], "label": label}))

The answer is the text in the response's last <answer>...</answer>, or else its last line. An empty answer gets 0.

Some verifiers evaluate the answer as Python or SymPy, which a model can use to hang the worker or worse. For tasks with plain
arithmetic as answer, anything else gets 0 without running the verifier; other such tasks are refused.
"""

import re
from collections.abc import Callable
from functools import lru_cache

from togi.reward.verifiers import Labels, Texts, unusable

ARITHMETIC_TASKS = {"countdown", "puzzle24"}
EVALUATING_TASKS = {
    "binary_matrix",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
}
PLAIN_ARITHMETIC = re.compile(r"(?!.*(\*\s*\*|/\s*/))[0-9+\-*/(). ]{1,200}")
ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def reward_func(queries: Texts, prompts: Texts, labels: Labels, responses: Texts, **kwargs: object) -> list[float]:
    """One score in [0, 1] per query. Most verifiers give a small score to a wrong answer in the right format."""
    return [score(answer_of(response), label) for response, label in zip(responses, labels, strict=True)]


def answer_of(response: str) -> str:
    """The answer in a response; "" if there is none."""
    tagged = ANSWER.findall(response)
    if tagged:
        return str(tagged[-1]).strip()
    lines = response.strip().splitlines()
    return lines[-1].strip() if lines else ""


def score(answer: str, label: object) -> float:
    """The verifier's score of one answer. Raises Complaint for a label that is not as described above."""
    if not isinstance(label, dict) or not {"task", "answer", "metadata"} <= label.keys():
        raise unusable(
            label, 'is not an object with "task", "answer" and "metadata"', "point --label_key at such a field"
        )
    task = label["task"]
    if task in EVALUATING_TASKS:
        raise unusable(task, "names a task whose verifier evaluates what the model wrote", "leave this task out")
    if not answer or (task in ARITHMETIC_TASKS and not PLAIN_ARITHMETIC.fullmatch(answer)):
        return 0.0
    return float(verifier(task)(answer, label))


@lru_cache
def verifier(task: str) -> Callable[[str, dict[str, object]], float]:
    """The package's scoring function of a task, created once per worker."""
    from reasoning_gym import get_score_answer_fn

    found: Callable[[str, dict[str, object]], float] = get_score_answer_fn(task)
    return found
