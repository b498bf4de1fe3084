"""Where the time of one RL step goes on this machine, beside what the machine itself can do.

    python benchmarks/rl_step.py [--model DIR] [--data FILE] [--steps N] [--engine vllm|transformers] [--json FILE]

Runs the real recipe (GRPO with a reference model, 16 prompts x 8 samples, 48 new tokens) and takes medians over the steps after
the first. Tokens are real ones: there is no padding, and a prompt shared by its responses counts once per response. Timings on a
busy machine are noise: compare figures of one run, not of two days.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import togi
from comparison import machine
from togi.obs.metrics import StepRecord, read_records
from togi.plan.machine import cache_folder

CACHE = cache_folder()
ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CACHE / "smollm2-135m-instruct"))
    parser.add_argument("--data", default=str(CACHE / "demo-sums" / "train.jsonl"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--engine", default="vllm", choices=["vllm", "transformers"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    measured = machine.rates()
    with tempfile.TemporaryDirectory() as folder:
        records = run(arguments.model, arguments.data, arguments.steps, arguments.engine, Path(folder))
    result = {"machine": measured, **summarise(records)}
    print(table(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def run(model: str, data: str, steps: int, engine: str, folder: Path) -> list[StepRecord]:
    """The metric records of a short real run."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    togi.rl(
        pretrain=model,
        prompt_data=data,
        reward_func=str(ROOT / "examples" / "rewards" / "math_reward.py"),
        input_key="prompt",
        label_key="answer",
        apply_chat_template=True,
        bf16=True,
        rollout_engine=engine,
        colocate_all_models=True,
        advantage_estimator="group_norm",
        use_kl_loss=True,
        kl_estimator="k3",
        init_kl_coef=1e-3,
        rollout_batch_size=16,
        n_samples_per_prompt=8,
        train_batch_size=128,
        max_tokens_per_gpu=4096,
        prompt_max_len=128,
        generate_max_len=48,
        num_episodes=steps,
        max_steps=steps,
        run_dir=str(folder / "run"),
        save_path=str(folder / "model"),
        ckpt_path=str(folder / "checkpoints"),
    )
    return read_records(folder / "run" / "metrics.jsonl")


def summarise(records: list[StepRecord]) -> dict[str, dict[str, float]]:
    """Medians over the steps after the first, which warms caches up."""
    steady = records[1:] if len(records) > 1 else records

    def median(name: str) -> float:
        return statistics.median(record.values[name] for record in steady)

    phases = {name: statistics.median(r.seconds.get(name, 0.0) for r in steady) for name in steady[0].seconds}
    whole = sum(phases.values())
    return {
        "rates": {
            "generated tokens/s": median("throughput/generated_tokens_per_second"),
            "scored tokens/s": median("throughput/scored_tokens_per_second"),
            "trained tokens/s": median("throughput/trained_tokens_per_second"),
            "weight sync s": median("weights/sync_seconds"),
            "weight sync GB/s": median("throughput/weight_sync_gb_per_second"),
        },
        "phase seconds": phases,
        "phase share %": {name: 100 * seconds / whole for name, seconds in phases.items()},
        "peak memory GB": {
            name.removeprefix("memory/"): max(r.values[name] for r in steady)
            for name in steady[0].values
            if "memory/" in name
        },
    }


def table(result: dict[str, dict[str, float]]) -> str:
    lines = []
    for title, rows in result.items():
        lines.append(title)
        lines += [f"  {name:<32} {value:12.2f}" for name, value in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
