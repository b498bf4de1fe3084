"""Disciplines of asynchronous RL on a simulated machine: speed-up, lag, loss, length bias, masked tokens, idle shares.

    python benchmarks/pump.py [--sigma 0.6 1.0 1.5] [--seeds 4] [--steps 300] [--batch 32] [--concurrency 48] ...
    python benchmarks/pump.py --staleness 1 2 4 8                          # Togi's own: each --on_stale, lags up to 3 S
    python benchmarks/pump.py --run RUN_FOLDER --seconds_per_token 0.02    # lengths of a run's rollouts

``togi/plan/simulator.py`` says what the model is. With ``--run`` a group takes as long as its longest response. No device is used.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from statistics import fmean

from togi.config.choices import OnStale
from togi.obs.rollout_store import Split
from togi.obs.run_dir import RunDirectory
from togi.plan.simulator import (
    CAPACITY,
    DISCIPLINES,
    SYNCHRONOUS,
    Discipline,
    Machine,
    Simulation,
    lognormal,
    resampled,
    simulate,
)
from togi.plan.slots import Rules, Slots

Times = Callable[[Random], Iterator[float]]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sigma", type=float, nargs="+", default=[0.6, 1.0, 1.5], help="of the logarithm of group times"
    )
    parser.add_argument("--mean", type=float, default=60.0, help="seconds of a group")
    parser.add_argument("--run", type=Path, help="a folder of togi rl; replaces --sigma and --mean")
    parser.add_argument("--seconds_per_token", type=float, default=0.02, help="with --run")
    parser.add_argument("--batch", type=int, default=32, help="groups a step")
    parser.add_argument("--concurrency", type=int, default=48, help="groups that the engine runs at once")
    parser.add_argument("--train_seconds", type=float, default=60.0, help="of a step")
    parser.add_argument("--sync_seconds", type=float, default=3.0, help="of a publish")
    parser.add_argument("--filtered_share", type=float, default=0.0, help="of groups, dropped by dynamic filtering")
    parser.add_argument(
        "--staleness", type=int, nargs="*", default=[], help="Togi with these S in the place of all disciplines"
    )
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args(words)
    machine = Machine(
        arguments.batch,
        arguments.concurrency,
        arguments.train_seconds,
        arguments.sync_seconds,
        arguments.filtered_share,
    )
    if arguments.run is not None:
        stored = [arguments.seconds_per_token * tokens for tokens in longest_responses(arguments.run)]
        compare(f"{len(stored)} groups of {arguments.run}", machine, lambda rng: resampled(stored, rng), arguments)
        return
    for sigma in arguments.sigma:
        compare(f"sigma {sigma}", machine, lambda rng, s=sigma: lognormal(arguments.mean, s, rng), arguments)


def longest_responses(folder: Path) -> list[int]:
    """The tokens of the longest response of each group that a run trained or filtered."""
    longest: dict[tuple[int, str], int] = defaultdict(int)
    store = RunDirectory(folder).rollouts
    for file in store.files():
        if file.split is Split.TRAIN:
            for row in store.read_columns(file, ["group_id", "response_tokens"]):
                key = (file.step, row["group_id"])
                longest[key] = max(longest[key], len(row["response_tokens"]))
    if not longest:
        raise SystemExit(f"--run: {folder} has no rollouts: give the folder of a run of togi rl.")
    return list(longest.values())


def compare(title: str, machine: Machine, times: Times, arguments: argparse.Namespace) -> None:
    """Print a table, in Markdown: a row for each discipline, means over seeds; the lag is the largest."""
    runs = f"{arguments.seeds} seeds of {arguments.steps} steps"
    print(f"\n{title}: {machine.batch} groups a step, {machine.concurrency} at once; {runs}\n")
    print(
        "| discipline | speed-up | max lag | lost | trained length | masked above a lag | trainer idle | engine idle |"
    )
    print("|---|---|---|---|---|---|---|---|")
    synchronous = 0.0
    each = [(s, stale) for s in arguments.staleness for stale in OnStale]
    swept = {f"S {s}, {stale}": (togi(s, stale), (3 * s,) if stale is OnStale.MASK else ()) for s, stale in each}
    usual = {name: (each, (6, 8) if name == CAPACITY else ()) for name, each in DISCIPLINES.items()}
    for name, (discipline, lags) in ({SYNCHRONOUS: usual[SYNCHRONOUS]} | swept if swept else usual).items():
        done = [
            simulate(discipline, machine, times, steps=arguments.steps, seed=seed) for seed in range(arguments.seeds)
        ]
        seconds = fmean(one.seconds for one in done)
        synchronous = seconds if name == SYNCHRONOUS else synchronous
        print(row(name, synchronous / seconds, done, lags), flush=True)


def togi(staleness: int, on_stale: OnStale) -> Discipline:
    return lambda machine: Slots(Rules(machine.batch, staleness, on_stale, 3 * staleness))


def row(name: str, speed: float, done: list[Simulation], lags: tuple[int, ...]) -> str:
    reports = [one.report() for one in done]
    masked = [f"{lag}: {fmean(one.masked(lag)[0] for one in done):.2%}" for lag in lags]
    cells = [
        name,
        f"{speed:.2f}",
        f"{max(report.max_lag for report in reports)}",
        f"{fmean(report.lost for report in reports):.1%}",
        f"{fmean(report.trained_length for report in reports):.2f}",
        ", ".join(masked) or "-",
        f"{fmean(report.trainer_idle for report in reports):.0%}",
        f"{fmean(report.engine_idle for report in reports):.0%}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
