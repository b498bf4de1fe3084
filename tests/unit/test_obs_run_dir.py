"""The run folder: refused, resumed, wound back; no secret in any file; rollouts come back as they were."""

import json
import math

import pyarrow.parquet as pq
import pytest
import yaml

from tests.run_rows import ARGV, KEY, VALUES, row
from togi.errors import ConfigError, DataError
from togi.obs.metrics import StepRecord, read_records
from togi.obs.rollout_store import Split
from togi.obs.run_dir import (
    Resolved,
    RunDirectory,
    State,
    default_run_dir,
    read_held_out,
    redact_argv,
    redact_value,
    scrub,
    write_held_out,
)
from togi.obs.sinks import Recorder


def all_text(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_the_configuration_is_written_with_its_sources_and_without_its_secrets(tmp_path):
    run = RunDirectory.create(tmp_path / "run", "train_ppo_ray", ARGV, VALUES)
    values = run.read_info().values
    assert values["learning_rate"] == {"value": 1e-6, "source": "file"}
    assert values["zero_stage"] == {"value": 2, "source": "auto"}
    assert run.read_info().argv[2:] == ["--use_wandb", "<redacted>", "--use_wandb=<redacted>", "--packing_samples"]
    assert KEY.encode() not in all_text(run.root)
    assert b"secret-word" not in all_text(run.root)
    assert "learning_rate: 1.0e-06  # file\n" in run.config_path.read_text()
    loaded = yaml.safe_load(run.config_path.read_text())
    assert loaded == {
        "pretrain": "some/model",
        "learning_rate": 1e-6,
        "max_len": None,
        "prompt_data": ["a", "b"],
        "text": "two\nlines # and: yaml",
        "zero_stage": 2,
        "remote_rm_url": "http://<redacted>@host/score",
    }


def test_redaction_of_single_values():
    assert redact_value("use_wandb", "") == ""
    assert redact_value("label_key", "answer") == "answer"
    assert redact_argv(["--use_wandb", "--bf16", "x"]) == ["--use_wandb", "--bf16", "x"]
    assert scrub(f"bad key {KEY}", (KEY, "", "true")) == "bad key <redacted>"


def test_a_folder_with_a_run_is_refused_and_the_way_out_named(tmp_path):
    RunDirectory.create(tmp_path, "train_sft", ARGV, VALUES)
    with pytest.raises(ConfigError, match=r"--run_dir .* already holds a run.*--load_checkpoint"):
        RunDirectory.create(tmp_path, "train_sft", ARGV, VALUES)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--run_dir .*file.run cannot be written \(Not a directory\)"):
        RunDirectory.create(tmp_path / "file" / "run", "train_sft", ARGV, VALUES)


def test_a_folder_without_a_run_is_not_one(tmp_path):
    with pytest.raises(DataError, match="is not the folder of a run"):
        RunDirectory(tmp_path).read_info()


def test_resume_keeps_the_identity_and_the_old_configuration(tmp_path):
    first = RunDirectory.create(tmp_path, "train_sft", ARGV, VALUES)
    first.write_status(State.FAILED, "boom")
    assert first.read_status().message == "boom"
    changed = {**VALUES, "zero_stage": Resolved(3, "command line")}
    run_id = first.read_info().run_id
    second = RunDirectory.resume(tmp_path, "train_sft", ARGV, changed)
    assert second.read_info().run_id == run_id
    assert second.read_info().values["zero_stage"]["value"] == 3
    assert second.read_status().state is State.RUNNING
    old = json.loads((tmp_path / "discarded" / "001-config" / "run.json").read_text())
    assert old["values"]["zero_stage"]["value"] == 2


def test_default_folder_names_do_not_collide(tmp_path):
    import time

    now = time.struct_time((2026, 1, 2, 3, 4, 5, 0, 0, 0))
    first = default_run_dir("train_sft", now, tmp_path)
    assert first == tmp_path / "train_sft-20260102-030405"
    first.mkdir()
    assert default_run_dir("train_sft", now, tmp_path).name == "train_sft-20260102-030405-2"


def test_winding_back_moves_later_steps_aside_so_that_each_exists_once(tmp_path):
    run = RunDirectory.create(tmp_path, "train_ppo_ray", ARGV, VALUES)
    recorder = Recorder(run.metrics_path, [])
    for step in range(1, 6):
        recorder.write(StepRecord(step, {"x": float(step)}))
        run.rollouts.write(step, Split.TRAIN, [row()])
    run.rollouts.write(5, Split.EVAL, [row()])
    run.rollouts.write(6, Split.TRAIN, [row()])  # generated, but the step was never finished
    recorder.close()
    for step in (3, 7):
        write_held_out(tmp_path, step, [])
    assert run.truncate_after(3) == (4, 5, 6, 7)
    assert list(read_held_out(tmp_path)) == [3]
    assert [record.step for record in read_records(run.metrics_path)] == [1, 2, 3]
    assert run.rollouts.steps() == [1, 2, 3]
    aside = tmp_path / "discarded" / "001-after-step-000003"
    assert [record.step for record in read_records(aside / "metrics.jsonl")] == [4, 5]
    assert sorted(path.name for path in (aside / "rollouts").iterdir()) == [
        "eval_000005.parquet",
        "step_000004.parquet",
        "step_000005.parquet",
        "step_000006.parquet",
    ]
    assert list(read_held_out(aside)) == [7]
    assert run.truncate_after(3) == ()
    again = Recorder(run.metrics_path, [], last_step=3)
    again.write(StepRecord(4, {"x": 40.0}))
    again.close()
    assert [record.values["x"] for record in read_records(run.metrics_path)] == [1.0, 2.0, 3.0, 40.0]


def test_rollouts_come_back_equal(tmp_path):
    store = RunDirectory(tmp_path).rollouts
    train = [row(), row(1, text="")]
    streams = ("response_tokens", "response_mask", "rollout_logprobs", "trainer_logprobs", "advantages")
    train.append(row(2, **{stream: [] for stream in streams}, components={}))
    size = store.write(12, Split.TRAIN, train)
    size += store.write(12, Split.EVAL, [row()])
    evaluated = {**row(), "step": 12, "split": "eval"}
    assert store.read_step(12) == [*({**each, "step": 12, "split": "train"} for each in train), evaluated]
    assert store.nbytes == size
    assert [file.path.name for file in store.files()] == ["step_000012.parquet", "eval_000012.parquet"]
    assert pq.ParquetFile(store.files()[0].path).metadata.row_group(0).column(0).compression == "ZSTD"
    with pytest.raises(DataError, match="no rollouts of step 3; it has steps 12 to 12"):
        store.read_step(3)


def test_a_reward_that_does_not_exist_stays_nan(tmp_path):
    store = RunDirectory(tmp_path).rollouts
    store.write(1, Split.TRAIN, [row(reward=math.nan, outcome="error")])
    assert math.isnan(store.read_step(1)[0]["reward"])


def test_an_unwritable_rollout_folder_is_named(tmp_path):
    (tmp_path / "rollouts").write_text("a file")
    with pytest.raises(DataError, match="rollouts of step 1 cannot be written"):
        RunDirectory(tmp_path).rollouts.write(1, Split.TRAIN, [row()])
