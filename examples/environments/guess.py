"""Guess a number with a tool: each guess is answered with "higher" or "lower", until it is right or no guess is left.

    python examples/environments/guess.py --part train > numbers.jsonl
    togi rl --environment examples/environments/guess.py:Guess --prompt_data numbers.jsonl --apply_chat_template ...

A row has a ``number``, and may have ``low`` and ``high``: {"number": 7}. Ranges of the part "test" are not in "train".
"""

from __future__ import annotations

import argparse
import json
import random


def called(number: int, order: int) -> dict[str, object]:
    """A guess as an assistant's message in OpenAI's form, which the chat template writes in the model's own format."""
    function = {"name": "guess", "arguments": {"number": number}}
    call = {"id": f"example{order:02d}", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def answered(text: str, order: int) -> dict[str, object]:
    return {"role": "tool", "name": "guess", "tool_call_id": f"example{order:02d}", "content": text}


class Guess:
    """An episode is an object of this class. Public methods are tools; ``done`` ends the episode."""

    done = False

    def reset(
        self, number: int, low: int = 1, high: int = 9, guesses: int = 4, **row: object
    ) -> list[dict[str, object]]:
        """Begin with a row of the data: an example of a round, as small models need one, then the question."""
        self.number, self.left, self.guesses = number, guesses, guesses
        self.closeness, self.width = 0.0, high - low
        question = "I think of a whole number from {} to {}. Find it with the tool guess."
        return [
            {"role": "user", "content": question.format(51, 59)},
            called(55, 1),
            answered("Higher.", 1),
            called(57, 2),
            answered("Right.", 2),
            {"role": "user", "content": question.format(30, 38)},
            called(34, 3),
            answered("Lower.", 3),
            called(32, 4),
            answered("Right.", 4),
            {"role": "user", "content": question.format(low, high)},
        ]

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: Your guess.
        """
        self.left -= 1
        self.closeness = max(self.closeness, 1 - abs(number - self.number) / self.width)
        if number == self.number:
            self.done = True
            return "Right."
        if self.left == 0:
            self.done = True
            return f"Wrong, and no guess is left. It was {self.number}."
        return "Higher." if number < self.number else "Lower."

    def reward(self) -> dict[str, float]:
        """1 for a number that was found, and a little for a guess near it and for guesses that are left."""
        found = self.done and self.closeness == 1
        return {"found": float(found), "near": 0.2 * self.closeness, "saved": 0.2 * found * self.left / self.guesses}


def rows(part: str) -> list[dict[str, int]]:
    """Every number of nine in forty ranges; one range in eight is held out."""
    starts = [low for low in range(1, 41) if (low % 8 == 0) == (part == "test")]
    made = [{"number": number, "low": low, "high": low + 8} for low in starts for number in range(low, low + 9)]
    random.Random(0).shuffle(made)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["train", "test"], default="train")
    for row in rows(parser.parse_args().part):
        print(json.dumps(row))
