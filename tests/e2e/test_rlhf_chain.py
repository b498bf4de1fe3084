"""The script of the whole chain with a tiny model, and the parts of it that are no command of togi."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.rlhf_chain import table, wait_for_server
from tests.example_scripts import ONE_PROCESS
from tests.offline_world import ROOT
from tests.tiny import save_tiny_model

EXAMPLES = {
    "rlhf_chain.sh": "ENGINE=transformers PRECISION=--no_bf16 MAX_LEN=128 PROMPT_MAX_LEN=64 NEW_TOKENS=8 SFT_EPOCHS=2 "
    "SFT_SAMPLES=8 PAIRS=8 PPO_STEPS=2 PPO_PROMPTS=2 PPO_SAMPLES=2 ROUNDS=1 ROUND_PROMPTS=3 BEST_OF_N=3 "
    "CUT=--keep_truncated EVAL_SAMPLES=2"
}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    togi = folder / "togi"
    togi.write_text(ONE_PROCESS.format(python=sys.executable))
    togi.chmod(0o755)
    names = dict(word.split("=", 1) for word in EXAMPLES["rlhf_chain.sh"].split())
    names |= {"MODEL": str(folder / "model"), "OUT": str(folder / "run"), "TOGI": str(togi), "PYTHON": sys.executable}
    names |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    script = ROOT / "examples" / "scripts" / "rlhf_chain.sh"
    return subprocess.run(
        [script], cwd=ROOT, env=os.environ | names, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.mark.busy
@pytest.mark.large
def test_the_chain_trains_every_model_and_compares_them(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    done = run(tmp_path, EVAL_MODELS="sft rs")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    out = tmp_path / "run"
    weights = {
        name: (out / folder / "model" / "model.safetensors").read_bytes()
        for name, folder in {
            "sft": "sft",
            "rm": "rm",
            "ppo": "ppo",
            "dpo": "dpo/round_001",
            "rs": "rs/round_001",
        }.items()
    }
    assert len({*weights.values(), (tmp_path / "model" / "model.safetensors").read_bytes()}) == 6
    # PPO was rewarded by the server, which ended with it, and nobody else could ask it.
    steps = [row["values"] for row in read(out / "ppo" / "metrics.jsonl")]
    assert len(steps) == 2 and all(step["reward/error_share"] == 0 for step in steps)
    assert all(math.isfinite(step["value/loss"]) for step in steps)
    assert (out / "serve-rm.log").read_text().endswith("reward server: ended\n")
    # The table is of the rewards that the commands wrote.
    models = json.loads((out / "rewards.json").read_text())["models"]
    assert list(models) == ["sft", "rs"]
    for name, facts in models.items():
        rows = read(out / f"scored_{name}.jsonl")
        assert facts["outputs"] == len(rows) == 2 * len(read(out / "held_out.jsonl"))
        assert facts["mean"] == pytest.approx(statistics.mean(row["reward"] for row in rows))
        assert f"{name:<8}{facts['mean']:>9.3f}{facts['standard_error']:>8.3f}" in done.stdout
    again = run(tmp_path, EVAL_MODELS="sft rs", TOGI="/nonexistent")  # every step is done: nothing is started
    assert again.returncode == 0 and "==" not in again.stdout, again.stderr


def scored(folder: Path, name: str, *rewards: tuple[str, float]) -> None:
    rows = [{"id": prompt, "reward": reward, "finish_reason": "stop"} for prompt, reward in rewards]
    rows[0]["finish_reason"] = "length"
    (folder / f"scored_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_prompt_counts_once_and_gains_are_of_the_same_prompts(tmp_path: Path) -> None:
    scored(tmp_path, "sft", ("a", 1), ("a", 3), ("b", 6), ("b", 8))  # prompts: 2, 7
    scored(tmp_path, "ppo", ("b", 9), ("b", 9), ("a", 5), ("a", 5))  # prompts: 5, 9; gains: 3, 2
    models = table(tmp_path, ["sft", "ppo"])
    assert models["sft"]["mean"] == 4.5
    assert models["sft"]["standard_error"] == pytest.approx(2.5)  # sqrt(12.5 / 2)
    assert (models["sft"]["gain"], models["sft"]["gain_standard_error"]) == (0, 0)
    assert (models["ppo"]["mean"], models["ppo"]["gain"]) == (7, 2.5)
    assert models["ppo"]["gain_standard_error"] == pytest.approx(0.5)  # sqrt(0.5 / 2)
    assert models["ppo"]["cut_share"] == 0.25
    scored(tmp_path, "rs", ("a", 1), ("c", 3))
    with pytest.raises(SystemExit, match="the same prompts"):
        table(tmp_path, ["sft", "rs"])


def test_a_server_that_ended_is_told_with_its_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("togi: --port 1 cannot be listened on")
    ended = subprocess.Popen(["true"])
    ended.wait()
    with pytest.raises(SystemExit, match=r"the reward server ended: togi: --port 1"):
        wait_for_server(log, ended.pid)
