"""How fast an actor's weights reach a vLLM engine on the same host, beside the machine's copying rate.

    python benchmarks/weight_sync.py [--model 135m|1b] [--engine vllm|transformers] [--updates 5] [--json FILE]

A session with one actor and one engine, as ``togi rl`` starts it; what counts is from the first call to the engine's last
confirmation, checksums of both sides included. The 1b model has random weights; it needs 20 GB of memory and 5 of disk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path
from statistics import median

from comparison import machine
from comparison.places import SOURCE, llama
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.plan.machine import this_machine
from togi.plan.placement import Role, resolve
from togi.workers import start

FLAGS = "--bf16 --advantage_estimator group_norm --init_kl_coef 0 --prompt_max_len 64 --generate_max_len 64"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="135m", choices=["135m", "1b"])
    parser.add_argument("--engine", default="vllm", choices=["vllm", "transformers"])
    parser.add_argument("--updates", type=int, default=5, help="measured, after one that warms up")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rates = machine.rates()
    with tempfile.TemporaryDirectory() as folder:
        model = SOURCE if arguments.model == "135m" else make_large(Path(folder))
        words = ["--pretrain", str(model), "--rollout_engine", arguments.engine, *FLAGS.split()]
        config = resolve(parse(RLConfig, words, "rl"), this_machine()).config
        nbytes, seconds = asyncio.run(updates(config, arguments.updates))
    copied = rates["copy_gb_per_second"] / 2
    rate = nbytes / 1e9 / median(seconds)
    print(
        f"{arguments.model}, {arguments.engine}: {nbytes / 1e6:.0f} MB in {median(seconds):.3f} s "
        f"({min(seconds):.3f} to {max(seconds):.3f}), {rate:.2f} GB/s; a copy of memory: {copied:.1f} GB/s"
    )
    if arguments.json is not None:
        result = {"machine": rates, "bytes": nbytes, "seconds": seconds}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def make_large(folder: Path) -> Path:
    """A Llama of 1.1 billion parameters (1.0 without its embedding) in a folder of its own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    config = llama(tokenizer, 2048, 5632, 22, (32, 4), 2048)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


async def updates(config: RLConfig, count: int) -> tuple[int, list[float]]:
    """The bytes of an update and the seconds of each after the first."""
    session = await start(config, this_machine(), {Role.ACTOR: 10}, print)
    try:
        reports = [await session.weights.send(version) for version in range(1, count + 2)]
    finally:
        session.abandon()
    return reports[0].nbytes, [report.seconds for report in reports[1:]]


if __name__ == "__main__":
    main()
