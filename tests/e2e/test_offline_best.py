"""The best model of an offline run: what is in the folder, and what a resume may do to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.offline_world import make_world, train

# Learning first, then steps of such a size that the model is spoilt.
SPOILT = "--max_epochs 4 --train_batch_size 14 --lr_scheduler constant_with_warmup --lr_warmup_ratio 1 --eval_steps 1"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def run_spoilt(world: Path, run: Path, *more: str) -> list[float]:
    flags = (*SPOILT.split(), "--learning_rate", "2", "--save_steps", "1", "--save_hf_ckpt", "--max_ckpt_num", "1")
    return [values["eval/loss"] for values in train(world, "sft", run, *flags, "--best_metric_key", "loss", *more)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_the_best_model_is_kept_and_no_resume_replaces_it_by_a_worse_one(world: Path, tmp_path: Path) -> None:
    """It gets better, then much worse: the best one stays, whatever is pruned and resumed."""
    run, best = tmp_path / "run", tmp_path / "run" / "checkpoints" / "best"
    losses = run_spoilt(world, run)
    assert losses[2] < losses[0] == losses[1] < losses[3] < losses[4]  # step 1 is taken at a rate of 0
    record = {"aim": {"metric": "eval/loss", "highest": False}, "value": losses[2], "step": 2}
    assert json.loads((best / "best.json").read_text()) == record
    again = train(world, "sft", tmp_path / "again", "--pretrain", str(best), "--learning_rate", "0")
    assert again[0]["eval/loss"] == pytest.approx(losses[2], rel=1e-6)
    states = list((run / "checkpoints").glob("step_*/state.json"))
    assert [json.loads(path.read_text())["best"] for path in states] == [record]  # one is kept, and it knows
    # Another epoch from that checkpoint, with nothing on disk but its own record: still not replaced.
    shutil.rmtree(best)
    more = run_spoilt(world, run, "--load_checkpoint", "--max_epochs", "5")
    assert len(more) == 6 and more[5] > losses[2]
    assert not best.exists()


def test_a_better_evaluation_replaces_the_best(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--max_epochs", "2", "--best_metric_key", "eval/accuracy", "--best_metric_mode", "min")
    steps = train(world, "dpo", run, *flags, "--learning_rate", "1e-3")
    measured = [(step, values["eval/accuracy"]) for step, values in enumerate(steps) if "eval/accuracy" in values]
    step, value = min(measured, key=lambda each: each[1])
    record = json.loads((run / "checkpoints" / "best" / "best.json").read_text())
    assert (record["step"], record["value"]) == (step, value)
    # The best of the losses is the last one here, and its model is the final one.
    steps = train(world, "dpo", tmp_path / "loss", "--max_epochs", "2", "--best_metric_key", "loss")
    losses = [values["eval/loss"] for values in steps if "eval/loss" in values]
    assert losses[-1] == min(losses)
    final, best = weights(tmp_path / "loss" / "model"), weights(tmp_path / "loss" / "checkpoints" / "best")
    assert all(torch.equal(tensor, best[name]) for name, tensor in final.items())
