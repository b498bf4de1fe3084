"""The supervised rows of an RL run: what is learned of them, which come when, and what a checkpoint insists on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.tiny import STOP, tiny_tokenizer
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.data.prompts import PromptLoader
from togi.errors import CheckpointError, DataError
from togi.obs.progress import Progress
from togi.run.keep import checkpoint_store
from togi.run.rl_setup import Material, Pretraining, find_checkpoint, frozen_weights, load_pretraining
from togi.sample import Prompt

ROWS = [{"input": f"text {i}", "output": f"answer {i}"} for i in range(5)]


def load(folder: Path, *flags: str, rows: list[dict[str, str]] = ROWS) -> Pretraining:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = parse(RLConfig, ["--pretrain_data", str(file), "--pretrain_batch_size", "2", *flags], "rl").config
    return load_pretraining(config, str(file), tiny_tokenizer())


def test_every_token_of_a_text_is_learned_and_of_a_pair_the_response(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    texts = load(tmp_path, "--apply_chat_template")  # which is for prompts
    assert [sample.tokens.tolist() for (sample,) in texts.examples] == [tokenizer(r["input"]).input_ids for r in ROWS]
    assert all(sample.loss_mask[1:].all() for (sample,) in texts.examples)
    pairs = load(tmp_path, "--pretrain_output_key", "output", "--apply_chat_template")
    for row, (sample,) in zip(ROWS, pairs.examples, strict=True):
        learned = sample.tokens[sample.loss_mask].tolist()
        assert learned[: len(row["output"])] == tokenizer(row["output"]).input_ids
        assert STOP in learned


def test_each_row_comes_once_an_epoch_and_the_end_of_one_is_no_end(tmp_path: Path) -> None:
    rows = load(tmp_path)
    seen = [[sample.group_id for sample in rows.batch(step)] for step in range(6)]
    assert [len(batch) for batch in seen] == [2, 2, 1, 2, 2, 1]
    for epoch in (seen[:3], seen[3:]):
        assert Counter(name for batch in epoch for name in batch) == Counter(f"0:{i}" for i in range(5))
    assert seen[:3] != seen[3:]
    assert load(tmp_path).batch(4)[0].group_id == seen[4][0]


def test_a_checkpoint_goes_on_with_the_same_rows_only(tmp_path: Path) -> None:
    rows = load(tmp_path)
    state = json.loads(json.dumps(rows.state(7)))
    assert load(tmp_path).steps_of(state) == 7
    with pytest.raises(CheckpointError, match="other rows of --pretrain_data"):
        load(tmp_path, rows=ROWS[1:]).steps_of(state)
    with pytest.raises(CheckpointError, match="another number of them a step"):
        load(tmp_path, "--pretrain_batch_size", "3").steps_of(state)
    with pytest.raises(CheckpointError, match="made without --pretrain_data"):
        rows.steps_of(None)


def test_a_mistake_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^--pretrain_data: "):
        load(tmp_path, "--pretrain_input_key", "nothing")


def test_a_checkpoint_without_an_average_or_of_other_rows_is_refused_before_any_model_is_loaded(tmp_path: Path) -> None:
    rows, prompts = load(tmp_path), [Prompt("0:0", (1, 2), "text")]
    loader = PromptLoader(prompts, seed=42, episodes=1)
    material = Material(prompts, loader, (), rows, {}, str, (), None)
    flags = ["--load_checkpoint", "--ckpt_path", str(tmp_path / "checkpoints"), "--enable_ema"]
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    flags += ["--advantage_estimator", "reinforce", "--pretrain", str(model), "--init_kl_coef", "0.1"]
    config = parse(RLConfig, flags, "rl").config
    state = {"resumable": True, "rollout_batch_size": config.rollout_batch_size, "loader": loader.state().to_json()}

    def written(**more: object) -> None:
        with checkpoint_store(config).write(1, state | more, 0):
            pass

    for more, message in (
        ({"pretraining": rows.state(3)}, "no moving average, as it was written without --enable_ema"),
        ({"ema": True}, "made without --pretrain_data"),
    ):
        written(**more)
        with pytest.raises(CheckpointError, match=message):
            find_checkpoint(config, material, Progress())
    written(ema=True, pretraining=rows.state(3), frozen=frozen_weights(config))
    assert find_checkpoint(config, material, Progress()).step == 1
    critical = parse(RLConfig, [*flags, "--advantage_estimator", "gae"], "rl").config
    with pytest.raises(CheckpointError) as refused:
        find_checkpoint(critical, material, Progress())
    assert str(refused.value) == (
        f"The checkpoint {tmp_path}/checkpoints/step_00000001 has no critic, which --advantage_estimator gae needs: go on with "
        "the estimator that it was written with, or start anew with another --ckpt_path."
    )
    (model / "model.safetensors").write_bytes(b"rewrote")
    with pytest.raises(
        CheckpointError, match=f"was written with other weights in --pretrain {model}, of which the run"
    ):
        find_checkpoint(config, material, Progress())
    unheld = parse(RLConfig, [*flags, "--init_kl_coef", "0"], "rl").config  # no reference: nothing is frozen
    assert find_checkpoint(unheld, material, Progress()).step == 1
