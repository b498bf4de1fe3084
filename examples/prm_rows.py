"""Step labels in other shapes -> the rows that ``togi prm`` reads: a text with a marker after each step, a list of labels.

    python examples/prm_rows.py IN.jsonl OUT.jsonl --marker "<file_sep>"
    togi prm --dataset OUT.jsonl --input_key text --label_key labels --placeholder_token "<file_sep>" --reward_tokens + - ...

Two shapes are known by their fields:

* ``prompt``, ``steps`` and ``labels`` (lists; true, false or null for a step that nobody judged): steps from the first one
  without a judgement on are left out;
* ``input`` and ``label`` of Math-Shepherd: two texts, the steps of the first end in "ки", those of the second in + or -.

The marker must be one token of the model's tokenizer: a special token that is never trained on otherwise does well.
"""

from __future__ import annotations

import argparse
import json
from itertools import takewhile
from pathlib import Path
from typing import Any

STEP_END = "ки"
SIGNS = "+-"


def from_steps(row: dict[str, Any], marker: str) -> dict[str, Any]:
    """One line a step, after the prompt."""
    pairs = zip(row["steps"], row["labels"], strict=True)
    judged = list(takewhile(lambda pair: pair[1] is not None, pairs))
    text = "\n".join([row["prompt"], *(f"{step} {marker}" for step, _ in judged)])
    return {"text": text, "labels": [SIGNS[0] if right else SIGNS[1] for _, right in judged]}


def from_math_shepherd(row: dict[str, Any], marker: str) -> dict[str, Any]:
    """The label of each step is where its end is in the other text."""
    *steps, rest = row["input"].split(STEP_END)
    labels, position = [], 0
    for step in steps:
        position += len(step)
        sign = row["label"][position : position + 1]
        if not row["label"].startswith(step, position - len(step)) or sign not in tuple(SIGNS):
            raise ValueError(f"the texts differ, or there is no + or -, at character {position} of the label")
        labels.append(sign)
        position += 1
    return {"text": marker.join(steps) + marker + rest, "labels": labels}


def convert(row: dict[str, Any], marker: str) -> dict[str, Any]:
    """A row of either shape. Raises ValueError where labels do not fit, or the marker is in the text already."""
    result = from_steps(row, marker) if "steps" in row else from_math_shepherd(row, marker)
    if result["text"].count(marker) != len(result["labels"]):
        raise ValueError(f"the marker {marker!r} is in the text already: choose another")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--marker", required=True)
    arguments = parser.parse_args()
    rows = []
    lines = arguments.source.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(convert(json.loads(line), arguments.marker))
            except (ValueError, KeyError) as error:
                raise SystemExit(f"Line {number} of {arguments.source}: {error}") from None
    arguments.target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows in {arguments.target}")


if __name__ == "__main__":
    main()
