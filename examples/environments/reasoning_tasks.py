"""Tasks of reasoning-gym, where a wrong answer may be corrected: 'Wrong. Try again.' (``pip install reasoning-gym``).

    togi rl --environment examples/environments/reasoning_tasks.py:Task --prompt_data tasks.jsonl --apply_chat_template ...

A row has the name of a task and a seed, and may have ``tries`` (1 is a single turn) and ``options``, which are those of the task:
{"task": "chain_sum", "seed": 7, "tries": 3, "options": {"max_terms": 3}}. The same seed and options make the same task. Rows:

    python examples/environments/reasoning_tasks.py 1000 3 chain_sum spell_backward > tasks.jsonl

The answer is in the last <answer>...</answer>, or else the last line. The reward is the package's score of the last answer. Togi's
verifier builtin:reasoning_gym, which is asked for it, does not let the package evaluate what a model wrote.
"""

from __future__ import annotations

import json
import sys
from typing import Any

try:
    import reasoning_gym
except ModuleNotFoundError:
    raise ModuleNotFoundError("Tasks of reasoning-gym need the package: pip install reasoning-gym") from None

from togi.reward.verifiers.reasoning_gym import NEARLY_ONE, answer_of, check, score


class Task:
    """One task, answered at most ``tries`` times."""

    def reset(
        self, task: str, seed: int = 0, tries: int = 1, options: dict[str, Any] | None = None, **row: object
    ) -> str:
        """Begin. ``task``: its name in reasoning-gym."""
        entry = reasoning_gym.create_dataset(task, size=1, seed=seed, **(options or {}))[0]
        self._label = {"task": task, "answer": entry["answer"], "metadata": entry["metadata"]}
        check(self._label)
        self._left = tries
        more = f" You have {tries} tries." if tries > 1 else ""
        return f"{entry['question'].strip()}\n\nWrite your answer between <answer> and </answer>.{more}"

    def step(self, action: str) -> tuple[str, float | None, bool]:
        """Each text is a try, also one without an answer."""
        self._left -= 1
        found = score(answer_of(action), self._label)
        if found >= NEARLY_ONE or self._left <= 0:
            return "Right." if found >= NEARLY_ONE else "Wrong.", found, True
        return f"Wrong. Try again, {self._left} {'try is' if self._left == 1 else 'tries are'} left.", None, False


def main(count: str, tries: str, *tasks: str) -> None:
    """Print rows, as many of each task."""
    for seed in range(int(count)):
        for task in tasks:
            print(json.dumps({"task": task, "seed": seed, "tries": int(tries)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
