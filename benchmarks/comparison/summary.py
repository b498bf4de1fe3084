"""From the steps of a run to its rates, and from all runs of a case to a table.

A step's time is from the end of the step before to its own end, on both sides, so it holds everything that a user waits for. The
first two steps warm up and are not counted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Size:
    """A model: parameters that tokens are multiplied with (tied ones once), layers, and heads x head size: attention's width."""

    parameters: int
    layers: int
    width: int


@dataclass(frozen=True, slots=True)
class Work:
    """Of one optimizer step: real tokens, and the sum over sequences of length squared."""

    tokens: int
    squares: int


@dataclass(frozen=True, slots=True)
class Steps:
    """What one process tree left behind. ``ends``: seconds on any clock, one a step, each at the end of the step.

    ``launch``: seconds from starting the process to the end of the first step. ``losses`` and ``grad_norms``: one a step.
    """

    ends: tuple[float, ...]
    launch: float
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    work: tuple[Work, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One row of results."""

    side: str
    setting: str
    tokens_per_second: float
    gflops: float
    peak_gb: float
    launch_seconds: float
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    step_seconds: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def flops(size: Size, work: Work, frozen: int) -> float:
    """Floating-point operations of a step: (6 + 2 x frozen) x (parameters x tokens + layers x width x squares).

    A forward costs 2 a parameter and token, and causal attention 2 x layers x width x length squared (half of the full square, of
    two products); a backward costs twice a forward. What sharing a prompt saves is counted as if it had been computed.
    """
    return (6 + 2 * frozen) * (size.parameters * work.tokens + size.layers * size.width * work.squares)


def summarise(side: str, setting: str, steps: Steps, peak_gb: float, size: Size, frozen: int) -> Run:
    """Medians over the steps after the first two, of which there must be some."""
    assert len(steps.ends) == len(steps.work) > WARM_UP, "there are not as many steps as were asked for"
    seconds = tuple(after - before for before, after in pairwise(steps.ends))
    steady = [(seconds[place - 1], steps.work[place]) for place in range(WARM_UP, len(steps.ends))]
    return Run(
        side=side,
        setting=setting,
        tokens_per_second=median(work.tokens / taken for taken, work in steady),
        gflops=median(flops(size, work, frozen) / taken / 1e9 for taken, work in steady),
        peak_gb=peak_gb,
        launch_seconds=steps.launch,
        losses=steps.losses,
        grad_norms=steps.grad_norms,
        step_seconds=seconds,
    )


def fastest(runs: Sequence[Mapping[str, Any]], peer: str, allowed: Collection[str]) -> str | None:
    """The setting of a peer with the highest rate among those ``allowed``, None if there is no run of one."""
    own = [run for run in runs if run["side"] == peer and run["setting"] in allowed]
    return max(own, key=lambda run: run["tokens_per_second"])["setting"] if own else None


def table(case: str, runs: Sequence[Mapping[str, Any]], machine: Mapping[str, float], precision: str) -> str:
    """Markdown: medians of each side, and what Togi's is to each peer's. ``runs`` as in the JSON file.

    ``precision``: of both sides' products, "bf16" or "fp32".
    """
    sides = list(dict.fromkeys((run["side"], run["setting"]) for run in runs))
    peak_rate = machine[f"matmul_{precision}_gflops"]
    lines = [
        f"| {case} | tokens/s | of {precision} matmul | peak GB | launch s | loss first, last "
        "| gradient norm first, last | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    medians: dict[tuple[str, str], tuple[float, float, float]] = {}
    for side, setting in sides:
        own = [run for run in runs if (run["side"], run["setting"]) == (side, setting)]
        rate, gflops, peak, launch = (
            median(run[name] for run in own) for name in ("tokens_per_second", "gflops", "peak_gb", "launch_seconds")
        )
        medians[side, setting] = (rate, peak, launch)
        losses, norms = own[0]["losses"], own[0]["grad_norms"]
        lines.append(
            f"| {side} ({setting}) | {rate:.0f} | {100 * gflops / peak_rate:.0f} % | {peak:.2f} | {launch:.1f} | "
            f"{losses[0]:.4g}, {losses[-1]:.4g} | {norms[0]:.4g}, {norms[-1]:.4g} | {len(own)} |"
        )
    togi = next((values for (side, _), values in medians.items() if side == "togi"), None)
    for (side, setting), (rate, peak, launch) in medians.items():
        if togi is not None and side != "togi":
            lines.append(
                f"\ntogi / {side} ({setting}): {togi[0] / rate:.2f} x the tokens/s, {togi[1] / peak:.2f} x the memory, "
                f"{togi[2] / launch:.2f} x the time to the first step"
            )
    lines.append(
        f"\nmachine: matmul bf16 {machine['matmul_bf16_gflops']:.0f}, fp32 {machine['matmul_fp32_gflops']:.0f} GFLOP/s, "
        f"copy {machine['copy_gb_per_second']:.1f} GB/s, {machine['threads']:.0f} threads"
    )
    return "\n".join(lines)
