"""Togi beside its peers on the same work: the same model, rows of each optimizer step, learning rate, precision and threads.

    python benchmarks/compare.py sft dpo rm grpo128 grpo512             # five pairs of each, on an idle machine
    python benchmarks/compare.py sft --sweep                            # every setting of TRL once; the winner is what
                                                                        # the next comparison of this case takes
    python benchmarks/compare.py sft --pairs 1 --model 30m --steps 3    # a short look

The peers live in a virtual environment of their own, $TOGI_CACHE/bench-venv, which is made at the first call. Togi and the
peer run alternately, each time in a new process. runs/compare/CASE-MODEL-PROCESSES/ gets results.json, table.md and what each
run printed.

Both keep float32 master weights and moments and compute in bfloat16: the peer by autocast, Togi from a bfloat16 copy of the
weights. On a machine whose float32 products are the faster ones both compute in float32. Frozen models are what each makes of
them: bfloat16 here, float32 under autocast there. Attention is PyTorch's SDPA,
AdamW the fused one. Nothing is saved or evaluated in the steps that count. PPO runs alone: TRL 1.16 has no PPO trainer, and none
among its experimental ones.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from comparison import machine, peer_side, togi_side
from comparison.cases import CASES, TRL, Case, Kind, Setting
from comparison.material import Material, make_material
from comparison.places import ROOT, model_folder, size_of
from comparison.processes import RunFailed, run_watched
from comparison.summary import WARM_UP, Run, fastest, summarise, table

DEFAULTS = Setting("defaults", 0)


def main() -> None:
    arguments = parse()
    for name in arguments.cases:
        case = resized(CASES[name], arguments)
        folder = folder_of(name, arguments, sweep=arguments.sweep)
        shutil.rmtree(folder, ignore_errors=True)
        model = model_folder(arguments.model, scalar=case.kind is Kind.RM)
        material = make_material(case, model, folder)
        rates = machine.rates(arguments.threads)
        precision = machine.faster_precision(rates)
        runs = []
        for place, (side, setting) in enumerate(plan(case, arguments)):
            try:
                own = folder / f"{place:02d}-{side}-{setting.name}"
                done = run(case, side, setting, model, material, own, arguments, precision)
            except RunFailed as error:
                if not arguments.sweep:
                    raise
                print(f"{case.name}: {side} ({setting.name}) does not run here: {str(error).strip().splitlines()[-1]}")
                continue
            runs.append(done.to_json())
            print(f"{case.name}: {side} ({setting.name}) {done.tokens_per_second:.0f} tokens/s", flush=True)
            result = {
                "case": name,
                "model": arguments.model,
                "processes": arguments.processes,
                "precision": precision,
                "machine": rates,
                "runs": runs,
            }
            (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")
        text = table(f"{name}, {arguments.model}", runs, rates, precision)
        (folder / "table.md").write_text(text + "\n")
        print(text, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=sorted(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--pairs", type=int, default=5, help="runs of each side, alternately")
    parser.add_argument("--model", default="smollm2", choices=["smollm2", "30m"])
    parser.add_argument("--processes", type=int, default=1, choices=[1, 2], help="processes of each side")
    parser.add_argument("--threads", type=int, default=2, help="of all processes of a side together")
    parser.add_argument("--sweep", action="store_true", help="each setting of each peer once, without Togi")
    parser.add_argument(
        "--peers", nargs="+", default=[TRL], help="of trl, transformers and deepspeed, which have sft only"
    )
    parser.add_argument("--setting", help="this setting of the peer in place of the case's best")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run in place of the case's")
    parser.add_argument("--rows", type=int, help="rows (prompts) of a step in place of the case's")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps <= WARM_UP:
        parser.error(f"--steps {arguments.steps}: the first {WARM_UP} steps are not counted, ask for more")
    return arguments


def resized(case: Case, arguments: argparse.Namespace) -> Case:
    return replace(case, steps=arguments.steps or case.steps, rows=arguments.rows or case.rows)


def plan(case: Case, arguments: argparse.Namespace) -> Iterator[tuple[str, Setting]]:
    """Who runs when. The side that starts a pair changes, so that a drift of the machine meets both."""
    peers = [peer for peer in arguments.peers if peer in case.peers]
    if arguments.sweep:
        yield from ((peer, setting) for peer in peers for setting in case.choices(peer, arguments.processes))
        return
    sides = [("togi", DEFAULTS), *((peer, best_setting(case, peer, arguments)) for peer in peers)]
    for pair in range(arguments.pairs):
        yield from sides if pair % 2 == 0 else reversed(sides)


def best_setting(case: Case, peer: str, arguments: argparse.Namespace) -> Setting:
    """What the command line says, or the winner of the sweep of the same case, model and processes, or the case's own."""
    if arguments.setting is not None:
        return case.setting(arguments.setting)
    sweep = folder_of(case.name, arguments, sweep=True) / "results.json"
    if not sweep.exists():
        return case.best_of(peer)
    allowed = {setting.name for setting in case.choices(peer, arguments.processes) if setting.same_precision}
    return case.best_of(peer, fastest(json.loads(sweep.read_text())["runs"], peer, allowed))


def folder_of(name: str, arguments: argparse.Namespace, *, sweep: bool) -> Path:
    parts = (name, arguments.model, str(arguments.processes), *(["sweep"] if sweep else []))
    return ROOT / "runs" / "compare" / "-".join(parts)


def run(
    case: Case,
    side: str,
    setting: Setting,
    model: Path,
    material: Material,
    folder: Path,
    arguments: argparse.Namespace,
    precision: str,
) -> Run:
    """One run in a process of its own."""
    folder.mkdir(parents=True)
    if side == "togi":
        words = togi_side.command(case, model, material, folder, arguments.processes, precision)
    else:
        words = peer_side.command(side, case, setting, model, material, folder, arguments.processes, precision)
    environment = togi_side.environment(arguments.threads // arguments.processes, folder / "cache")
    watched = run_watched(words, environment, ROOT, folder / "output.txt")
    steps = (togi_side if side == "togi" else peer_side).steps_of(case, material, folder, watched.started)
    shutil.rmtree(folder / "model", ignore_errors=True)
    return summarise(side, setting.name, steps, watched.peak_gb, size_of(model), case.forwards)


if __name__ == "__main__":
    main()
