"""Synchronous against asynchronous RL on the demo's task with a reward that sleeps: held-out reward and time of the loop.

    python benchmarks/async_rl.py [--seeds 1 2 3] [--staleness 0 2] [--steps 12] [--mean_seconds 3] [--out FOLDER]

Run examples/demo/prepare.py first. Each group's reward sleeps for a log-normal time (sigma 1; of 192 groups the longest takes
about ten times the mean), the same for a prompt in every run. Runs of one seed follow each other: they share the machine's mood.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parents[1]
SLEEPING = """
import hashlib, math, random, sys, time
sys.path.insert(0, {rewards!r})
from math_reward import reward_func as of_answers

def reward_func(queries, prompts, labels, **kwargs):
    dice = random.Random(int.from_bytes(hashlib.sha256(prompts[0].encode()).digest()[:8], "big"))
    time.sleep(dice.lognormvariate(math.log({mean}) - 0.5, 1.0))
    return of_answers(queries, prompts, labels, **kwargs)
"""


def run(folder: Path, cache: Path, seed: int, staleness: int, options: argparse.Namespace) -> dict[str, float]:
    """One run: seconds from the first prompt to the last weights, held-out reward before and after with standard errors."""
    folder.mkdir(parents=True)
    reward = folder / "sleeping.py"
    reward.write_text(SLEEPING.format(rewards=str(ROOT / "examples" / "rewards"), mean=options.mean_seconds))
    words = [sys.executable, "-m", "togi.cli.train_ppo_ray", "--config", ROOT / "examples" / "demo" / "demo.yaml"]
    words += ["--pretrain", cache / "smollm2-135m-instruct", "--prompt_data", cache / "demo-sums" / "train.jsonl"]
    words += ["--eval_dataset", cache / "demo-sums" / "test.jsonl", "--reward_func", reward, "--seed", seed]
    words += ["--run_dir", folder / "run", "--save_path", folder / "model", "--ckpt_path", folder / "checkpoints"]
    words += [
        "--max_steps",
        options.steps,
        "--eval_steps",
        options.steps,
        "--reward_workers",
        48,
        "--reward_timeout",
        300,
    ]
    if staleness > 0:
        words += ["--max_staleness", staleness, "--no_colocate_all_models"]
    done = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
    events = [json.loads(line) for line in (folder / "run" / "ledger.jsonl").read_text().splitlines()]
    first = next(event["time"] for event in events if event["event"] == "queued")
    last = max(event["time"] for event in events if event["event"] == "published")
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [record["values"] for record in records if "eval/reward" in record["values"]]
    lengths = [r["values"]["staleness/trained_length"] for r in records if "staleness/trained_length" in r["values"]]
    return {
        "seconds": last - first,
        "before": held_out[0]["eval/reward"],
        "after": held_out[-1]["eval/reward"],
        "stderr": held_out[-1]["eval/reward_stderr"],
        "trained_length": lengths[-1] if lengths else 1.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--mean_seconds", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=Path("async-benchmark"))
    options = parser.parse_args()
    cache = Path(os.environ.get("TOGI_CACHE", "~/.cache/togi")).expanduser()
    found: dict[int, list[dict[str, float]]] = {staleness: [] for staleness in options.staleness}
    for seed in options.seeds:
        for staleness in options.staleness:
            made = run(options.out / f"seed{seed}-s{staleness}", cache, seed, staleness, options)
            found[staleness].append(made)
            shown = ", ".join(f"{name} {value:.3f}" for name, value in made.items())
            print(f"seed {seed}, --max_staleness {staleness}: {shown}", flush=True)
    base = options.staleness[0]
    for staleness, runs in found.items():
        rewards = [each["after"] for each in runs]
        error = math.sqrt(sum(each["stderr"] ** 2 for each in runs)) / len(runs)
        ratios = [each["seconds"] / other["seconds"] for each, other in zip(runs, found[base], strict=True)]
        print(
            f"--max_staleness {staleness}: reward {fmean(rewards):.3f} +- {error:.3f}, time x {fmean(ratios):.2f} {ratios}"
        )


if __name__ == "__main__":
    main()
