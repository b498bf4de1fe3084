"""What happens on the way out never hides the first error, and a full disk is one sentence that names the file."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy

from tests.offline_world import ROOT, make_world
from tests.tiny import tiny_tokenizer
from togi.cli.main import main as run_command
from togi.data.report import DataReport, Lengths
from togi.data.row_log import RowLog, write_rows
from togi.errors import CheckpointError, RunError, WriteError
from togi.learn.checkpoint import Aim, Best, BestStore, CheckpointStore
from togi.model.checkpoint import written_aside
from togi.obs.metrics import StepRecord
from togi.obs.report import cause, end_run
from togi.obs.run_dir import HeldOutRow, RunDirectory, State, write_held_out
from togi.obs.sinks import Recorder
from togi.obs.way_out import disk_reason, tolerated, way_out, writing

TOO_LARGE = "(File too large): raise the limit on the size of files (ulimit -f)"
LONG = "x" * 200_000
TENSORS = {"a": np.zeros(50_000)}
REPORT = DataReport("Rows", (), Lengths(0, 0, 0, 0, 0), (LONG,), ())


@contextmanager
def small_files(size: int = 100_000) -> Iterator[None]:
    """No file of this process may be larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def model(folder: Path) -> None:
    with written_aside(folder / "f") as aside:
        safetensors.numpy.save_file(TENSORS, aside / "model.safetensors")


def tokenizer(folder: Path) -> None:
    with small_files(100), written_aside(folder / "f") as aside:
        tiny_tokenizer().save_pretrained(aside)


def metrics(folder: Path) -> None:
    Recorder(folder / "f", []).write(StepRecord(1, {LONG: 1.0}, {}))


def rows(folder: Path) -> None:
    with RowLog(folder / "f", {"a": "b"}) as log:
        log.add(0, [{"text": LONG}])


WRITERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "model": (model, "f"),
    "tokenizer": (tokenizer, "f"),
    "metrics": (metrics, "f"),
    "data report": (lambda folder: REPORT.write(folder / "f"), "f.json"),
    "held-out rows": (
        lambda folder: write_held_out(folder, 3, [HeldOutRow("best", "nats", (LONG,), (1.0,))]),
        "held_out/step_00000003.json",
    ),
    "rows": (lambda folder: write_rows(folder / "f", [{"text": LONG}]), "f"),
    "log of rows": (rows, "f.partial"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    write, file = WRITERS[name]
    with small_files(), pytest.raises(WriteError) as caught:
        write(tmp_path)
    assert str(caught.value) == f"{tmp_path}/{file} cannot be written {TOO_LARGE}."
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*unfinished*"))


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(tmp_path: Path) -> None:
    store, best = CheckpointStore(tmp_path), BestStore(tmp_path)
    with store.write(1, {}, 0) as folder:
        safetensors.numpy.save_file(TENSORS, folder / "a.safetensors")
    with best.write(Best(Aim("eval/loss", False), 2.0, 1)) as folder:
        safetensors.numpy.save_file(TENSORS, folder / "a.safetensors")
    before = sorted(tmp_path.rglob("*"))
    for where, write, what in (
        (tmp_path, store.write(2, {}, 0), "The checkpoint of step 2"),
        (best.folder, best.write(Best(Aim("eval/loss", False), 1.0, 2)), "The best model"),
    ):
        with small_files(), pytest.raises(CheckpointError) as caught, write as folder:
            safetensors.numpy.save_file(TENSORS, folder / "a.safetensors")
        assert (
            str(caught.value) == f"{what} cannot be written to {where} {TOO_LARGE}, and go on with --load_checkpoint."
        )
    assert sorted(tmp_path.rglob("*")) == before
    found = store.latest()
    assert found is not None and found.step == 1


def test_reasons_are_those_of_disks_only(tmp_path: Path) -> None:
    assert disk_reason(OSError(errno.ENOSPC, "whatever")) == "No space left on device"
    assert disk_reason(Exception("I/O error: No space left on device (os error 28)")) == "No space left on device"
    table = pyarrow.table({"a": np.random.default_rng(0).random(50_000)})
    with small_files(), pytest.raises(OSError) as caught:
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert disk_reason(caught.value) == "File too large"
    others = (
        FileNotFoundError(errno.ENOENT, "no file"),
        ValueError("x"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
    )
    assert [disk_reason(error) for error in others] == ["", "", ""]
    for error in (ValueError("x"), ConnectionResetError(errno.ECONNRESET, "reset"), TimeoutError()):
        with pytest.raises(type(error)), writing(tmp_path):
            raise error
    with (
        pytest.raises(WriteError, match=r"^/x cannot be written \(no file\): check the folder and its permissions\.$"),
        writing(Path("/x")),
    ):
        raise others[0]


def test_any_command_says_in_one_sentence_that_a_disk_is_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: list[str]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x")

    monkeypatch.setattr("togi.cli.commands.report", main)
    assert run_command(["report"]) == 1
    assert capsys.readouterr().err == (
        "togi: the run failed: a file cannot be written ([Errno 28] No space left on device: '/data/x'): make room there.\n"
    )


@pytest.mark.parametrize("first", [KeyError("first"), KeyboardInterrupt(), SystemExit(3)])
def test_the_first_error_stays_the_first(first: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(type(first)) as caught:
        try:
            raise first
        finally:
            with way_out("closing the door"):
                raise OSError("it\njams")
    assert caught.value is first
    assert [record.getMessage() for record in caplog.records] == ["closing the door failed as well (it jams)"]


def test_without_an_error_before_the_last_one_counts(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OSError, match="it jams"), way_out("closing the door"):
        raise OSError("it jams")
    assert caplog.records == []


def test_what_a_run_can_do_without_never_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    for error in (OSError("no room"), ValueError("no JSON"), KeyError("place")):
        with tolerated("writing the report page"):
            raise error
    assert [record.getMessage() for record in caplog.records] == [
        f"writing the report page failed, and the run goes on without it ({why})"
        for why in ("no room", "no JSON", "'place'")
    ]


TERMINATED = """
import os, signal, time
from togi.obs.report import cause
from togi.run.journal import leaving_in_order

try:
    with leaving_in_order():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
except SystemExit as ended:
    print(ended.code, cause(ended), signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""


def test_sigterm_ends_a_run_as_an_exception_does() -> None:
    words = [sys.executable, "-c", TERMINATED]  # not the process of the tests: it would end if this failed
    done = subprocess.run(words, cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "143 terminated True\n"), done.stderr


def test_a_run_ends_in_its_folder_as_far_as_that_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything is tried though each fails, and only the first error comes out."""
    directory = RunDirectory.create(tmp_path / "run", "sft", [], {})

    def close() -> None:
        raise RuntimeError("no tracker")

    def interrupted(message: str) -> None:
        try:
            raise KeyboardInterrupt
        except BaseException:
            end_run(directory, State.FAILED, message, close)
            raise

    with small_files(), pytest.raises(KeyboardInterrupt):
        interrupted("stopped")
    assert [record.getMessage() for record in caplog.records] == [
        "closing the run's files and trackers failed as well (no tracker)",
        f"writing the report page failed as well ({directory.report_path} cannot be written {TOO_LARGE}.)",
    ]
    assert (directory.read_status().state, directory.read_status().message) == (State.FAILED, "stopped")
    caplog.clear()
    with small_files(100), pytest.raises(KeyboardInterrupt):
        interrupted(LONG)
    assert len(caplog.records) == 3 and directory.read_status().message == "stopped"


def test_why_a_run_ended_in_words() -> None:
    assert [cause(error) for error in (KeyboardInterrupt(), CancelledError(), KeyError(), RunError("why"))] == [
        "interrupted",
        "interrupted",
        "KeyError",
        "why",
    ]


def test_a_run_that_may_not_write_its_report(tmp_path: Path) -> None:
    """As users start it: no training is lost for a page. It is said, and nothing half-written is left."""
    world = make_world(tmp_path)
    words = f"""-m togi sft --pretrain {world}/model --dataset {world}/sft.jsonl --input_key q --output_key a --max_len 96
        --train_batch_size 4 --run_dir {tmp_path}/run --save_path {tmp_path}/run/model --ckpt_path {tmp_path}/run/c"""
    done = subprocess.run(
        ["bash", "-c", 'ulimit -Sf 900 && exec "$@"', "bash", sys.executable, *words.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    report = tmp_path / "run" / "report.html"
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    said = f"writing the report page failed, and the run goes on without it ({report} cannot be written {TOO_LARGE}.)"
    assert said in done.stderr.splitlines()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["message"]) == ("finished", "")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert not list((tmp_path / "run").glob(".*"))
