"""``togi check``: what it says of each command, that it refuses what the run refuses with the same sentence, and that it
leaves nothing behind.

The weight files cannot be read, so that whoever loads them fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.offline_world import ROOT, flags, make_world
from togi.cli.commands import CHECKED
from togi.cli.main import main

RIGHT = "def reward_func(queries, prompts, labels):\n"
RIGHT += "    return [float(q[len(p):] == a) for q, p, a in zip(queries, prompts, labels)]\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("check"))
    for weights in folder.glob("*/model.safetensors"):
        weights.write_bytes(b"no weights")
    rows = [{"q": f"say {i}", "a": str(i)} for i in range(9)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"q": "", "a": "empty"}]))
    (folder / "right.py").write_text(RIGHT)
    return folder


def words(world: Path, command: str, *more: str) -> list[str]:
    """A complete command; the run's folders would lie beside the data."""
    run = world / "run"
    if command != "rl":
        return flags(world, command, run, *more)
    given = f"""
        --pretrain {world}/model --prompt_data {world}/prompts.jsonl --input_key q --label_key a --reward_func {world}/right.py
        --rollout_engine transformers --advantage_estimator group_norm --n_samples_per_prompt 4 --rollout_batch_size 4
        --train_batch_size 8 --prompt_max_len 64 --generate_max_len 32 --apply_chat_template --use_wandb secret
        --run_dir {run} --save_path {run}/model --ckpt_path {run}/checkpoints
    """
    return [*given.split(), *more]


def listing(folder: Path) -> Mapping[Path, float]:
    return {path: path.stat().st_mtime for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize("command", CHECKED)
def test_everything_is_shown_and_nothing_written(
    world: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    before = listing(world)
    assert main(["check", command, *words(world, command)]) == 0
    assert listing(world) == before
    out = capsys.readouterr().out
    assert out.endswith("ok: the run can start\n")
    assert "  --pretrain " in out and "secret" not in out
    assert "model: --pretrain " in out and "in 2 layers of width 64; its embedding has 300 rows" in out
    assert "of 512 positions that the model has" in out
    special = "(BOS '<|im_start|>', EOS '<|im_end|>', padding '<pad>')"
    assert "tokenizer: " in out and f"with 260 tokens {special}; answers end at '<|im_end|>'\n" in out
    assert [f"example {i}" in out for i in (1, 2, 3, 4)] == [True, True, True, False]
    assert "disk: 499 kB final model; " in out or command == "rm"


def test_what_is_said_of_an_rl_run(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "rl", *words(world, "rl", "--save_steps", "1", "--enable_ema")]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "lengths: --prompt_max_len 64 + --generate_max_len 32, of 512 positions that the model has",
        "template: the chat template of the tokenizer",
        f"prompts: prompts of {world}/prompts.jsonl, 9 of 10 are used; dropped: 1 empty",
        "    <|im_start|>user",
        "    say 0<|im_end|>",
        "reward: function says 0 of the answer 'A trial answer: 42' to the first prompt",
        "placement: engine 1 + actor 1 + ref 1 = 3 workers in this process",
        "4 prompts x 4 samples = 16 samples a rollout -> 2 updates of up to 8; 3 rollouts, 5 updates in all",
        "fine: 5 updates of the actor at a learning rate of up to 1e-06.",
    ):
        assert line in lines


def test_a_rate_of_zero_is_said(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "sft", *words(world, "sft", "--learning_rate", "0")]) == 0
    warning = "warning: --learning_rate 0 changes no weight: give a rate above 0, unless that is meant."
    assert warning in capsys.readouterr().out.splitlines()


def test_a_warm_up_that_is_all_of_the_run_teaches_nothing(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    still = (
        "The run has 1 updates, and --lr_scheduler cosine_with_min_lr with --lr_warmup_ratio 0.03 gives them learning rate 0, "
        "which changes no weight: plan more updates, or take --lr_scheduler constant."
    )
    warm_up = "--lr_scheduler cosine_with_min_lr"
    for command, more in (("sft", f"--train_batch_size 99 {warm_up}"), ("rl", "--max_steps 1 --train_batch_size 16")):
        assert main(["check", command, *words(world, command, *more.split())]) == 2
        said = capsys.readouterr()
        assert f"stops learning: {still}" in said.out.splitlines()
        assert f"The run would not learn. {still}" in said.err
        assert main(["check", command, *words(world, command, *more.split(), "--lr_scheduler", "constant")]) == 0
        capsys.readouterr()


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("sft", "    User: say a 0"),
        ("sft", "    Assistant: ⟦yes end<|im_end|>⟧"),
        ("sft", "train: rows of @/sft.jsonl, 14 of 14 are used; dropped: none"),
        (
            "sft",
            "14 rows in batches of 4, the last of an epoch 2: 4 optimizer steps an epoch, 1 epochs, 4 steps in all",
        ),
        ("dpo", "  example 1, chosen:"),
        ("dpo", "    number 0?⟦good 0<|im_end|>⟧"),
        ("dpo", "  example 1, rejected:"),
        ("dpo", "    number 0?⟦bad<|im_end|>⟧"),
        ("prm", "    step 00 ⟦#⟧"),
        ("kto", "eval: rows of @/kto_eval.jsonl, 5 of 5 are used; dropped: none"),
    ],
)
def test_rows_are_shown_with_what_is_learnt(
    world: Path, command: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", command, *words(world, command)]) == 0
    out = capsys.readouterr().out.replace(str(world), "@").splitlines()
    assert any(line in each for each in out)


@pytest.mark.parametrize("command", CHECKED)
@pytest.mark.parametrize("mistake", ["--max_epoch 1", "--pretrain no/such/folder", "--%s nope", "--train_batch_size 0"])
def test_what_the_run_refuses_is_refused_with_its_sentence(
    world: Path, command: str, mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "prompt_key" if command in ("rm", "dpo") else "input_key"
    given = words(world, command, *mistake.replace("%s", key).split())
    assert main(["check", command, *given]) == 2
    ours = capsys.readouterr().err
    assert main([command, *given]) == 2
    assert ours == capsys.readouterr().err and ours.count("\n") == 1


def test_a_missing_checkpoint_is_said(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = words(world, "sft", "--load_checkpoint")
    assert main(["check", "sft", *given]) == 0
    assert "has no complete checkpoint, starting anew" in caplog.text


@pytest.mark.parametrize("command", ["sft", "kd"])
def test_processes_that_are_not_there_are_no_mistake(
    world: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ring = words(world, command, "--ring_attn_size", "2")
    assert main(["check", command, *ring]) == 0
    assert (
        "processes: the run needs a multiple of 2, started with torchrun --nproc_per_node 2\n"
        in capsys.readouterr().out
    )
    monkeypatch.setenv("RANK", "1")  # of several processes the first one speaks
    assert main(["check", command, *ring]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            ["infer"],
            f"togi check looks at {', '.join(CHECKED)}, not at infer: other commands check all of that when they start.",
        ),
        (["stf"], f"togi check looks at {', '.join(CHECKED)}, not at stf; did you mean sft?"),
        (["sft", "--sample_groups", "2"], "--sample_groups samples answers to be rewarded: it is for togi check rl."),
        (["rl", "--sample_groups", "-1"], "--sample_groups -1: must be at least 0."),
    ],
)
def test_what_cannot_be_checked(given: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *given]) == 2
    assert capsys.readouterr().err == f"togi: {sentence}\n"


def test_ray_is_not_even_imported(world: Path) -> None:
    code = "import sys; from togi.cli.main import main; status = main(sys.argv[1:]); sys.exit(status or 'ray' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, "check", "rl", *words(world, "rl")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
