"""``togi sft | rm | dpo | kto | prm | kd`` end to end with tiny models, against plain Transformers and against themselves."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.example_scripts import run_script
from tests.offline_world import DATA, ROOT, flags, launch, make_world, train
from tests.tiny import save_tiny_model
from togi.cli.main import main
from togi.learn.schedule import Schedule
from togi.methods import METHODS
from togi.obs.run_dir import read_held_out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("command", DATA)
def test_a_command_learns_and_leaves_everything_behind(world: Path, tmp_path: Path, command: str) -> None:
    run = tmp_path / "run"
    steps = train(world, command, run, "--max_epochs", "3", "--eval_steps", "5", "--train_batch_size", "5")
    assert len(steps) == 1 + 3 * 3  # 14 rows in batches of 5, 5 and 4, three times, after the evaluation at step 0
    assert [i for i, values in enumerate(steps) if "eval/loss" in values] == [0, 3, 5, 6, 9]
    assert steps[-1]["eval/loss"] < steps[0]["eval/loss"]
    assert steps[-1]["loss"] < steps[1]["loss"]
    assert {name for name in steps[0] if name.startswith("eval/")} == {
        f"eval/{name}" for name in ("loss", *(each.name for each in METHODS[command].measures))
    }
    for values in steps[1:]:
        assert all(math.isfinite(values[name]) for name in ("loss", "grad_norm", "lr"))
    drawn = drawn_on(run / "report.html")
    assert {name for name in steps[0] if name.startswith("eval/")} <= drawn
    assert {"loss", "lr", "grad_norm", "tokens/padding_share", "tokens/rank_imbalance"} <= drawn
    assert {"throughput/trained_tokens_per_second", "time/training", "time/evaluating"} <= drawn
    assert list(read_held_out(run)) == [0, 3, 5, 6, 9]
    assert json.loads((run / "data" / "train.json").read_text())["sources"][0]["kept"] == 14
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    kind = AutoModelForSequenceClassification if command == "rm" else AutoModelForCausalLM
    model = kind.from_pretrained(run / "model")
    inputs = AutoTokenizer.from_pretrained(run / "model")("abc", return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


def test_diverged_training_ends_as_a_failure(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third update overflows. No checkpoint of it pushes out an older one, and no model is written."""
    run = tmp_path / "run"
    monkeypatch.setattr(Schedule, "rate", lambda self, step: 1e30 if step == 2 else 1e-3)
    more = ("--max_epochs", "4", "--save_steps", "1", "--max_ckpt_num", "2", "--l2", "0")
    assert main(["sft", *flags(world, "sft", run, *more, evaluate=False)]) == 1
    assert (
        "Training has diverged: 3 updates in a row, the last of them in step 6, had a gradient that is not finite. Lower "
        "--learning_rate or --max_norm, or look for extreme values in the data of these steps, and start again, or from an "
        "earlier checkpoint."
    ) in capsys.readouterr().err
    assert not list((run / "model").glob("*"))
    assert sorted(path.name for path in (run / "checkpoints").glob("*0*")) == ["step_00000002", "step_00000003"]
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


def test_a_model_with_weights_that_are_not_finite_is_not_written(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Schedule, "rate", lambda self, step: math.nan)
    run = tmp_path / "run"
    assert main(["sft", *flags(world, "sft", run, "--train_batch_size", "14", evaluate=False)]) == 1
    assert re.search(
        r"Training has diverged: the weights of \S+ are not finite \(NaN or infinite\), so this model is not saved. Lower the "
        "learning rate or --max_norm, or look for extreme values in the data, and start again, or from an earlier checkpoint.",
        capsys.readouterr().err,
    )
    assert not list((run / "model").glob("*"))


def drawn_on(page: Path) -> set[str]:
    """The metrics that the charts of a report show."""
    data = re.search(r'id="togi-data">(.*?)</script>', page.read_text(), re.DOTALL)
    return {name for chart in json.loads(data[1])["charts"] for name in chart["names"]}


class Plain:
    """Rows scored one by one by plain Transformers in float32: no packing, no shared prompts, whole logits."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def logprobs(self, prompt: str, answer: str) -> torch.Tensor:
        """Log-probs of the answer's tokens and of the end token."""
        start = self.tokenizer(prompt)["input_ids"]
        ids = start + self.tokenizer(answer)["input_ids"] + [self.tokenizer.eos_token_id]
        with torch.no_grad():
            table = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return torch.stack([table[i - 1, ids[i]] for i in range(len(start), len(ids))])


def rows(world: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]


def test_the_held_out_loss_is_plain_transformers_token_mean(world: Path, tmp_path: Path) -> None:
    """Over all five rows (the batch of four has a rest), each token alike, before and after training."""
    steps = train(world, "sft", tmp_path / "run")
    for folder, measured in ((world / "model", steps[0]), (tmp_path / "run" / "model", steps[-1])):
        plain = Plain(folder)
        scored = [plain.logprobs(f"User: {r['q']}\nAssistant: ", r["a"]) for r in rows(world, "sft_eval")]
        assert measured["eval/loss"] == pytest.approx(-float(torch.cat(scored).mean()), rel=1e-5)
    losses = sorted((-float(each.mean()) for each in scored), reverse=True)
    shown = read_held_out(tmp_path / "run")[4]
    assert [row.values[0] for row in shown] == pytest.approx(losses, rel=1e-5)  # five rows: all of them, worst first
    assert [row.place for row in shown] == ["worst"] * 3 + ["best"] * 2
    texts = {f"User: {r['q']}\nAssistant: ⟦{r['a']}<|im_end|>⟧" for r in rows(world, "sft_eval")}
    assert {row.texts[0] for row in shown} == texts


def test_dpo_evaluates_like_plain_transformers(world: Path, tmp_path: Path) -> None:
    steps = train(world, "dpo", tmp_path / "run", "--learning_rate", "3e-4", "--beta", "0.3")
    policy, reference = Plain(tmp_path / "run" / "model"), Plain(world / "model")
    margins, rewards = [], []
    for row in rows(world, "pairs_eval"):
        gains = [
            policy.logprobs(row["q"], row[key]).double().sum() - reference.logprobs(row["q"], row[key]).double().sum()
            for key in ("chosen", "rejected")
        ]
        margins.append(0.3 * float(gains[0] - gains[1]))
        rewards.append([0.3 * float(gain) for gain in gains])
    rewards.sort(key=lambda pair: pair[0] - pair[1])
    for shown, expected in zip(read_held_out(tmp_path / "run")[4], rewards, strict=True):
        assert shown.values == pytest.approx(expected, abs=1e-5) and len(shown.texts) == 2
    assert steps[-1]["eval/reward/margin"] == pytest.approx(sum(margins) / 5, rel=1e-4)
    assert steps[-1]["eval/accuracy"] == sum(margin > 0 for margin in margins) / 5
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / 5
    assert steps[-1]["eval/loss"] == pytest.approx(expected, rel=1e-4)
    assert steps[0]["eval/loss"] == pytest.approx(math.log(2), rel=1e-6)  # policy and reference are still the same


def test_a_reward_model_scores_alike_in_a_plain_script(world: Path, tmp_path: Path) -> None:
    """Loaded by AutoModelForSequenceClassification: the same accuracy, and the statistics in its config."""
    steps = train(world, "rm", tmp_path / "run", "--margin_loss", "--learning_rate", "3e-4")
    folder = tmp_path / "run" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def score(text: str) -> float:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            return float(model(torch.tensor([ids])).logits[0, 0])

    scores = [(score(r["q"] + r["chosen"]), score(r["q"] + r["rejected"])) for r in rows(world, "pairs_eval")]
    assert steps[-1]["eval/accuracy"] == sum(a > b for a, b in scores) / 5
    assert steps[-1]["eval/reward/chosen"] == pytest.approx(sum(a for a, _ in scores) / 5, abs=1e-5)
    every = torch.tensor(scores, dtype=torch.float64).flatten()
    assert model.config.mean == pytest.approx(float(every.mean()), abs=1e-5)
    assert model.config.std == pytest.approx(float(every.std()), abs=1e-5)
    assert model.config.value_head_prefix == "score"


@pytest.mark.parametrize("command", ["rm", "dpo", "sft"])
def test_the_saving_of_common_beginnings(world: Path, tmp_path: Path, command: str) -> None:
    """A token is a byte here, and all rows are one pack: as many tokens are computed as there are different beginnings."""
    (step,) = train(world, command, tmp_path / "run", "--train_batch_size", "14", evaluate=False)
    pairs = [(row["q"], row[key]) for row in rows(world, "pairs") for key in ("chosen", "rejected")]
    if command == "sft":
        pairs = [(f"User: {row['q']}\nAssistant: ", row["a"]) for row in rows(world, "sft")]
    texts = [f"{prompt}{answer}$" for prompt, answer in pairs]  # and the end token
    every = sum(map(len, texts))
    beginnings = {text[: n + 1] for text in texts for n in range(len(text))}
    assert step["tokens/step"] == every
    assert step["tokens/shared_share"] == pytest.approx(1 - len(beginnings) / every, rel=1e-12)
    assert step["tokens/shared_share"] > 0.25


@pytest.mark.parametrize("command", ["sft", pytest.param("dpo", marks=pytest.mark.large)])
def test_two_processes_under_torchrun_equal_one(world: Path, tmp_path: Path, command: str) -> None:
    """All commands and all metrics are in ``tests/equal/test_offline_ranks.py``; here the launch as users write it."""
    one = train(world, command, tmp_path / "one")
    two = launch(world, command, tmp_path / "two", 2)
    assert len(one) == len(two)
    for a, b in zip(one[1:], two[1:], strict=True):
        for name in ("loss", "grad_norm", "tokens/seen"):
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), name


def model_bytes(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def test_a_killed_run_goes_on_bit_for_bit(world: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch, then the same command with --load_checkpoint."""
    settings = ["--train_batch_size", "2", "--max_epochs", "3", "--lr_scheduler", "cosine", "--eval_steps", "4"]
    whole = train(world, "sft", tmp_path / "whole", *settings)
    settings += ["--save_steps", "1", "--save_hf_ckpt"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "togi.cli.train_sft", *flags(world, "sft", tmp_path / "part", *settings)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "part" / "checkpoints" / "step_00000003").is_dir() and time.monotonic() < deadline:
        assert killed.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    part = train(world, "sft", tmp_path / "part", *settings, "--load_checkpoint")
    names = ("loss", "grad_norm", "lr", "eval/loss", "tokens/seen")
    assert [[v.get(name) for name in names] for v in part] == [[v.get(name) for name in names] for v in whole]
    assert model_bytes(tmp_path / "part") == model_bytes(tmp_path / "whole")
    newest = tmp_path / "part" / "checkpoints" / "step_00000021" / "hf" / "model.safetensors"
    assert newest.read_bytes() == model_bytes(tmp_path / "whole")


def test_a_rate_that_follows_the_held_out_loss_goes_on(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy doubles the rate at each evaluation while the loss falls, also after a resume from the second step."""
    greedy = ["--lr_scheduler", "greedy", "--lr_warmup_ratio", "0", "--lr_factor", "0.5", "--lr_patience", "0"]
    greedy += ["--learning_rate", "1e-4", "--eval_steps", "1", "--max_lr_ratio", "6", "--save_steps", "2"]
    whole = train(world, "sft", tmp_path / "run", *greedy)
    assert [values["lr"] for values in whole[1:]] == pytest.approx([1e-4, 2e-4, 4e-4, 6e-4])
    weights, checkpoints = model_bytes(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000004")
    (checkpoints / "latest").write_text("step_00000002")
    part = train(world, "sft", tmp_path / "run", *greedy, "--load_checkpoint")
    assert [values["lr"] for values in part[1:]] == [values["lr"] for values in whole[1:]]
    assert model_bytes(tmp_path / "run") == weights
    for kind, now in (("reduce_lr_on_plateau",) * 2, ("linear", "not one that follows a loss")):
        assert main(["sft", *flags(world, "sft", tmp_path / "run", "--load_checkpoint", "--lr_scheduler", kind)]) == 2
        assert f"belongs to another run (--lr_scheduler was greedy, is {now})" in capsys.readouterr().err


def test_a_checkpoint_of_other_data_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train(world, "sft", run, "--save_steps", "2")
    for change, named in (
        (["--dataset", str(world / "sft_eval.jsonl")], "--dataset"),
        (["--train_batch_size", "2"], "--train_batch_size"),
        (["--seed", "7"], "--seed"),
    ):
        assert main(["sft", *flags(world, "sft", run, "--load_checkpoint", *change)]) == 2
        assert f"belongs to another run ({named} was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "kind", "flag", "named"),
    [
        ("sft", ["--lora_rank", "4"], "--pretrain", "--pretrain (the base of the adapter)"),
        ("dpo", [], "--pretrain", "--ref_pretrain (by default --pretrain)"),
        ("kd", [], "--teacher_model", "--teacher_model"),
    ],
    ids=["base", "reference", "teacher"],
)
def test_a_frozen_model_stays_the_same(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    kind: list[str],
    flag: str,
    named: str,
) -> None:
    """A checkpoint does not hold it. A copy of its folder is the same model, other weights in the same folder are not."""
    for name in ("model", "copy"):
        shutil.copytree(world / "model", tmp_path / name)
    run, words = tmp_path / "run", kind
    train(world, command, run, "--save_steps", "2", *words, flag, str(tmp_path / "model"), evaluate=False)
    train(world, command, run, "--load_checkpoint", *words, flag, str(tmp_path / "copy"), evaluate=False)
    save_tiny_model(tmp_path / "copy", seed=5)
    again = flags(world, command, run, "--load_checkpoint", *words, flag, str(tmp_path / "copy"), evaluate=False)
    assert main([command, *again]) == 2
    assert f"belongs to another run (the weights of {named} was " in capsys.readouterr().err


def test_what_only_the_data_can_tell(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "same.jsonl").write_text('{"q": "a", "a": "b", "label": 1}\n' * 4)
    cases = [
        ("kto", ["--train_batch_size", "13"], "step 2 would get 1 of the 14 rows"),
        ("kto", ["--dataset", str(tmp_path / "same.jsonl")], "only one distinct prompt"),
        ("sft", ["--apply_chat_template", "--multiturn", "--output_key", "a"], "--multiturn takes the whole"),
        ("prm", ["--placeholder_token", "abc"], "--placeholder_token 'abc' is 3 tokens"),
    ]
    for number, (command, change, sentence) in enumerate(cases):
        run = tmp_path / str(number)
        assert main([command, *flags(world, command, run, *change, evaluate=False)]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())


# Each runnable example of the README for these commands, with what makes it tiny.
EXAMPLES = {
    "sft.sh": ["--multiturn"],
    "sft_lora.sh": ["--load_in_4bit"],
    "sft_ring.sh": ["--ring_head_stride", "1"],
    "rm.sh": ["--loss", "logexp"],
    "dpo.sh": ["--label_smoothing", "0.1"],
    "simpo.sh": ["--gamma", "0.5"],
    "orpo.sh": ["--odds_ratio_coef", "0.2"],
    "kto.sh": ["--desirable_loss_weight", "1.5"],
    "prm.sh": ["--gradient_checkpointing"],
    "kd_on_policy.sh": ["--generate_max_len", "8"],
    "kd.sh": ["--kd_divergence", "reverse"],
}
TINY = "--no_bf16 --max_samples 6 --train_batch_size 4 --micro_train_batch_size 2 --max_len 128 --max_epochs 1"


@pytest.mark.parametrize("script", EXAMPLES)
def test_every_example_trains(world: Path, tmp_path: Path, script: str) -> None:
    run = tmp_path / "run"
    places = {"MODEL": world / "model", "TEACHER": world / "teacher", "OUT": run}
    run_script(script, *TINY.split(), *EXAMPLES[script], **places, OMP_NUM_THREADS=1)
    values = [json.loads(line)["values"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(values) == 1 + 2  # an evaluation before training, then six rows in batches of four and two
    assert all(math.isfinite(step["loss"]) for step in values[1:])
    assert math.isfinite(values[-1]["eval/loss"])
    assert (run / ("merged" if script == "sft_lora.sh" else "model") / "model.safetensors").is_file()
