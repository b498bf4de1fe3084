"""Six advantage estimators from one start and with one budget: trains each, writes docs/estimators.svg and .json.

    python benchmarks/estimators.py               # all that have no result yet
    python benchmarks/estimators.py rloo gae      # these only, anew

The task is that of examples/demo (one-digit sums of reasoning-gym), the model that of examples/demo/prepare.py. Every
run has the same prompts in the same order, the same number of samples, optimizer steps and the same learning rate, no
KL term and one seed; the mean reward on 64 held-out prompts, four samples each, is measured every four rollouts.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from togi.plan.machine import cache_folder

ROOT = Path(__file__).parents[1]
CACHE = cache_folder()
RUNS = ROOT / "runs" / "estimators"
TITLES = {
    "gae": "PPO (GAE, with a critic)",
    "reinforce": "REINFORCE++",
    "reinforce_baseline": "REINFORCE++-baseline",
    "rloo": "RLOO",
    "group_norm": "GRPO",
    "dr_grpo": "Dr. GRPO",
}
FLAGS = "--max_steps 12 --eval_steps 4 --actor_learning_rate 5e-5 --critic_learning_rate 5e-5 --max_tokens_per_gpu 2048 --seed 1"


def main() -> int:
    wanted = sys.argv[1:] or [name for name in TITLES if not (RUNS / name / "result.json").is_file()]
    for name in wanted:
        run(name)
    results = {name: json.loads(f.read_text()) for name in TITLES if (f := RUNS / name / "result.json").is_file()}
    (ROOT / "docs" / "estimators.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results)
    for name, result in results.items():
        first, last = result["evaluations"][0], result["evaluations"][-1]
        print(
            f"| {TITLES[name]} | {first['reward']:.3f} ± {first['stderr']:.3f} | {last['reward']:.3f} ± {last['stderr']:.3f} "
            f"| {result['minutes']:.1f} |"
        )
    return 1 if any(not improved(result) for result in results.values()) else 0


def improved(result: dict[str, Any]) -> bool:
    """Whether the mean reward rose by more than twice the standard error of the difference."""
    first, last = result["evaluations"][0], result["evaluations"][-1]
    return bool(last["reward"] - first["reward"] > 2 * (first["stderr"] ** 2 + last["stderr"] ** 2) ** 0.5)


def run(name: str) -> None:
    folder = RUNS / name
    shutil.rmtree(folder, ignore_errors=True)
    here, sums = ROOT / "examples", CACHE / "demo-sums"
    words = ["rl", "--config", here / "demo" / "demo.yaml", "--advantage_estimator", name, *FLAGS.split()]
    words += ["--pretrain", CACHE / "smollm2-135m-instruct", "--prompt_data", sums / "train.jsonl"]
    words += ["--eval_dataset", sums / "test.jsonl", "--reward_func", here / "rewards" / "math_reward.py"]
    words += ["--run_dir", folder, "--save_path", folder / "model", "--ckpt_path", folder / "checkpoints"]
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "togi", *map(str, words)], cwd=ROOT, check=True)
    minutes = (time.monotonic() - start) / 60
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [
        {"step": s["step"], "reward": s["values"]["eval/reward"], "stderr": s["values"]["eval/reward_stderr"]}
        for s in steps
        if "eval/reward" in s["values"]
    ]
    shutil.rmtree(folder / "model")
    result = {
        "title": TITLES[name],
        "flags": f"--advantage_estimator {name} {FLAGS}",
        "minutes": minutes,
        "evaluations": evaluations,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1))


def draw(results: dict[str, dict[str, Any]]) -> None:
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "togi"  # the same figures make the same file
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, result in results.items():
        points = result["evaluations"]
        axes.errorbar(
            [point["step"] for point in points],
            [point["reward"] for point in points],
            yerr=[point["stderr"] for point in points],
            label=TITLES[name],
            capsize=2,
        )
    axes.set(xlabel="rollouts of 16 prompts x 8 samples", ylabel="mean held-out reward (± standard error)", ylim=(0, 1))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(ROOT / "docs" / "estimators.svg", metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
