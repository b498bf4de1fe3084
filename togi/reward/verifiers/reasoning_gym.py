"""builtin:reasoning_gym: the tasks of reasoning-gym, by the package's own verifiers (``pip install '.[rewards]'``).

The label is a JSON object {"task": name, "answer": answer, "metadata": {...}}, as in rows made like this:

    for row in reasoning_gym.create_dataset("chain_sum", size=100, seed=1):
        label = {"task": "chain_sum", "answer": row["answer"], "metadata": row["metadata"]}
        print(json.dumps({"input": row["question"], "label": label}))

The answer is the text in the response's last <answer>...</answer>, or else its last line. An empty answer gets 0.

Some verifiers evaluate the answer as Python or SymPy, which a model can use to hang the worker or worse. For tasks with plain
arithmetic as answer, anything else gets 0 without running the verifier; other such tasks are refused.

An answer that makes a verifier raise gets 0, as does a number that is not finite. Every label is checked before a run: its own
answer, unless it is null (the task has many), must score 1, and an answer that says nothing must not. So game_of_life_halting,
which pays for any text, and coin_flip, which pays for the first digits of a number, are refused.
"""

import cmath
import math
import re
from collections.abc import Callable
from functools import lru_cache

from togi.reward.verifiers import Labels, Texts, judged, unusable

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
# Tasks whose verifier compares the answer with the tuples of the grid "output", which are lists in JSON.
GRID_TASKS = {"arc_agi", "rearc"}
NEARLY_ONE = 0.99
PLAIN_ARITHMETIC = re.compile(r"(?!.*(\*\s*\*|/\s*/))[0-9+\-*/(). ]{1,200}")
ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def reward_func(
    queries: Texts, prompts: Texts, labels: Labels, responses: Texts | None = None, **kwargs: object
) -> list[float | None]:
    """One score in [0, 1] per query. Most verifiers give a small score to a wrong answer in the right format."""
    return judged(labels, responses, check, lambda response, label: score(answer_of(response), label))


def answer_of(response: str) -> str:
    """The answer in a response; "" if there is none."""
    tagged = ANSWER.findall(response)
    if tagged:
        return str(tagged[-1]).strip()
    lines = response.strip().splitlines()
    return lines[-1].strip() if lines else ""


def check(label: object) -> None:
    """Raise Complaint for a label whose own answer does not score 1, or with which an answer that says nothing does."""
    task, entry = entry_of(label)
    own = str(entry["answer"])
    if not own.strip():
        raise unusable(label, f"has an empty answer to its task {task}, which scores 0", "leave such rows out")
    found = score(answer_of(f"<answer>{own}</answer>"), label)
    if entry["answer"] is not None and found < NEARLY_ONE:
        raise unusable(
            label,
            f"has an answer that its task {task} scores {found:g}, not 1",
            "write answer and metadata as the installed reasoning-gym makes them, or leave this task out",
        )
    # Zero, in any form, may be the right answer.
    for nothing in ("?", "0") if own.strip("+-0. ") else ("?",):
        if score(nothing, label) >= NEARLY_ONE:
            raise unusable(
                task, f"names a task whose verifier scores {nothing!r} 1, as if it were right", "leave this task out"
            )


def score(answer: str, label: object) -> float:
    """The verifier's score of one answer. Raises Complaint for a label that is not as described above."""
    task, entry = entry_of(label)
    judge = verifier(task)
    if not answer or (task in ARITHMETIC_TASKS and not PLAIN_ARITHMETIC.fullmatch(answer)):
        return 0.0
    if not is_finite(answer) and answer != entry["answer"]:
        return 0.0
    try:
        found = float(judge(answer, entry))
    except Exception:  # noqa: BLE001  the package's verifiers raise what they like at answers that they do not expect
        return 0.0
    return found if math.isfinite(found) else 0.0


def entry_of(label: object) -> tuple[str, dict[str, object]]:
    """The task of a label and its row as the package made it. Raises Complaint."""
    match label:
        case {"task": str(task), "answer": answer, "metadata": dict(metadata)}:
            pass
        case _:
            raise unusable(
                label, 'is not an object with "task", "answer" and "metadata"', "point --label_key at such a field"
            )
    if task in EVALUATING_TASKS:
        raise unusable(task, "names a task whose verifier evaluates what the model wrote", "leave this task out")
    if task in GRID_TASKS and isinstance(grid := metadata.get("output"), list):
        metadata = {**metadata, "output": tuple(tuple(row) if isinstance(row, list) else row for row in grid)}
    return task, {"task": task, "answer": answer, "metadata": metadata}


def is_finite(answer: str) -> bool:
    """Whether an answer is no real or complex number, or a finite one."""
    text = answer.replace(" ", "").lower().strip("()")
    for number in (text, text.replace("i", "j")):
        try:
            return cmath.isfinite(complex(number))
        except ValueError:
            continue
    return True


@lru_cache
def verifier(task: str) -> Callable[[str, dict[str, object]], float]:
    """The package's scoring function of a task, created once per worker. Raises Complaint if there is no such task."""
    from reasoning_gym import get_score_answer_fn

    try:
        found: Callable[[str, dict[str, object]], float] = get_score_answer_fn(task)
    except ValueError:
        raise unusable(task, "names no task of reasoning-gym", "leave this task out") from None
    return found
