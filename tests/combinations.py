"""Every combination of the ways to compute one training step, and what the settings say to each: docs/parallelism.md.

    python -m tests.combinations > docs/parallelism.md

``tests/equal/test_combinations.py`` runs a selection in which every pair of values that may go together does, on two
processes, and compares each run with one plain process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import combinations, product
from pathlib import Path

from tests.offline_world import flags
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.config.rl_checks import check_rl
from togi.errors import ConfigError
from togi.methods import METHODS, check_method

Combination = Mapping[str, str]
LORA = ("--lora_rank", "4", "--target_modules", "q_proj", "v_proj")
RL = "rl"
# axis -> value -> flags. The first value of each is the plain one.
AXES: dict[str, dict[str, tuple[str, ...]]] = {
    "command": dict.fromkeys((*METHODS, RL), ()),
    "backend": {"fsdp2": (), "deepspeed": ("--backend", "deepspeed")},
    "ZeRO stage": {stage: ("--zero_stage", stage) for stage in "0123"},
    "ring": {"1": (), "2": ("--ring_attn_size", "2")},
    "tensor": {"whole": (), "split": ("--ds_tensor_parallel_size", "2")},
    "packing": {"packed": (), "one by one": ("--no_packing_samples",)},
    # in float32: experts are chosen by a comparison, which bfloat16's rounding decides otherwise for sums in another order
    "adapters": {"none": (), "LoRA": LORA, "QLoRA": (*LORA, "--load_in_4bit")},
    "layers": {"as they are": (), "compiled": ("--torch_compile",)},
    "experts": {"dense": (), "MoE": ("--aux_loss_coef", "0.5")},
}
RL_NEEDS = ("--pretrain", "model", "--prompt_data", "data.jsonl", "--reward_func", "builtin:math", "--label_key", "a")
COVERED = "tests/equal/test_combinations.py::test_pairs_of_ways_equal_one_plain_process"
# What shows more of a value than that it goes together with the others.
SHOWN_BY = {
    "sft": "tests/equal/test_offline_ranks.py::test_two_ranks_equal_one",
    "rl": "tests/e2e/test_rl_run.py",
    "deepspeed": "tests/equal/test_parallel_ranks.py::test_every_layout_equals_one_plain_process",
    "ring": "tests/equal/test_offline_ranks.py::test_a_ring_of_two_equals_one",
    "split": "tests/equal/test_tensor_parallel.py",
    "LoRA": "tests/equal/test_offline_ranks.py::test_adapters_on_two_ranks_equal_one",
    "compiled": "tests/equal/test_compiled_layers.py",
    "MoE": "tests/equal/test_offline_ranks.py::test_experts_on_two_ranks_equal_one",
    "one by one": "tests/equal/test_offline_ranks.py::test_micro_batches_equal_one_pack",
}


def everything() -> list[dict[str, str]]:
    """All combinations, sensible or not."""
    return [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]


def words(combination: Combination, axes: Iterable[str] = tuple(AXES)) -> list[str]:
    """The flags of the chosen values of ``axes``."""
    return [word for axis in axes for word in AXES[axis][combination[axis]]]


def refusal(combination: Combination) -> str | None:
    """What the settings say against it; None when they take it."""
    command, more = combination["command"], words(combination)
    try:
        if command == RL:
            check_rl(parse(RLConfig, [*RL_NEEDS, *more], command).config)
        else:
            check_method(parse(METHODS[command], flags(Path("w"), command, Path("r"), *more), command))
    except ConfigError as error:
        return str(error)
    return None


@cache
def verdicts() -> tuple[tuple[dict[str, str], str | None], ...]:
    """Every combination and what the settings say against it. There are thousands, so this takes half a minute."""
    return tuple((combination, refusal(combination)) for combination in everything())


def supported() -> tuple[dict[str, str], ...]:
    """All that the settings take."""
    return tuple(combination for combination, reason in verdicts() if reason is None)


def covering(supported: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """A selection that holds every pair of values that some supported combination holds, chosen greedily."""
    pairs = {id(c): set(combinations(c.items(), 2)) for c in supported}
    missing, chosen = set[tuple[tuple[str, str], ...]]().union(*pairs.values()), []
    while missing:
        best = max(supported, key=lambda c: len(pairs[id(c)] & missing))
        chosen.append(best)
        missing -= pairs[id(best)]
    return chosen


def boxes(chosen: Iterable[Combination]) -> list[dict[str, tuple[str, ...]]]:
    """The same combinations as few products of sets of values: rows that differ on one axis become one."""
    rows = [{axis: (value,) for axis, value in c.items()} for c in chosen]
    for axis in reversed(AXES):
        merged: dict[tuple[tuple[str, ...], ...], dict[str, tuple[str, ...]]] = {}
        for row in rows:
            key = tuple(values for other, values in row.items() if other != axis)
            values = (*merged[key][axis], *row[axis]) if key in merged else row[axis]
            merged[key] = {**row, axis: values}
        rows = list(merged.values())
    return rows


def page() -> str:
    """docs/parallelism.md."""
    accepted, trained = supported(), sum(len(covering(taken(layers))) for layers in AXES["layers"])
    lines = [
        "# Which ways of computing a step go together",
        "",
        "    .venv/bin/python -m tests.combinations > docs/parallelism.md    # makes this page again",
        "",
        f"The settings take {len(accepted)} of {len(verdicts())} combinations and refuse the others, each with the sentence",
        "below, before anything is loaded. Each works with any number of processes that the size of its ring or group divides,",
        "data parallel.",
        f"`{COVERED}`",
        f"trains a selection of {trained}, in which every pair of values that may go together on fixed data does, on two",
        "processes, and compares losses, gradient norms and saved weights with one plain process (with compiled layers in",
        "`make test-all`); `TOGI_COMBINATIONS=all` before the test's command trains all of them. What else shows a value:",
        "",
        *(f"* {value}: `{test}`" for value, test in SHOWN_BY.items()),
        "",
        "A row stands for all products of its values.",
        "",
        "## Supported",
        "",
        *table(boxes(accepted)),
        "",
        "## Refused",
        "",
    ]
    reasons: dict[str, list[dict[str, str]]] = {}
    for combination, reason in verdicts():
        if reason is not None:
            reasons.setdefault(reason, []).append(combination)
    for reason, refused in reasons.items():
        lines += [f"**{reason}**", "", *table(boxes(refused)), ""]
    return "\n".join(lines)


def taken(layers: str) -> list[dict[str, str]]:
    """What the settings take of the commands on fixed data, with such layers."""
    return [c for c in supported() if c["command"] != RL and c["layers"] == layers]


def table(rows: list[dict[str, tuple[str, ...]]]) -> list[str]:
    """A Markdown table; an axis on which anything goes says so."""
    head = [f"| {' | '.join(AXES)} |", "|" + "---|" * len(AXES)]
    shown = [
        ["any" if len(values) == len(AXES[axis]) else ", ".join(values) for axis, values in row.items()] for row in rows
    ]
    return head + [f"| {' | '.join(cells)} |" for cells in shown]


if __name__ == "__main__":
    sys.stdout.write(page())
