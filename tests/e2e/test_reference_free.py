"""``togi simpo | orpo`` end to end: they learn without a second model, resume bit for bit, keep the best model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.offline_world import flags, make_world, train
from togi.cli.main import main
from togi.obs.run_dir import read_held_out

METHODS = {"simpo": ("--beta", "2", "--gamma", "0.5"), "orpo": ("--odds_ratio_coef", "0.5")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def mean_logprobs(model: Path, world: Path) -> list[tuple[float, float]]:
    """By plain Transformers: the mean log-prob of the tokens of each held-out chosen and rejected response, end token included."""
    hf = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for line in (world / "pairs_eval.jsonl").read_text().splitlines():
        row, means = json.loads(line), []
        for key in ("chosen", "rejected"):
            start = len(tokenizer(row["q"])["input_ids"])
            ids = torch.tensor([*tokenizer(row["q"] + row[key])["input_ids"], tokenizer.eos_token_id])
            with torch.no_grad():
                table = hf(ids[None]).logits[0, :-1].log_softmax(-1)
            means.append(float(table.gather(1, ids[1:, None])[start - 1 :].mean()))
        found.append((means[0], means[1]))
    return found


def expected(command: str, means: list[tuple[float, float]]) -> dict[str, float]:
    """Loss and accuracy of an evaluation from the papers' formulas."""
    chosen, rejected = torch.tensor(means, dtype=torch.float64).T
    if command == "simpo":
        loss = -torch.log(torch.sigmoid(2 * (chosen - rejected) - 0.5))
    else:
        odds = [mean.exp() / (1 - mean.exp()) for mean in (chosen, rejected)]
        loss = -chosen - 0.5 * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))
    return {"eval/loss": float(loss.mean()), "eval/accuracy": float((chosen > rejected).double().mean())}


@pytest.mark.parametrize("command", METHODS)
def test_it_learns_and_evaluates_like_plain_transformers(world: Path, tmp_path: Path, command: str) -> None:
    run = tmp_path / "run"
    more = ("--max_epochs", "4", "--best_metric_key", "eval/reward/margin", *METHODS[command])
    steps = train(world, command, run, *more)
    for model, values in ((world / "model", steps[0]), (run / "model", steps[-1])):
        for name, value in expected(command, mean_logprobs(model, world)).items():
            assert values[name] == pytest.approx(value, rel=1e-4), name
    assert steps[-1]["loss"] < steps[1]["loss"] and steps[-1]["eval/loss"] < steps[0]["eval/loss"]
    assert steps[-1]["eval/reward/margin"] > steps[0]["eval/reward/margin"]
    assert steps[-1]["accuracy"] == 1.0 and steps[-1]["eval/accuracy"] == 1.0 > steps[0]["eval/accuracy"]
    margins = [values["eval/reward/margin"] for values in steps if "eval/reward/margin" in values]
    best = json.loads((run / "checkpoints" / "best" / "best.json").read_text())
    assert best["aim"] == {"metric": "eval/reward/margin", "highest": True} and best["value"] == max(margins)
    worst = read_held_out(run)[0][0]
    assert (worst.place, worst.number, len(worst.texts)) == ("worst", "reward", 2)
    assert not (run / "reference").exists()


@pytest.mark.parametrize("command", METHODS)
def test_a_resumed_run_is_the_same_run(world: Path, tmp_path: Path, command: str) -> None:
    run, more = tmp_path / "run", ("--save_steps", "2", "--eval_steps", "1", *METHODS[command])
    whole = train(world, command, run, *more)
    weights = (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    shutil.rmtree(run / "model")
    again = train(world, command, run, *more, "--load_checkpoint")
    names = ("loss", "eval/loss", "grad_norm", "reward/margin")
    assert [[step[name] for name in names] for step in again[1:]] == [
        [step[name] for name in names] for step in whole[1:]
    ]
    assert (run / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("command", METHODS)
def test_check_export_and_report_know_it(
    world: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["check", command, *flags(world, command, run)]) == 0
    out = capsys.readouterr().out
    assert "example 1, chosen:" in out and out.endswith("ok: the run can start\n") and not run.exists()
    train(world, command, run)
    assert main(["export", "--run_dir", str(run), "--output_path", str(tmp_path / "made")]) == 0
    card = (tmp_path / "made" / "README.md").read_text()
    assert {"simpo": "(SimPO)", "orpo": "(ORPO)"}[command] in card and f"`togi {command}`" in card
    assert main(["report", "--run_dir", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert ("Mean log of the odds" in page) == (command == "orpo")
