"""The local file is the truth; trackers are best effort: they may fail, hang or leak nothing."""

import importlib.util
import logging
import math
import subprocess
import sys
import threading
import time

import pytest

from togi.errors import ConfigError
from togi.obs import sinks
from togi.obs.metrics import StepRecord, read_records
from togi.obs.sinks import Background, JsonlSink, Recorder, TrackerOptions, check_trackers, open_trackers

KEY = "0123456789abcdef0123456789abcdef01234567"


class ListSink:
    def __init__(self):
        self.steps = []
        self.closed = False

    def write(self, record):
        self.steps.append(record.step)

    def close(self):
        self.closed = True


class FailingSink(ListSink):
    def write(self, record):
        raise RuntimeError(f"quota exceeded for {KEY}")


def test_half_a_line_left_by_a_dead_process_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(StepRecord(1, {"a": 1.0}).to_json() + '\n{"step": 2')
    sink = JsonlSink(path)
    sink.write(StepRecord(2, {"a": 2.0}))
    sink.close()
    assert [record.values["a"] for record in read_records(path)] == [1.0, 2.0]


def test_a_step_is_on_disk_before_anything_is_closed_and_steps_only_go_up(tmp_path):
    recorder = Recorder(tmp_path / "m.jsonl", [])
    recorder.write(StepRecord(1, {"a": math.nan}))
    assert [record.step for record in read_records(tmp_path / "m.jsonl")] == [1]
    assert read_records(tmp_path / "m.jsonl")[0].time > 0
    with pytest.raises(AssertionError, match="step 1 logged after step 1"):
        recorder.write(StepRecord(1, {}))
    recorder.close()


def test_a_failing_tracker_gives_one_warning_without_the_key_and_is_dropped(tmp_path, caplog):
    tracker = Background("W&B", FailingSink, secrets=(KEY,))
    recorder = Recorder(tmp_path / "m.jsonl", [tracker])
    with caplog.at_level(logging.WARNING):
        for step in range(1, 4):
            recorder.write(StepRecord(step, {"a": 1.0}))
            time.sleep(0.01)
        recorder.close()
    assert [record.step for record in read_records(tmp_path / "m.jsonl")] == [1, 2, 3]
    assert len(caplog.records) == 1
    assert "W&B is off for the rest of this run (RuntimeError: quota exceeded for <redacted>)" in caplog.text
    assert KEY not in caplog.text


def test_a_hanging_tracker_does_not_hold_up_the_run(caplog):
    release, abandoned = threading.Event(), []

    def connect():
        release.wait(10)
        return ListSink()

    tracker = Background("W&B", connect, abandon=lambda: abandoned.append(True), patience=0.05)
    started = time.monotonic()
    for step in range(1, 1500):  # more than its queue holds
        tracker.write(StepRecord(step, {}))
    tracker.close()
    assert time.monotonic() - started < 1.0
    assert abandoned == [True]
    assert len(caplog.records) == 1
    release.set()


def test_logging_steps_thins_out_but_evaluations_always_pass():
    sink = ListSink()
    tracker = Background("x", lambda: sink, every=5)
    for step in range(1, 12):
        tracker.write(StepRecord(step, {"eval/reward": 1.0} if step == 7 else {"loss": 1.0}))
    tracker.close()
    assert (sink.steps, sink.closed) == ([5, 7, 10], True)


def test_a_missing_package_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--use_wandb needs the package wandb.*pip install wandb"):
        check_trackers(TrackerOptions(use_wandb="true"))
    with pytest.raises(ConfigError, match="--use_tensorboard needs the package tensorboard"):
        check_trackers(TrackerOptions(use_tensorboard="logs"))
    check_trackers(TrackerOptions())


def test_tensorboard_reads_back_what_was_written(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    options = TrackerOptions(use_tensorboard=str(tmp_path / "tb"), wandb_run_name="r")
    recorder = Recorder(tmp_path / "m.jsonl", open_trackers(options, "id", tmp_path / "run", {}))
    recorder.write(StepRecord(1, {"reward/mean": 0.25}, {"train": 2.0}))
    recorder.write(StepRecord(2, {"reward/mean": 0.5, "eval/reward": 0.75}))
    recorder.close()
    (file,) = (tmp_path / "tb" / "r").iterdir()
    seen = {
        (event.step, value.tag): value.simple_value or value.tensor.float_val[0]
        for event in loader.EventFileLoader(str(file)).Load()
        for value in event.summary.value
    }
    assert seen == {
        (1, "train/reward/mean"): 0.25,
        (1, "train/time/train"): 2.0,
        (2, "train/reward/mean"): 0.5,
        (2, "eval/reward"): 0.75,
    }


def test_wandb_offline_keeps_the_values_and_nothing_of_the_key(tmp_path, caplog, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", ["togi", "--use_wandb", KEY])
    config = {"use_wandb": KEY, "learning_rate": 0.125}
    trackers = open_trackers(TrackerOptions(use_wandb=KEY, wandb_run_name="named"), "runid1", tmp_path, config)
    trackers[0]._patience = 60.0  # a cold start on a busy machine
    recorder = Recorder(tmp_path / "m.jsonl", trackers)
    recorder.write(StepRecord(1, {"reward/mean": 0.5, "eval/reward": 1.0}))
    recorder.close()
    assert caplog.text == ""
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not [path for path, content in written.items() if KEY.encode() in content]
    (stored,) = [content for path, content in written.items() if path.name == "run-runid1.wandb"]
    for expected in (b"train/global_step", b"reward/mean", b"eval/reward", b"learning_rate", b"named"):
        assert expected in stored


def test_nothing_but_the_process_of_wandb_imports_trackers():
    code = "import sys, togi.obs.sinks, togi.obs.names; print(sorted({'wandb', 'tensorboard', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert sinks.tracker_names(StepRecord(1, {"eval/x": 1.0, "loss": 2.0}, {"g": 3.0})) == {
        "eval/x": 1.0,
        "train/loss": 2.0,
        "train/time/g": 3.0,
    }
