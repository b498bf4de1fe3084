"""The command line's outside: help, version, suggestions, exit statuses, and the small commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import togi
from togi.cli.main import COMMANDS, main
from togi.obs import names
from togi.obs.metrics import StepRecord
from togi.obs.run_dir import Resolved, RunDirectory
from togi.obs.sinks import Recorder

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_names_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"togi {togi.__version__}: Togi (研ぎ")
    for name, text in COMMANDS.items():
        assert f"  {name} " in out and text in out


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"togi {togi.__version__}\n"


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("reprot", "togi: unknown command reprot; did you mean report?\n"),
        (
            "xyz",
            f"togi: unknown command xyz. Commands: {', '.join(COMMANDS)}.\n",
        ),
        (
            "--pretrain",
            f"togi: unknown command --pretrain. Commands: {', '.join(COMMANDS)}.\n",
        ),
    ],
)
def test_unknown_command(word: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    assert capsys.readouterr() == ("", sentence)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: togi {command} ")


def test_ctrl_c_is_status_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("togi.cli.commands.report", interrupted)
    assert main(["report"]) == 130
    assert capsys.readouterr().err == "togi: interrupted\n"


@pytest.mark.parametrize("argv", [["--help"], ["--version"]])
def test_a_closed_pipe_is_status_141(argv: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "togi", *argv], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_broken_pipe_is_no_quiet_end(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(argv: list[str]) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("togi.cli.commands.report", broken)
    with capfd.disabled(), pytest.raises(BrokenPipeError):
        main(["report"])


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(argv: list[str]) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("togi.cli.commands.report", broken)
    with pytest.raises(RuntimeError, match="ours"):
        main(["report"])


def test_the_established_module_name_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "togi.cli.train_ppo_ray", "--help"], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.startswith("usage: togi rl ")
    wrong = subprocess.run(
        [sys.executable, "-m", "togi.cli.train_ppo_ray", "--pretrian", "x"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (wrong.returncode, wrong.stderr) == (2, "togi: Unknown flag --pretrian; did you mean --pretrain?\n")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["chat"], "--pretrain is required: the folder or hub name of the model to talk to."),
        (
            ["chat", "--pretrain", "./none"],
            "--pretrain ./none is not a folder: give a Hugging Face model folder or a hub name.",
        ),
        (["chat", "--temprature", "1"], "Unknown flag --temprature; did you mean --temperature?"),
        (["report"], "--run_dir is required: the folder of a run, such as runs/rl-20260101-120000."),
        (["report", "--run_dir", "none"], "none is not the folder of a run: it has no run.json."),
    ],
)
def test_mistakes_of_the_small_commands(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert capsys.readouterr() == ("", f"togi: {sentence}\n")


def test_report_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory.create(tmp_path / "run", "rl", ["--seed", "7"], {"seed": Resolved(7, "command line")})
    recorder = Recorder(run.metrics_path, [])
    recorder.write(StepRecord(1, {names.REWARD_MEAN: 0.8125}, {"generate": 2.0}))
    recorder.close()
    assert main(["report", "--run_dir", str(run.root)]) == 0
    assert capsys.readouterr().out == f"{run.report_path}\n"
    assert "0.8125" in run.report_path.read_text(encoding="utf-8")


def test_the_command_table_imports_no_command() -> None:
    names = "'togi.cli.commands', 'togi.run', 'torch'"
    code = f"import sys, togi.cli.main; print([m for m in ({names}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"
