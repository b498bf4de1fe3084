"""Whether to compute keys and values of responses in progress again at each weight update: what it costs, and what it mends.

    python benchmarks/recompute_kv.py [--steps 6] [--tokens 200] [--out FOLDER]

Run examples/demo/prepare.py first. Stories of up to --tokens tokens by SmolLM2-135M-Instruct, asynchronous, with a learning
rate that moves the policy; each pair of runs follows each other. The mismatch is between the engine's log-probs and those of the
trainer's weights of the step, on tokens that several versions have sampled as well as on others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parents[1]
THINGS = """a cat, the sea, a clock, an old house, a train, rain, a robot, bread, a forest, music, a market, snow, a dragon,
a bridge, tea, stars""".replace("\n", " ").split(", ")
REWARD = """
def reward_func(queries, prompts, labels, responses):
    return [response.count("e") / max(1, len(response)) for response in responses]
"""
SHOWN = ("mismatch/mean_abs", "mismatch/k3", "staleness/token", "staleness/versions_of_a_response")


def run(folder: Path, cache: Path, recompute: bool, options: argparse.Namespace) -> dict[str, float]:
    """One run: seconds of its loop, and means over its steps."""
    folder.mkdir(parents=True)
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"Tell a long story about {thing} in year {year}."} for year in range(16) for thing in THINGS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [sys.executable, "-m", "togi.cli.train_ppo_ray", "--config", ROOT / "examples" / "demo" / "demo.yaml"]
    words += ["--pretrain", cache / "smollm2-135m-instruct", "--prompt_data", folder / "prompts.jsonl"]
    words += ["--reward_func", folder / "reward.py", "--label_key", "prompt", "--n_samples_per_prompt", 4]
    words += [
        "--train_batch_size",
        64,
        "--generate_max_len",
        options.tokens,
        "--max_steps",
        options.steps,
        "--num_episodes",
        9,
    ]
    words += ["--run_dir", folder / "run", "--save_path", folder / "model", "--ckpt_path", folder / "checkpoints"]
    words += ["--max_staleness", 2, "--no_colocate_all_models", "--no_eval_at_start", "--eval_steps", -1]
    words += ["--recompute_kv"] * recompute
    done = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
    events = [json.loads(line) for line in (folder / "run" / "ledger.jsonl").read_text().splitlines()]
    first = next(event["time"] for event in events if event["event"] == "queued")
    last = max(event["time"] for event in events if event["event"] == "published")
    records = [json.loads(line)["values"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {"seconds": last - first} | {name: fmean(record[name] for record in records) for name in SHOWN}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("recompute-benchmark"))
    options = parser.parse_args()
    cache = Path(os.environ.get("TOGI_CACHE", "~/.cache/togi")).expanduser()
    for pair in range(options.pairs):
        for recompute in (False, True):
            found = run(options.out / f"pair{pair}-{recompute}", cache, recompute, options)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            print(f"{'again' if recompute else 'kept '}: {shown}", flush=True)


if __name__ == "__main__":
    main()
