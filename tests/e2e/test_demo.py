"""The demo's own script, with the real model and real vLLM, cut down to one small rollout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.busy, pytest.mark.large]

ROOT = Path(__file__).parents[2]
SMALL = "--max_steps 1 --rollout_batch_size 4 --train_batch_size 32 --eval_n_samples_per_prompt 1"


def test_the_demo_script_runs_and_tells_where_everything_is(tmp_path: Path) -> None:
    environment = os.environ | {"TOGI": str(Path(sys.executable).parent / "togi"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [ROOT / "examples" / "demo" / "run.sh", *SMALL.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    printed = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    assert "held-out reward before training" in printed
    assert "held-out reward after 1 rollouts" in printed
    run = tmp_path / printed["run folder"].strip()
    assert (tmp_path / printed["report page"].strip()).is_file()
    assert (tmp_path / printed["model"].strip() / "model.safetensors").is_file()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1]
    values = records[1]["values"]
    # bf16 on both sides: engine and trainer are the same model within rounding, before and after the update
    assert values["mismatch/k3"] < 0.02
    assert values["mismatch/probe_mean_abs"] < 0.3
    assert values["tokens/shared_share"] > 0.4  # eight responses share each prompt
    assert 0 <= values["reward/mean"] <= 1
