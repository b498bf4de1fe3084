"""Turn scored rows into training rows: the best output of each prompt, best and worst, or every output with its reward.

A scored row has "input" and "output" (texts), "reward" (a number, or null where the reward abstained), and any other columns
of the generation. Rows of one input form a group wherever they stand; inputs keep the order of their first appearance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from togi.algo.best_of_n import best, best_and_worst, standardized
from togi.config.choices import PostProcessor
from togi.data.reward_text import with_reward

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Selection:
    """``rows`` to train on. ``inputs``: distinct inputs that have a reward; ``ties``: inputs whose outputs all have the same
    reward, which make no pair; ``unscored``: rows without a reward.
    """

    rows: tuple[dict[str, Any], ...]
    inputs: int
    ties: int = 0
    unscored: int = 0

    def describe(self) -> str:
        """The counts in words."""
        parts = [f"{len(self.rows)} rows from {self.inputs} inputs"]
        if self.ties > 0:
            parts.append(f"{self.ties} inputs make no pair, their outputs have equal rewards")
        if self.unscored > 0:
            parts.append(f"{self.unscored} outputs without a reward are left out")
        return "; ".join(parts)


def select(
    rows: Sequence[Row], processor: PostProcessor, *, reward_template: str, standardize: bool = False
) -> Selection:
    """Apply a post-processor. ``standardize``: z-score the rewards over all rows before they enter the input (csft only)."""
    match processor:
        case PostProcessor.RS:
            return rejection_sampling(rows)
        case PostProcessor.ITER_DPO:
            return pairs(rows)
        case PostProcessor.CSFT:
            return conditional(rows, reward_template, standardize=standardize)


def rejection_sampling(rows: Sequence[Row]) -> Selection:
    """The best output of each input, unchanged; the first one among equals."""
    groups, unscored = _groups(rows)
    chosen = [dict(group[best(_rewards(group))]) for group in groups]
    return Selection(tuple(chosen), len(groups), unscored=unscored)


def pairs(rows: Sequence[Row]) -> Selection:
    """Best and worst output of each input as {prompt, chosen, chosen_reward, rejected, rejected_reward}. Skips ties."""
    groups, unscored = _groups(rows)
    found = []
    for group in groups:
        places = best_and_worst(_rewards(group))
        if places is None:
            continue
        chosen, rejected = group[places[0]], group[places[1]]
        # Other columns come from the chosen output.
        rest = {name: value for name, value in chosen.items() if name not in ("input", "output", "reward")}
        found.append(
            rest
            | {
                "prompt": chosen["input"],
                "chosen": chosen["output"],
                "chosen_reward": chosen["reward"],
                "rejected": rejected["output"],
                "rejected_reward": rejected["reward"],
            }
        )
    return Selection(tuple(found), len(groups), ties=len(groups) - len(found), unscored=unscored)


def conditional(rows: Sequence[Row], reward_template: str, *, standardize: bool) -> Selection:
    """Every output, with its reward written into the input."""
    scored = [row for row in rows if row["reward"] is not None]
    rewards = standardized(_rewards(scored)) if standardize else _rewards(scored)
    told = [
        {**row, "input": with_reward(reward_template, row["input"], reward), "reward": reward}
        for row, reward in zip(scored, rewards, strict=True)
    ]
    inputs = len({_key(row) for row in scored})
    return Selection(tuple(told), inputs, unscored=len(rows) - len(scored))


def _key(row: Row) -> str:
    """The identity of an input, which may be a list of messages."""
    return json.dumps(row["input"], sort_keys=True)


def _rewards(rows: Sequence[Row]) -> list[float]:
    return [float(row["reward"]) for row in rows]


def _groups(rows: Sequence[Row]) -> tuple[list[list[Row]], int]:
    """Rows with a reward, grouped by input, and the number of rows without one."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["reward"] is not None:
            groups.setdefault(_key(row), []).append(row)
    return list(groups.values()), len(rows) - sum(map(len, groups.values()))
