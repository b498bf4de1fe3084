"""togi iterate on a tiny model: every method for two rounds, stopped anywhere and gone on with, by its own files checked."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.example_scripts import ONE_PROCESS, run_script
from tests.offline_world import ROOT, call, write
from tests.tiny import STOP, save_tiny_model, tiny_config, tiny_model, tiny_tokenizer
from togi.config.iterate import IterateConfig
from togi.config.parse import parse
from togi.errors import CheckpointError, DataError
from togi.run.iterate import Result, start_iterate
from togi.run.iterate_steps import Launch, subprocess_step
from togi.run.offline import OfflineRun

REWARD = """
def reward_func(queries, prompts, labels):
    # more of the letter is better; spread out by length, so that ties are rare
    answers = [query[len(prompt):] for query, prompt in zip(queries, prompts)]
    return [answer.count(label) - len(answer) / 100 for answer, label in zip(answers, labels)]
"""
PRINTABLE = 94
DATA = "--input_key q --label_key letter --apply_chat_template --rollout_engine transformers"
SIZES = "--rounds 2 --rollout_batch_size 4 --best_of_n 4 --prompt_max_len 100 --max_new_tokens 16 --max_len 160"
TRAINING = "--train_batch_size 2 --max_epochs 2 --learning_rate 3e-3 --save_steps 1"
METHODS = {
    "rs": [],
    "dpo": ["--learning_rate", "1e-4", "--keep_truncated"],
    "csft": ["--normalize_reward", "--csft_prompt", "1.5"],
}


class Stopped(Exception):
    """What a test raises in the place of a step."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    model = tiny_model("llama", seed=4)
    with torch.no_grad():
        model.lm_head.weight[PRINTABLE:256] = 0
        model.lm_head.weight[STOP] *= 4
    model.save_pretrained(folder / "model")
    torch.manual_seed(5)
    rm = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=1, initializer_range=0.3))
    rm.save_pretrained(folder / "rm")
    tiny_tokenizer().save_pretrained(folder / "rm")
    write(folder / "prompts.jsonl", [{"q": f"say {i}", "letter": "abcdef"[i]} for i in range(6)])
    (folder / "reward.py").write_text(REWARD)
    return folder


def command(world: Path, run: Path, method: str, *more: str) -> list[str]:
    words = [
        "--method",
        method,
        "--pretrain",
        world / "model",
        "--prompt_data",
        world / "prompts.jsonl",
        "--run_dir",
        run,
    ]
    words += [*DATA.split(), *SIZES.split(), *TRAINING.split()]
    words += ["--reward_func", world / "reward.py"]
    words += ["--eval_dataset", world / "prompts.jsonl", "--eval_n_samples_per_prompt", "2", *METHODS[method]]
    return [str(word) for word in (*words, *more)]


def here(module: str, argv: Sequence[str]) -> None:
    """A step in this process: start-up is most of the time of a tiny one."""
    call(module, argv)


def iterate(world: Path, run: Path, method: str, *more: str, launch: Launch = here) -> Result:
    torch.set_num_threads(1)
    return start_iterate(parse(IterateConfig, command(world, run, method, *more), "iterate"), launch=launch)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Result]]:
    """An uninterrupted run of each method."""
    runs = {method: tmp_path_factory.mktemp(method) / "run" for method in METHODS}
    return {method: (run, iterate(world, run, method)) for method, run in runs.items()}


@pytest.mark.parametrize("method", METHODS)
def test_rounds_take_the_prompts_in_turn(whole: dict[str, tuple[Path, Result]], method: str) -> None:
    run, result = whole[method]
    taken = [[row["q"] for row in read(run / f"round_00{r}" / "prompts.jsonl")] for r in (1, 2)]
    assert taken == [["say 0", "say 1", "say 2", "say 3"], ["say 4", "say 5", "say 0", "say 1"]]
    assert [facts["round"] for facts in result.rounds] == [0, 1, 2]
    assert json.loads(result.summary.read_text())["rounds"] == [*result.rounds]
    weights = [folder / "model.safetensors" for folder in (run / "round_001" / "model", result.model)]
    assert weights[0].read_bytes() != weights[1].read_bytes()


def test_rewards_are_the_functions_and_the_held_out_mean_is_over_prompts(whole: dict[str, tuple[Path, Result]]) -> None:
    run, result = whole["rs"]
    scored = read(run / "round_001" / "scored.jsonl")
    assert len(scored) == 16
    for row in scored:
        assert row["reward"] == pytest.approx(row["output"].count(row["label"]) - len(row["output"]) / 100)
    assert result.rounds[1]["reward"] == pytest.approx(statistics.mean(row["reward"] for row in scored))
    held_out = read(run / "round_002" / "eval" / "scored.jsonl")
    means = [statistics.mean(row["reward"] for row in held_out[i : i + 2]) for i in range(0, 12, 2)]
    assert result.rounds[2]["eval_reward"] == pytest.approx(statistics.mean(means))
    assert result.rounds[2]["eval_stderr"] == pytest.approx(statistics.stdev(means) / 6**0.5)


def test_what_each_method_trains_on(world: Path, whole: dict[str, tuple[Path, Result]]) -> None:
    for method in METHODS:
        folder = whole[method][0] / "round_001"
        spoken = [row for row in read(folder / "scored.jsonl") if row["output"].strip()]
        rows = [row for row in spoken if method == "dpo" or row["finish_reason"] == "stop"]
        trained = read(folder / "train.jsonl")
        of_prompt = {f"say {i}": [row for row in rows if row["id"] == f"0:{i}"] for i in range(4)}
        if method == "rs":
            for row in trained:
                assert row["reward"] == max(other["reward"] for other in of_prompt[row["prompt"]])
        elif method == "dpo":
            for row in trained:
                rewards = [other["reward"] for other in of_prompt[row["prompt"]]]
                assert (row["chosen_reward"], row["rejected_reward"]) == (max(rewards), min(rewards))
        else:
            assert len(trained) == len(rows)
            assert all(row["input"].endswith(f" <rm_score>: {row['reward']:.2f} ") for row in trained)
    assert whole["rs"][1].rounds[1]["truncated"] > 0


def test_conditional_sft_asks_in_the_words_it_was_trained_on(whole: dict[str, tuple[Path, Result]]) -> None:
    """Not in the first round: that model has never seen a reward. Scores and new rows are of the prompt without it."""
    run, _ = whole["csft"]
    first, second = (read(run / f"round_00{r}" / "scored.jsonl") for r in (1, 2))
    assert not any("<rm_score>" in row["input"] for row in first)
    assert all(row["input"] == f"{row['prompt']} <rm_score>: 1.50 " for row in second)
    assert all(row["input"].count("<rm_score>") == 1 for row in read(run / "round_002" / "train.jsonl"))
    assert all("<rm_score>: 1.50 " in row["input"] for row in read(run / "round_001" / "eval" / "generated.jsonl"))
    assert not any("<rm_score>" in row["input"] for row in read(run / "round_000" / "eval" / "generated.jsonl"))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_again_and_again_ends_equal(
    world: Path,
    whole: dict[str, tuple[Path, Result]],
    tmp_path: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in its second round before generation, in the training (after a checkpoint), and before the evaluation."""
    run, expected = whole[method]
    calls: list[str] = []
    interrupted: list[int] = []

    def stopping(module: str, place: str) -> Launch:
        """Runs steps until the one that is to write to ``place``; training does its first optimizer step."""

        def launch(name: str, argv: Sequence[str]) -> None:
            calls.append(name)
            if module in name and any(place in word for word in argv):
                if "train" in name:
                    monkeypatch.setattr(OfflineRun, "log", interrupt)
                    here(name, argv)
                raise Stopped
            here(name, argv)

        return launch

    def interrupt(run: OfflineRun, values: Mapping[str, float]) -> None:
        log(run, values)
        if run.step == 2:
            interrupted.append(run.step)
            raise Stopped

    log = OfflineRun.log
    for module, place in (
        ("batch_inference", "round_002/generated"),
        ("train", "round_002/model"),
        ("batch_inference", "round_002/eval"),
    ):
        with pytest.raises(Stopped):
            iterate(world, tmp_path / "run", method, launch=stopping(module, place))
        monkeypatch.setattr(OfflineRun, "log", log)
    assert interrupted == [2]
    assert "round 2: train" in (tmp_path / "run" / "iterate.json").read_text()
    before = len(calls)
    result = iterate(
        world, tmp_path / "run", method, launch=lambda name, argv: (calls.append(name), here(name, argv))[1]
    )
    assert calls[before:] == ["togi.cli.batch_inference"]  # the last evaluation is all that was left
    names = ("reward", "rows", "ties", "truncated", "eval_reward", "eval_stderr")
    for ours, theirs in zip(result.rounds, expected.rounds, strict=True):
        assert {name: ours.get(name) for name in names} == {name: theirs.get(name) for name in names}
    assert (result.model / "model.safetensors").read_bytes() == (expected.model / "model.safetensors").read_bytes()
    assert read(tmp_path / "run" / "round_002" / "scored.jsonl") == read(run / "round_002" / "scored.jsonl")


def test_other_settings_are_refused_and_more_rounds_are_not(world: Path, whole: dict[str, tuple[Path, Result]]) -> None:
    run, expected = whole["rs"]
    with pytest.raises(CheckpointError, match=r"other settings \(--best_of_n was 4, is 3\)"):
        iterate(world, run, "rs", "--best_of_n", "3")
    again = iterate(world, run, "rs", launch=subprocess_step)
    assert again.rounds == expected.rounds


def test_a_reward_model_reads_the_prompt_in_its_own_template(world: Path, tmp_path: Path) -> None:
    """Function and model together, by their weights; what was generated or scored before a stop is not done again."""
    more = ["--reward_pretrain", str(world / "rm"), "--rounds", "1", "--eval_dataset", str(world / "prompts.jsonl")]
    more += ["--ref_previous_round", "--keep_truncated", "--reward_weights", "3", "0.5"]
    calls: list[str] = []

    def stopping(module: str, argv: Sequence[str]) -> None:
        calls.append(next(word for word in argv if word.startswith(("--output_path", "--save_path"))))
        here(module, argv)
        if len(calls) == 2:
            raise Stopped

    with pytest.raises(Stopped):  # after the model's scores of round 0
        iterate(world, tmp_path / "run", "dpo", *more, launch=stopping)
    iterate(world, tmp_path / "run", "dpo", *more, launch=stopping)
    assert len(calls) == len(set(calls)) == 7
    folder = tmp_path / "run" / "round_001"
    model = AutoModelForSequenceClassification.from_pretrained(world / "rm", dtype=torch.float32).eval()
    for row in read(folder / "scored.jsonl")[:4]:
        prompt = f"<|im_start|>user\nsay {row['id'][2:]}<|im_end|>\n<|im_start|>assistant\n"
        assert row["input"] == prompt
        ids = tiny_tokenizer()(f"{prompt}{row['output']}<|im_end|>", add_special_tokens=False)["input_ids"]
        if not row["output"].strip():
            continue
        with torch.no_grad():
            value = model(torch.tensor([ids])).logits[0, 0].item()
        function = row["output"].count(row["label"]) - len(row["output"]) / 100
        assert row["reward"] == pytest.approx(3 * value + 0.5 * function, abs=1e-5)


def test_equal_rewards_make_no_pair(world: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(
        "def reward_func(queries, prompts, labels):\n    return [1.0 for _ in queries]\n"
    )
    with pytest.raises(DataError, match=r"Round 1 has nothing to learn.*4 inputs make no pair"):
        iterate(world, tmp_path / "run", "dpo", "--reward_func", str(tmp_path / "reward.py"), "--keep_truncated")


def test_a_broken_reward_is_told_before_anything_is_generated(world: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def reward_func(queries, prompts, labels):\n    return [1 / 0]\n")
    words = [sys.executable, "-m", "togi", "iterate", *command(world, tmp_path / "run", "rs")]
    done = subprocess.run(
        [*words, "--reward_func", str(tmp_path / "reward.py")], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "ZeroDivisionError" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "round_000" / "eval" / "generated.jsonl").exists()


# Each best-of-n example of the README, with what makes it tiny.
EXAMPLES = {
    "batch_inference.sh": [],
    "rejection_sampling.sh": ["--rounds", "1"],
    "iterative_dpo.sh": ["--best_of_n", "3", "--label_smoothing", "0.1"],
    "conditional_sft.sh": ["--normalize_reward"],
}
TINY = "--no_bf16 --max_samples 4 --prompt_max_len 100 --max_new_tokens 8"
TINY_LOOP = "--max_len 160 --max_tokens_per_gpu 1024 --keep_truncated --eval_n_samples_per_prompt 1 --eval_dataset"


SELDOM = ("batch_inference.sh", "conditional_sft.sh")


@pytest.mark.parametrize(
    "script", [pytest.param(each, marks=pytest.mark.large if each in SELDOM else ()) for each in EXAMPLES]
)
def test_every_example_runs(world: Path, tmp_path: Path, script: str) -> None:
    """All steps of a script in one process: starting many takes longer than a tiny step."""
    togi = tmp_path / "togi"
    togi.write_text(ONE_PROCESS.format(python=sys.executable))
    togi.chmod(0o755)
    names = {"MODEL": world / "model", "RM": world / "rm", "REWARD": world / "reward.py", "OUT": tmp_path / "run"}
    names |= {"ENGINE": "transformers", "TASK": "generate", "TOGI": togi}
    words = [*TINY.split(), *EXAMPLES[script]]
    if script != "batch_inference.sh":
        words += [*TINY_LOOP.split(), world / "prompts.jsonl", "--input_key", "q", "--label_key", "letter"]
        words += ["--prompt_data", world / "prompts.jsonl"]
    done = run_script(script, *words, **names, OMP_NUM_THREADS=1)
    if script == "batch_inference.sh":
        generated, best = read(tmp_path / "run" / "generated.jsonl"), read(tmp_path / "run" / "best.jsonl")
        assert [row["id"] for row in generated] == [f"0:{i}" for i in range(4) for _ in range(4)]
        assert [row["id"] for row in best] == ["0:0", "0:1", "0:2", "0:3"]
        return
    rounds = json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"]
    for facts in rounds:
        assert f"held-out reward {facts['eval_reward']:.4f}" in done.stdout
    assert rounds[-1]["rows"] > 0
    assert Path(done.stdout.split("model:")[-1].strip(), "model.safetensors").is_file()
