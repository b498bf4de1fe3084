"""togi infer on tiny models: what generates is Transformers' own text, killed commands go on, scores are the model's."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from tests import warm
from tests.offline_world import ROOT, write
from tests.tiny import PAD, STOP, save_tiny_model, tiny_config, tiny_model, tiny_tokenizer
from togi.cli.main import main
from togi.data.row_log import RowLog

NEW = 12
PRINTABLE = 94  # the tokenizer's first ids are the printable ASCII bytes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that writes ASCII and stops now and then, a reward model, and prompts."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    ascii_model().save_pretrained(folder / "model")
    torch.manual_seed(5)
    rm = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=1, initializer_range=0.3))
    rm.config.mean, rm.config.std = 0.25, 2.0
    rm.save_pretrained(folder / "rm")
    tiny_tokenizer().save_pretrained(folder / "rm")
    write(folder / "prompts.jsonl", [{"q": f"say {i}", "answer": str(i)} for i in range(9)])
    return folder


def ascii_model() -> PreTrainedModel:
    model = tiny_model("llama", seed=4).eval()
    with torch.no_grad():
        model.lm_head.weight[PRINTABLE:256] = 0
        model.lm_head.weight[STOP] *= 3
    return model


def words(world: Path, out: Path, *more: str) -> list[str]:
    fixed = ["infer", "--eval_task", "generate", "--pretrain", world / "model", "--dataset", world / "prompts.jsonl"]
    sizes = ["--input_key", "q", "--prompt_max_len", "64", "--max_new_tokens", str(NEW), "--output_path", out]
    return [str(word) for word in (*fixed, *sizes, *more)]


def infer(world: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    assert main(words(world, out, *more)) == 0
    assert not out.with_name(out.name + ".partial").exists()
    return read(out)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def greedy(text: str, **options: Any) -> str:
    """Transformers' own continuation of a rendered prompt."""
    tokenizer, model = tiny_tokenizer(), ascii_model()
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=STOP, pad_token_id=PAD, **options)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_output_is_exactly_the_generated_text(world: Path, tmp_path: Path) -> None:
    rows = infer(world, tmp_path / "a.jsonl", "--greedy_sampling", "--apply_chat_template", "--label_key", "answer")
    assert [row["label"] for row in rows] == [str(i) for i in range(9)]
    for number, row in enumerate(rows):
        assert row["input"] == f"<|im_start|>user\nsay {number}<|im_end|>\n<|im_start|>assistant\n"
        assert row["output"] == greedy(row["input"])
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    kept = infer(world, tmp_path / "b.jsonl", "--greedy_sampling", "--apply_chat_template", "--keep_special_tokens")
    stopped = [(with_end, row) for with_end, row in zip(kept, rows, strict=True) if row["finish_reason"] == "stop"]
    assert all(with_end["output"] == row["output"] + "<|im_end|>" for with_end, row in stopped)


def test_repetition_penalty_is_transformers_own(world: Path, tmp_path: Path) -> None:
    rows = infer(
        world, tmp_path / "a.jsonl", "--greedy_sampling", "--repetition_penalty", "1.7", "--apply_chat_template"
    )
    assert [row["output"] for row in rows] == [greedy(row["input"], repetition_penalty=1.7) for row in rows]
    assert [row["output"] for row in rows] != [greedy(row["input"]) for row in rows]


def test_slices_together_are_the_whole(world: Path, tmp_path: Path) -> None:
    """Seeds belong to prompts, so a slice samples what the whole would."""
    whole = infer(world, tmp_path / "whole.jsonl", "--best_of_n", "3")
    assert [(row["id"], row["sample"]) for row in whole] == [(f"0:{i}", n) for i in range(9) for n in range(3)]
    parts = []
    for number in range(3):
        parts += infer(
            world, tmp_path / "part.jsonl", "--best_of_n", "3", "--iter", str(number), "--rollout_batch_size", "4"
        )
    assert parts == whole
    assert len({row["output"] for row in whole}) > 20
    assert infer(world, tmp_path / "one.jsonl", "--best_of_n", "3", "--micro_batch_size", "1") == whole


def test_a_killed_command_goes_on(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = infer(world, tmp_path / "whole.jsonl", "--best_of_n", "4", "--micro_batch_size", "2")
    out = tmp_path / "part.jsonl"
    command = [sys.executable, "-m", "togi.cli.batch_inference", *words(world, out, "--best_of_n", "4")[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    killed = subprocess.Popen(
        [*command, "--micro_batch_size", "2"], cwd=ROOT, env=environment, stdout=quiet, stderr=quiet
    )
    partial = tmp_path / "part.jsonl.partial"
    deadline = time.monotonic() + 120
    while not (partial.is_file() and partial.read_text().count("\n") > 2) and time.monotonic() < deadline:
        assert killed.poll() is None, "the command ended before it could be killed"
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not out.exists()
    with partial.open("a") as file:
        file.write('{"unit": 8, "rows": [{"out')  # a line that the kill cut short
    capsys.readouterr()
    assert main(words(world, out, "--best_of_n", "4", "--temperature", "0.5")) == 2
    assert "unfinished work of another command (--temperature was 1.0, is 0.5)" in capsys.readouterr().err
    assert infer(world, out, "--best_of_n", "4", "--micro_batch_size", "2") == whole
    assert "prompts were done by an earlier attempt" in capsys.readouterr().out


def reference_scores(world: Path, texts: list[str]) -> list[float]:
    """One at a time, by plain Transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(world / "rm", dtype=torch.float32).eval()
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    with torch.no_grad():
        return [model(torch.tensor([each])).logits[0, 0].item() for each in ids]


def rate(world: Path, rows: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    fixed = ["infer", "--eval_task", "rm", "--pretrain", world / "rm", "--dataset", rows, "--output_path", out]
    assert main([str(word) for word in (*fixed, "--max_len", "128", *more)]) == 0
    return read(out)


def test_scores_are_the_reward_models_own(world: Path, tmp_path: Path) -> None:
    rows = [{"input": f"q{i}", "output": "a" * i, "id": f"x{i}"} for i in range(6)]  # the first output is empty
    write(tmp_path / "rows.jsonl", rows)
    scored = rate(world, tmp_path / "rows.jsonl", tmp_path / "scored.jsonl")
    expected = reference_scores(world, [f"{row['input']}{row['output']}<|im_end|>" for row in rows])
    assert [row["reward"] for row in scored] == pytest.approx(expected, abs=1e-5)
    assert [{**row, "reward": 0} for row in scored] == [{**row, "reward": 0} for row in rows]
    normal = rate(world, tmp_path / "rows.jsonl", tmp_path / "normal.jsonl", "--normalize_reward")
    assert [row["reward"] for row in normal] == pytest.approx([(value - 0.25) / 2 for value in expected], abs=1e-5)
    chat = rate(world, tmp_path / "rows.jsonl", tmp_path / "chat.jsonl", "--apply_chat_template")
    texts = [
        f"<|im_start|>user\n{row['input']}<|im_end|>\n<|im_start|>assistant\n{row['output']}<|im_end|>" for row in rows
    ]
    assert [row["reward"] for row in chat] == pytest.approx(reference_scores(world, texts), abs=1e-5)


def test_columns_of_the_data_never_replace_those_of_the_scores(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alpaca's column ``input`` is empty here: selection by it would take all rows for outputs of one prompt."""
    rows = [
        {"instruction": f"Task {i // 2}", "input": "", "output": "yes" * (i + 1), "reward": 9, "more": i}
        for i in range(6)
    ]
    write(tmp_path / "alpaca.jsonl", rows)
    keys = ["--input_key", "instruction"]
    scored = rate(world, tmp_path / "alpaca.jsonl", tmp_path / "scored.jsonl", *keys)
    assert "JSON has no such value: 'input' in 6 rows, 'reward' in 6 rows" in capsys.readouterr().out
    expected = reference_scores(world, [f"{row['instruction']}{row['output']}<|im_end|>" for row in rows])
    assert [row.pop("reward") for row in scored] == pytest.approx(expected, abs=1e-5)
    assert scored == [{"input": row["instruction"], "output": row["output"], "more": row["more"]} for row in rows]
    best = rate(world, tmp_path / "alpaca.jsonl", tmp_path / "best.jsonl", *keys, "--post_processor", "rs")
    assert [row["input"] for row in best] == ["Task 0", "Task 1", "Task 2"]


def test_columns_that_json_cannot_hold_are_left_out(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    when = datetime(2024, 1, 2, tzinfo=UTC)
    rows = [{"input": "q", "output": "a", "when": when, "n": n, "raw": b"x"} for n in (1.0, math.nan)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    scored = rate(world, tmp_path / "rows.parquet", tmp_path / "scored.jsonl")
    assert "'n' in 1 rows, 'raw' in 2 rows, 'when' in 2 rows" in capsys.readouterr().out
    assert [sorted(row) for row in scored] == [["input", "n", "output", "reward"], ["input", "output", "reward"]]


def test_from_prompts_to_rows_to_train_on(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The established pipeline of files: generate, score, select; each selection agrees with the scored rows."""
    out = tmp_path / "generated.jsonl"
    infer(world, out, "--best_of_n", "3", "--apply_chat_template")
    scored = rate(world, out, tmp_path / "scored.jsonl")
    groups = [scored[i : i + 3] for i in range(0, len(scored), 3)]
    best = rate(world, out, tmp_path / "rs.jsonl", "--post_processor", "rs")
    assert best == [max(group, key=lambda row: row["reward"]) for group in groups]
    pairs = rate(world, out, tmp_path / "dpo.jsonl", "--post_processor", "iter_dpo")
    for pair, group in zip(pairs, groups, strict=True):
        assert pair["chosen_reward"] == max(row["reward"] for row in group)
        assert pair["rejected_reward"] == min(row["reward"] for row in group)
        assert {row["output"] for row in group} >= {pair["chosen"], pair["rejected"]}
        assert pair["prompt"] == group[0]["input"]
    told = rate(world, out, tmp_path / "csft.jsonl", "--post_processor", "csft", "--normalize_reward")
    assert sum(row["reward"] for row in told) == pytest.approx(0, abs=1e-9)
    assert told[0]["input"] == f"{scored[0]['input']} <rm_score>: {told[0]['reward']:.2f} "
    asked = infer(world, out, "--apply_chat_template", "--enable_csft", "--csft_prompt", "<rm_score>: 2")
    assert asked[0]["input"] == f"{scored[0]['input']} <rm_score>: 2.00 "
    assert asked[0]["prompt"] == scored[0]["input"]


def test_vllm_gives_the_same_greedy_text(world: Path, tmp_path: Path) -> None:
    same = ["--greedy_sampling", "--repetition_penalty", "1.3"]
    ours = infer(world, tmp_path / "ours.jsonl", *same)
    command = [sys.executable, "-m", "togi.cli.batch_inference", *words(world, tmp_path / "vllm.jsonl", *same)[1:]]
    command += ["--eval_task", "generate_vllm", "--vllm_cpu_kv_cache_gb", "0.1", "--enable_prefix_caching"]
    done = warm.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert read(tmp_path / "vllm.jsonl") == ours


@pytest.mark.large
def test_a_vllm_in_two_processes_gives_the_same_greedy_text(world: Path, tmp_path: Path) -> None:
    ours = infer(world, tmp_path / "ours.jsonl", "--greedy_sampling")
    flags = ["--greedy_sampling", "--eval_task", "generate_vllm", "--vllm_cpu_kv_cache_gb", "0.1", "--tp_size", "2"]
    command = [sys.executable, "-m", "togi.cli.batch_inference", *words(world, tmp_path / "vllm.jsonl", *flags)[1:]]
    command += ["--zero_stage", "3"]
    done = warm.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert read(tmp_path / "vllm.jsonl") == ours
    assert "--zero_stage 3: one process has nothing to shard" in done.stdout


def test_a_model_is_told_to_be_wrong_before_it_is_loaded(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        (["--iter", "9", "--rollout_batch_size", "4"], "--iter 9 starts at prompt 36 of 9"),
        (["--max_new_tokens", "600"], "--prompt_max_len 64 + --max_new_tokens 600 is more than the 512 positions"),
        (["--enable_csft", "--csft_prompt", "score 5"], "--csft_prompt 'score 5' does not fit --reward_template"),
        (["--output_path", str(world / "prompts.jsonl")], "is also --dataset"),
    ]
    for change, sentence in cases:
        assert main(words(world, tmp_path / "out.jsonl", *change)) == 2
        assert sentence in capsys.readouterr().err


def test_no_output_takes_the_place_of_its_data(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files are compared, not names; a new file in a folder of data would be read by the next command."""
    folder, link = tmp_path / "fold", tmp_path / "link.jsonl"
    folder.mkdir()
    data = folder / "train.jsonl"
    write(data, [{"q": "say it"}])
    link.symlink_to(data)
    before = data.read_bytes()
    cases = [
        (folder, data, "is also --dataset"),
        (folder / ".." / "fold" / "train.jsonl", data, "is also --dataset"),
        (link, data, "is also --dataset"),
        (folder, folder / "new.jsonl", "is in --dataset"),
    ]
    for dataset, out, sentence in cases:
        assert main(words(world, out, "--dataset", str(dataset))) == 2
        assert sentence in capsys.readouterr().err
    assert data.read_bytes() == before


def test_rows_of_other_labels_are_not_gone_on_with(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    asked = ["--dataset", str(data), "--label_key", "answer"]
    write(data, [{"q": "say it", "answer": "old"}])
    with monkeypatch.context() as stopped:
        stopped.setattr(RowLog, "finish", lambda log, rows: None)  # as if the command was killed here
        assert main(words(world, out, *asked)) == 0
    write(data, [{"q": "say it", "answer": "new"}])
    capsys.readouterr()
    assert main(words(world, out, *asked)) != 0
    assert "holds the unfinished work of another command (--dataset was" in capsys.readouterr().err
    out.with_name("out.jsonl.partial").unlink()
    assert [row["label"] for row in infer(world, out, *asked)] == ["new"]
