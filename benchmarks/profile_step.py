"""Where the time of one supervised step goes, operator by operator, and how it grows with the length of packs.

    python benchmarks/profile_step.py [--model smollm2|30m] [--tokens 8192] [--json FILE]    # operators of one step
    python benchmarks/profile_step.py growth [--model 30m]     # time per token: 8k and 64k packed tokens, one sequence of 32k

A step is a pack of sequences of 256 tokens, half of each in the loss: forward, backward and AdamW, by the parts that ``togi sft``
is made of. Packs of 64k tokens are of the 30M model, unless --model says otherwise: the other needs more than 24 GB for them.
The limit of an operator is the machine's rate of matrix products in the faster of bf16 and fp32, or of copying for all others.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from comparison import machine
from comparison.places import model_folder, size_of
from comparison.summary import Work, flops
from togi.batch import Batch
from togi.config.choices import Scheduler
from togi.data.packing import pack
from togi.learn.learner import Learner
from togi.learn.objective import SFTObjective
from togi.learn.schedule import Schedule
from togi.methods.sft import SFT
from togi.model.loading import ModelSource, load_causal_lm
from togi.parallel import trainable
from togi.parallel.backend import BackendOptions
from togi.parallel.process import World
from togi.sample import Sample

SEQUENCE = 256
SHOWN = 20
# Matrix products, whose operations the profiler counts from their shapes. Those of attention are counted here: causal, with two
# products forward, and in the backward two for each of them and one again.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": 2.0,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": 5.0,
}


@dataclass(frozen=True, slots=True)
class Operator:
    """``seconds``: in the operator itself, of one step. ``gflops``: reached, 0 where it is no matrix product."""

    name: str
    calls: int
    seconds: float
    share: float
    gflops: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="operators", choices=["operators", "growth"])
    parser.add_argument("--model", choices=["smollm2", "30m"], help="default: smollm2, for growth 30m")
    parser.add_argument("--tokens", type=int, default=8192, help="of a pack")
    parser.add_argument("--steps", type=int, default=3, help="measured, after one that warms up")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    growing = arguments.what == "growth"
    folder = model_folder(arguments.model or ("30m" if growing else "smollm2"), scalar=False)
    rates = machine.rates()
    precision = machine.faster_precision(rates)
    learner = make_learner(folder, bf16=precision == "bf16")
    if growing:
        result = growth(learner, arguments.tokens, arguments.steps)
        print(growth_table(result))
    else:
        result = operators(learner, folder, arguments.tokens, arguments.steps, rates[f"matmul_{precision}_gflops"])
        print(operator_table(result, rates, precision))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": rates, **result}, indent=1) + "\n")


def make_learner(folder: Path, *, bf16: bool) -> Learner:
    """What ``togi sft`` trains with in one process, with or without ``--bf16``."""
    model = load_causal_lm(ModelSource(str(folder), torch.float32))
    backend = trainable(model, World.solo(torch.device("cpu")), BackendOptions(bf16=bf16))
    return Learner(
        backend, SFTObjective(), Schedule(SFT(lr_scheduler=Scheduler.CONSTANT, lr_warmup_ratio=0.0), 1e-6, 1), math.inf
    )


def random_pack(lengths: Sequence[int], seed: int = 0) -> Batch:
    """Sequences of random tokens in one pack; the second half of each is in the loss."""
    rng = np.random.default_rng(seed)
    samples = [
        Sample(rng.integers(5, 40_000, length), np.arange(length) >= length // 2, length // 2, str(place))
        for place, length in enumerate(lengths)
    ]
    return pack(samples, share_prefix=False)


def seconds_per_step(learner: Learner, batch: Batch, steps: int) -> float:
    """The median over ``steps`` after one that warms up."""
    learner.update([batch])
    taken = []
    for _ in range(steps):
        start = time.perf_counter()
        learner.update([batch])
        taken.append(time.perf_counter() - start)
    return median(taken)


def operators(learner: Learner, folder: Path, tokens: int, steps: int, peak: float) -> dict[str, Any]:
    """The step's own rate without the profiler, and one step under it, operators by the time in themselves."""
    batch = random_pack([SEQUENCE] * (tokens // SEQUENCE))
    taken = seconds_per_step(learner, batch, steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
        learner.update([batch])
    events = profile.key_averages()
    whole = sum(event.self_cpu_time_total for event in events) / 1e6
    size, work = size_of(folder), Work(tokens, tokens * SEQUENCE)
    counted = {name: factor * size.layers * size.width * work.squares for name, factor in ATTENTION.items()}
    counted |= {event.key: event.flops for event in events if event.key in PRODUCTS}
    found = []
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:SHOWN]:
        own = max(event.self_cpu_time_total / 1e6, 1e-9)
        found.append(Operator(event.key, event.count, own, own / whole, counted.get(event.key, 0.0) / own / 1e9))
    reached = flops(size, work, 0) / taken / 1e9
    return {
        "tokens": tokens,
        "seconds": taken,
        "tokens_per_second": tokens / taken,
        "gflops": reached,
        "share_of_matmul_rate": reached / peak,
        "operators": [asdict(operator) for operator in found],
    }


def operator_table(result: dict[str, Any], rates: dict[str, float], precision: str) -> str:
    limits = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    lines = [
        f"{result['tokens']} packed tokens: {result['seconds']:.2f} s a step, {result['tokens_per_second']:.0f} tokens/s, "
        f"{result['gflops']:.0f} GFLOP/s = {100 * result['share_of_matmul_rate']:.0f} % of the {precision} matmul rate",
        f"machine: {limits}",
        "",
        "| operator | calls | seconds | share | GFLOP/s |",
        "|---|---|---|---|---|",
    ]
    for row in result["operators"]:
        speed = f"{row['gflops']:.0f}" if row["gflops"] > 0 else ""
        lines.append(
            f"| {row['name']} | {row['calls']} | {row['seconds']:.3f} | {100 * row['share']:.1f} % | {speed} |"
        )
    return "\n".join(lines)


def growth(learner: Learner, tokens: int, steps: int) -> dict[str, Any]:
    """Microseconds a token. ``tokens`` is the shortest pack; the long ones have 8 times as many, and 4 times in one sequence."""
    packs = {
        f"{tokens} tokens in sequences of {SEQUENCE}": [SEQUENCE] * (tokens // SEQUENCE),
        f"{8 * tokens} tokens in sequences of {SEQUENCE}": [SEQUENCE] * (8 * tokens // SEQUENCE),
        f"one sequence of {tokens} tokens": [tokens],
        f"one sequence of {4 * tokens} tokens": [4 * tokens],
    }
    found = {
        name: 1e6 * seconds_per_step(learner, random_pack(lengths), steps) / sum(lengths)
        for name, lengths in packs.items()
    }
    return {"microseconds_per_token": found}


def growth_table(result: dict[str, Any]) -> str:
    found: dict[str, float] = result["microseconds_per_token"]
    first = next(iter(found.values()))
    lines = ["| pack | microseconds a token | to the first |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value:.1f} | {value / first:.2f} |" for name, value in found.items())])


if __name__ == "__main__":
    main()
