"""The parts of scripts/rlhf_chain.sh that are no command of togi: distinct prompts, waiting for a server, the table at the end.

    python examples/rlhf_chain.py prompts PAIRS.jsonl PROMPTS.jsonl
    python examples/rlhf_chain.py wait SERVER_LOG SERVER_PID
    python examples/rlhf_chain.py table FOLDER NAME...

The table compares models by the mean reward of their outputs for the same prompts. A prompt counts once: the mean over its
outputs is one number, and the standard error is over prompts. The gain over the model sft is the mean of each prompt's
difference, which is known better than either mean where prompts differ more than models.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STARTED = "reward server: "
PATIENCE_SECONDS = 300.0
BASE = "sft"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def distinct_prompts(pairs: Path, target: Path) -> None:
    """Each prompt of the pairs once, in the order of the file: several pairs have the same."""
    prompts = {json.dumps(row["prompt"]): {"prompt": row["prompt"]} for row in read(pairs)}
    target.write_text("".join(json.dumps(row) + "\n" for row in prompts.values()), encoding="utf-8")
    print(f"{len(prompts)} distinct prompts in {target}")


def wait_for_server(log: Path, pid: int) -> str:
    """The URL that the server wrote into its log, once it says that it is well. Raises SystemExit where it ended."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never ask a proxy for this machine
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        urls = [line.removeprefix(STARTED) for line in log.read_text().splitlines() if line.startswith(STARTED)]
        if urls:
            with opener.open(urls[0].replace("/get_reward", "/health"), timeout=10):
                return urls[0]
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            raise SystemExit(f"the reward server ended: {log.read_text()}") from None
        time.sleep(0.2)
    raise SystemExit(f"the reward server did not start within {PATIENCE_SECONDS:.0f} seconds: see {log}")


def mean_with_error(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def table(folder: Path, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """What is known of each model. Raises SystemExit where the models did not answer the same prompts, or fewer than two."""
    scored = {name: read(folder / f"scored_{name}.jsonl") for name in names}
    means = {name: _means(rows) for name, rows in scored.items()}
    prompts = sorted(means[names[0]])
    if len(prompts) < 2 or any(sorted(of_model) != prompts for of_model in means.values()):
        raise SystemExit(f"{folder}: the models must have answered the same prompts, two or more")
    result = {}
    for name, rows in scored.items():
        mean, error = mean_with_error([means[name][prompt] for prompt in prompts])
        cut = statistics.fmean(row["finish_reason"] == "length" for row in rows)
        facts = {"mean": mean, "standard_error": error, "prompts": len(prompts), "outputs": len(rows), "cut_share": cut}
        if BASE in means:
            gain = mean_with_error([means[name][prompt] - means[BASE][prompt] for prompt in prompts])
            facts |= {"gain": gain[0], "gain_standard_error": gain[1]}
        result[name] = facts
    return result


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean reward of each prompt's outputs."""
    rewards: dict[str, list[float]] = {}
    for row in rows:
        rewards.setdefault(row["id"], []).append(row["reward"])
    return {prompt: statistics.fmean(values) for prompt, values in rewards.items()}


def show(models: dict[str, dict[str, float]]) -> None:
    print(f"{'model':<8}{'reward':>9}{'+-':>8}{'gain':>9}{'+-':>8}{'prompts':>9}{'outputs':>9}{'cut':>7}")
    for name, facts in models.items():
        gain = f"{facts['gain']:>9.3f}{facts['gain_standard_error']:>8.3f}" if "gain" in facts else " " * 17
        numbers = (
            f"{facts['mean']:>9.3f}{facts['standard_error']:>8.3f}{gain}{facts['prompts']:>9}{facts['outputs']:>9}"
        )
        print(f"{name:<8}{numbers}{facts['cut_share']:>7.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts")
    prompts.add_argument("pairs", type=Path)
    prompts.add_argument("target", type=Path)
    wait = commands.add_parser("wait")
    wait.add_argument("log", type=Path)
    wait.add_argument("pid", type=int)
    compare = commands.add_parser("table")
    compare.add_argument("folder", type=Path)
    compare.add_argument("names", nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "prompts":
        distinct_prompts(arguments.pairs, arguments.target)
    elif arguments.command == "wait":
        print(wait_for_server(arguments.log, arguments.pid))
    else:
        models = table(arguments.folder, arguments.names)
        (arguments.folder / "rewards.json").write_text(
            json.dumps({"models": models}, indent=2) + "\n", encoding="utf-8"
        )
        show(models)


if __name__ == "__main__":
    main()
