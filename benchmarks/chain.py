"""The whole chain of RLHF on real data: runs examples/scripts/rlhf_chain.sh and writes docs/chain.json for docs/results.md.

    TOGI_SHARED_DATA=FOLDER python benchmarks/chain.py

FOLDER holds oasst as JSON lines. A chain that was stopped goes on. Sizes are those of the script; its variables change them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "runs" / "chain"
KL, LOSS, ACCURACY = "kl/reference", "eval/loss", "eval/accuracy"


def main() -> int:
    oasst = Path(os.environ["TOGI_SHARED_DATA"]) / "oasst"
    paths = {
        "SFT_TRAIN": oasst / "sft_train.jsonl",
        "SFT_TEST": oasst / "sft_test.jsonl",
        "PAIRS_TRAIN": oasst / "pairs_train.jsonl",
        "PAIRS_TEST": oasst / "pairs_test.jsonl",
        "OUT": OUT,
        "TOGI": Path(sys.executable).with_name("togi"),
        "PYTHON": sys.executable,
    }
    script = ROOT / "examples" / "scripts" / "rlhf_chain.sh"
    subprocess.run([script], env=os.environ | {name: str(path) for name, path in paths.items()}, check=True)
    models = json.loads((OUT / "rewards.json").read_text())["models"]
    facts = {
        "sft_loss": first_and_last("sft", LOSS),
        "rm_accuracy": first_and_last("rm", ACCURACY),
        "ppo_kl": measured("ppo", KL),
    }
    (ROOT / "docs" / "chain.json").write_text(json.dumps({"models": models, "facts": facts}, indent=1) + "\n")
    return 0 if all(models[name]["gain"] > 0 for name in ("ppo", "dpo", "rs")) else 1


def measured(step: str, name: str) -> list[float]:
    """A metric of a step of the chain, in the order of training."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in (OUT / step / "metrics.jsonl").read_text().splitlines()]
    return [line["values"][name] for line in lines if name in line["values"]]


def first_and_last(step: str, name: str) -> tuple[float, float]:
    values = measured(step, name)
    return values[0], values[-1]


if __name__ == "__main__":
    sys.exit(main())
