"""The established interface's own commands, with only model, data and sizes replaced by local ones and the module renamed.

As users type them: ``python -m togi.cli.train_...``. The DeepSpeed launcher has a test of its own.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.offline_world import ROOT, answer, pair, verdict, write
from tests.tiny import save_tiny_model

EVERYWHERE = "--save_path OUT/model --logging_steps 1 --bf16 --max_epochs 1 --flash_attn --gradient_checkpointing "
EVERYWHERE += "--use_wandb TOKEN"
COMMANDS = {
    "sft": "--max_len 4096 --dataset DATA/chat.jsonl --input_key question --output_key response --train_batch_size 4 "
    "--micro_train_batch_size 2 --max_samples 500000 --pretrain DATA/model --save_steps -1 --eval_steps -1 --zero_stage 2 "
    "--packing_samples --learning_rate 5e-6 --input_template TEMPLATE",
    "rm": "--save_steps -1 --eval_steps -1 --train_batch_size 4 --micro_train_batch_size 1 --pretrain DATA/model "
    "--max_len 8192 --zero_stage 3 --learning_rate 9e-6 --dataset DATA/pairs.jsonl --apply_chat_template "
    "--chosen_key chosen --rejected_key rejected --packing_samples",
    "dpo": "--save_steps -1 --eval_steps -1 --train_batch_size 4 --micro_train_batch_size 1 --pretrain DATA/model "
    "--max_len 8192 --zero_stage 3 --learning_rate 5e-7 --beta 0.1 --dataset DATA/pairs.jsonl --apply_chat_template "
    "--chosen_key chosen --rejected_key rejected --load_checkpoint --ref_offload",
    "kto": "--save_steps -1 --eval_steps -1 --train_batch_size 4 --micro_train_batch_size 1 --pretrain DATA/model "
    "--max_len 8192 --zero_stage 3 --learning_rate 5e-7 --dataset DATA/kto.jsonl --input_key instruction "
    "--output_key response --label_key score --beta 0.1 --max_samples 1024 --ref_offload",
    "prm": "--save_steps 500 --eval_steps 100 --train_batch_size 4 --micro_train_batch_size 8 --pretrain DATA/model "
    "--max_len 8192 --zero_stage 3 --learning_rate 1e-6 --dataset DATA/steps.jsonl --input_key input --label_key label "
    "--load_checkpoint --packing_samples --wandb_group prm --placeholder_token # --reward_tokens + -",
    "kd": "--save_steps -1 --eval_steps -1 --max_len 4096 --dataset DATA/chat.jsonl --input_key question "
    "--output_key response --train_batch_size 4 --micro_train_batch_size 1 --max_samples 500000 --pretrain DATA/model "
    "--teacher_model DATA/teacher --teacher_offload --zero_stage 3 --learning_rate 5e-6 --kd_coef 0.4",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, seed in (("model", 0), ("teacher", 1)):
        save_tiny_model(folder / name, seed=seed, max_position_embeddings=8192)
    write(folder / "chat.jsonl", [{"question": row["q"], "response": row["a"]} for row in map(answer, range(6))])
    write(folder / "kto.jsonl", [unpaired(i) for i in range(6)])
    write(folder / "pairs.jsonl", [conversations(i) for i in range(6)])
    write(folder / "steps.jsonl", [{"input": f"a {i} # b #", "label": ["+", "-"]} for i in range(6)])
    return folder


def unpaired(i: int) -> dict[str, Any]:
    row = verdict(i)
    return {"instruction": row["q"], "response": row["a"], "score": row["label"]}


def conversations(i: int) -> dict[str, Any]:
    """Both answers as whole conversations, as the public mixtures have them."""
    row = pair(i)
    prompt = {"role": "user", "content": row["q"]}
    return {key: [prompt, {"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")}


EVERY_TIME = ("sft", "dpo")  # each process imports everything, and what the others add has tests of its own


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=() if name in EVERY_TIME else pytest.mark.large) for name in COMMANDS]
)
def test_the_command_runs_as_it_is(data: Path, tmp_path: Path, command: str) -> None:
    places = {"DATA": str(data), "OUT": str(tmp_path), "TEMPLATE": "User: {}\nAssistant: "}
    flags = []
    for word in f"{COMMANDS[command]} {EVERYWHERE}".split():
        for name, place in places.items():
            word = word.replace(name, place)  # noqa: PLW2901
        flags.append(word)
    done = warm.run(
        [sys.executable, "-m", f"togi.cli.train_{command}", *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "--flash_attn: there is no CUDA device here, attention runs through SDPA segments instead" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    steps = [json.loads(line)["values"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2  # six rows in batches of four and two
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert "TOKEN" not in (run / "config.yaml").read_text()
    assert list(run.rglob("offline-run-*")), "W&B wrote nothing"
