"""Whether Togi works, and works fast, on this machine with a GPU: ten minutes, no network, no vLLM.

    python benchmarks/gpu_check.py [--out FOLDER] [--only PART ...] [--device cuda|cpu] [--small]

Each part is a process of its own with a limit of time, so that one that crashes or hangs does not take the others with it. A line
a part as it ends: PASS, FAIL or SKIP (what it needs is not here), with its figures. Then a table; FOLDER/results.json has all
figures and the versions, FOLDER/log.txt what the parts printed. The exit status is 1 if a part failed. ``--device cpu --small``
runs the arithmetic with toy sizes, to try the script itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
TOTAL_SECONDS = 570.0
"""Of all parts together: a part gets no more than is left."""
LEAST_SECONDS = 5.0
PACKAGES = ["torch", "transformers", "triton", "numpy", "ray", "vllm", "deepspeed", "liger-kernel", "flash-attn"]
PACKAGES += ["flash-attn-3", "nvidia-nccl-cu13", "nvidia-nccl-cu12"]
OWN = ("togi", "tests", "gpu")
PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
Figure = float | str


@dataclass(frozen=True, slots=True)
class Part:
    """``function``: module and function in ``benchmarks``; ``limit`` in seconds; ``environment``: what its process gets beside."""

    function: str
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)


# Those that say most come first: if time runs out, the last ones are skipped.
PARTS = {
    "versions": Part("gpu.machine:versions", 60),
    "devices": Part("gpu.machine:devices", 40),
    "flash": Part("gpu.attention:flash", 60),
    "attention_speed": Part("gpu.attention:attention_speed", 60),
    "head": Part("gpu.steps:head", 30),
    "learners": Part("gpu.learners:learners", 60),
    "sleep": Part("gpu.learners:sleep", 40),
    "engine": Part("gpu.runs:engine", 40),
    "step": Part("gpu.steps:step", 80),
    "ipc": Part("gpu.transfers:ipc", 50),
    "ipc_expandable": Part("gpu.transfers:ipc", 50, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
    "groups": Part("gpu.transfers:groups", 50),
    "ring": Part("gpu.attention:ring", 40),
    "determinism": Part("gpu.learners:determinism", 40),
    "commands": Part("gpu.runs:commands", 120),
    "step_liger": Part("gpu.steps:step_liger", 50),
    "step_compiled": Part("gpu.steps:step_compiled", 90),
    "deepspeed": Part("gpu.learners:deepspeed", 60),
}


@dataclass(frozen=True, slots=True)
class Result:
    outcome: str
    seconds: float
    reason: str
    figures: Mapping[str, Figure]


def main() -> int:
    options = arguments()
    if options.part is not None:
        return run_here(options.part[0], Path(options.part[1]), options.device, options.small)
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = {name: part for name, part in PARTS.items() if not options.only or name in options.only}
    print(f"{len(chosen)} parts, each within its limit, all within {TOTAL_SECONDS:.0f} s:", flush=True)
    print("  " + ", ".join(f"{name} {part.limit:.0f} s" for name, part in chosen.items()), flush=True)
    results = dict[str, Result]()
    for name, result in run_all(chosen, options.out / "log.txt", options.device, small=options.small):
        results[name] = result
        print(line(name, result), flush=True)
        record = {
            "device": options.device,
            "small": options.small,
            "versions": versions(),
            "parts": {done: asdict(found) for done, found in results.items()},
        }
        # after each part: what is known is kept if this process is killed
        (options.out / "results.json").write_text(json.dumps(plain(record), indent=1) + "\n")
    print("\n" + table(results))
    return int(any(result.outcome == FAIL for result in results.values()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu_check")
    parser.add_argument("--out", type=Path, default=out, help="default: $OUT, or runs/gpu_check")
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument(
        "--part", nargs=2, metavar=("PART", "FILE"), help=argparse.SUPPRESS
    )  # one part, in this process
    return parser.parse_args()


# ---- the process that starts the others


def run_all(
    parts: Mapping[str, Part], log: Path, device: str, *, small: bool, total: float = TOTAL_SECONDS
) -> Iterator[tuple[str, Result]]:
    """Run one part after the other. What they print goes to ``log``."""
    end = time.monotonic() + total
    with log.open("w") as sink:
        for name, part in parts.items():
            left = end - time.monotonic()
            if left < min(LEAST_SECONDS, part.limit):
                yield name, Result(SKIP, 0.0, f"no time is left: run it with --only {name}", {})
                continue
            sink.write(f"==== {name}\n")
            sink.flush()
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "figures"
                command = [sys.executable, __file__, "--part", part.function, str(file), "--device", device]
                command += ["--small"] if small else []
                start = time.monotonic()
                limit = min(part.limit, left)
                code = run_within(command, limit, {**os.environ, **part.environment}, sink)
                yield name, judged(file, code, limit, time.monotonic() - start)


def run_within(command: Sequence[str], limit: float, environment: Mapping[str, str], sink: IO[str]) -> int | None:
    """The exit status; None if it was killed at the limit. Whatever it started is killed with it."""
    paths = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    given = {**environment, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        command, env=given, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def judged(file: Path, code: int | None, limit: float, seconds: float) -> Result:
    """The result of a part from the lines it has written: [name, figure] each, and last [outcome, reason, true]."""
    written = [json.loads(row) for row in file.read_text().splitlines()] if file.exists() else []
    figures = {row[0]: row[1] for row in written if len(row) == 2}
    ending = [row for row in written if len(row) == 3]
    if ending:
        outcome, told = ending[0][:2]
        if outcome == PASS and code != 0:
            told = f"but its process {'hung at its end' if code is None else f'ended with status {code}'}: see the log"
        return Result(outcome, seconds, told, figures)
    reason = f"took more than {limit:.0f} s" if code is None else f"its process ended with status {code}"
    return Result(FAIL, seconds, f"{reason}; see the log", figures)


def versions() -> dict[str, str]:
    """Of Python and of the packages that are here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def plain(value: object) -> object:
    """With text in place of the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def line(name: str, result: Result) -> str:
    figures = ", ".join(f"{what} {shown(value)}" for what, value in result.figures.items())
    told = "; ".join(filter(None, [result.reason, figures]))
    return f"{result.outcome} {name} ({result.seconds:.0f} s) {told}"


def shown(value: Figure) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def table(results: Mapping[str, Result]) -> str:
    """One row a part: its outcome, seconds, and why if it did not pass."""
    width = max(map(len, results), default=0)
    rows = [
        f"{name:<{width}}  {r.outcome}  {r.seconds:6.1f} s  {r.reason[:150]}".rstrip() for name, r in results.items()
    ]
    counts = ", ".join(
        f"{sum(r.outcome == outcome for r in results.values())} {outcome}" for outcome in (PASS, FAIL, SKIP)
    )
    return "\n".join([*rows, counts])


# ---- the process of one part


def run_here(function: str, file: Path, device: str, small: bool) -> int:
    """Run a part and write its figures, line by line as they come, and its outcome."""
    with file.open("a") as sink:

        def write(*row: object) -> None:
            sink.write(json.dumps(row) + "\n")
            sink.flush()

        try:
            figures = started(function, device, small)
            for name, value in figures:
                write(name, value)
            ending = (PASS, "")
        except Exception as problem:  # noqa: BLE001  a part may fail in any way
            ending = outcome_of(problem)
            if ending[0] == FAIL:
                traceback.print_exc()
        write(*ending, True)
    return int(ending[0] == FAIL)


def started(function: str, device: str, small: bool) -> Iterator[tuple[str, Figure]]:
    """The figures of a part. Raises Skip if it is for a GPU and there is none; the first part is what reports that."""
    import torch

    from gpu.tools import Skip

    module, _, name = function.partition(":")
    if device == "cuda" and name != "versions" and not torch.cuda.is_available():
        raise Skip("torch finds no GPU")
    part = getattr(importlib.import_module(module), name)
    figures: Iterator[tuple[str, Figure]] = part(torch.device("cuda:0" if device == "cuda" else device), small)
    return figures


def outcome_of(problem: Exception) -> tuple[str, str]:
    """A package that is not here is no failure of Togi's."""
    if isinstance(problem, ModuleNotFoundError) and (problem.name or "").partition(".")[0] not in OWN:
        return SKIP, f"needs the package {problem.name}"
    if type(problem).__name__ == "Skip":
        return SKIP, str(problem)
    lines = [row for row in str(problem).splitlines() if row.strip()]
    return FAIL, f"{type(problem).__name__}: {lines[-1].strip() if lines else ''}"


if __name__ == "__main__":
    sys.exit(main())
