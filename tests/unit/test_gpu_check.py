"""The check of a machine with a GPU: its arithmetic on the CPU with toy sizes, and how parts pass, fail, skip and end in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch

import gpu_check
from gpu import attention, learners, machine, runs, steps, tools, transfers
from gpu.tools import Bounds, Skip
from gpu_check import FAIL, PARTS, PASS, SKIP, Part, Result, judged, outcome_of, plain, run_all, run_within, table
from tests.flash_stand_in import flash_on_cpu
from togi.algo import partial_attention

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]

# ---- the arithmetic


def test_flash_against_dense_with_the_stand_in() -> None:
    with flash_on_cpu() as calls:
        found = dict(attention.flash(CPU, True))
    assert found["cases"] == 18, "three packs, two head sizes, three windows"
    assert found["shape of the log-sum-exp"] == "heads, tokens"
    assert 0 < found["largest error"] <= attention.ROUNDING
    assert {way for way, *_ in calls} == {"forward", "backward"}


def test_a_wrong_kernel_is_found() -> None:
    """A log-sum-exp that is off by 0.3, as of a kernel with another scale: every case with a backward or a join says so."""
    attend = partial_attention.Pieces.attend

    def wrong(self, *given):
        out, lse = attend(self, *given)
        return out, lse + 0.3

    with (
        flash_on_cpu(),
        patch.object(partial_attention.Pieces, "attend", wrong),
        pytest.raises(AssertionError, match=r"plain pack, heads \(4, 2\), D 16, window None: dq 0\.\d+ > 0\.02"),
    ):
        list(attention.flash(CPU, True))


def test_speed_and_ring_with_the_stand_in() -> None:
    with flash_on_cpu():
        speed, ring = dict(attention.attention_speed(CPU, True)), dict(attention.ring(CPU, True))
    assert speed["tokens"] == 40 and speed["largest difference"] < 2 * attention.ROUNDING
    assert ring["flash, its own keys: error"] < attention.ROUNDING
    assert min(value for name, value in (speed | ring).items() if name.endswith("ms")) > 0


@pytest.mark.parametrize("part", [attention.flash, attention.attention_speed, attention.ring])
def test_parts_of_flash_skip_where_there_is_none(part) -> None:
    with pytest.raises(Skip, match="FlashAttention does not compute"):
        list(part(CPU, True))


def test_head_against_float64() -> None:
    found = dict(steps.head(CPU, True))
    assert 0 < found["error of log-probs"] < steps.LOGIT_ERROR
    assert 0 < found["error of d weight"] < steps.GRADIENT_ERROR


def test_steps_of_the_toy_model() -> None:
    found = dict(steps.step(CPU, True))
    # a random model of 256 words: all variants begin at the same loss, near log 256 = 5.545
    losses = [value for name, value in found.items() if name.endswith("loss")]
    assert len(losses) == 3 and losses == pytest.approx([5.55] * 3, abs=0.1)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)


def test_operations_by_hand() -> None:
    """One prompt of 4 with responses of 2 and 3: 9 tokens, 5 of them in the loss; 8 + (8 + 2) + (12 + 4.5) = 34.5 pairs."""
    config = steps._config(True)
    a_layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    expected = 6 * (2 * a_layer * 9 + 256 * 64 * 5) + 12 * 2 * 64 * 34.5
    assert steps._operations(config, [(4, [2, 3])]) == expected


def test_learners_equal_the_cpu() -> None:
    found = dict(learners.learners(CPU, True))
    # the same operations on the same device, so hardly a bit differs
    assert set(map(type, found.values())) == {float} and max(found.values()) < 0.01
    torch.distributed.destroy_process_group()


def test_sleep_and_determinism() -> None:
    slept = dict(learners.sleep(CPU, True))
    assert slept["parked MB"] == 9 and slept["error with weights in host memory"] == 0
    with patch("togi.parallel.process.be_deterministic"):  # it would hold for the tests that follow
        assert dict(learners.determinism(CPU, True)) == {"largest difference": 0}


def test_engine_against_the_scorer() -> None:
    found = dict(runs.engine(CPU, True))
    assert found["float32: largest difference"] < 1e-4 < found["bfloat16: largest difference"] < runs.BOUNDS["bfloat16"]


def test_checksums_and_the_device_without_a_gpu() -> None:
    found = dict(machine.devices(CPU, True))
    assert found["with no GPU visible"] == "cpu" and found["checksums"] == "equal"


def test_modules_are_imported() -> None:
    found = dict(machine.versions(CPU, True))
    assert found["modules"] >= 20 and found["packages that are not here"] == "none"


def test_a_module_that_breaks_is_named() -> None:
    def broken(name: str) -> None:
        if name == "togi.model.heads":
            raise ImportError("cannot import name 'gone' from 'transformers'")
        if name == "togi.model.layers":
            raise ModuleNotFoundError("No module named 'absent'", name="absent.inner")

    found = machine.versions(CPU, True)
    with patch("importlib.import_module", broken):
        assert dict([next(found), next(found)])["packages that are not here"] == "absent"
        with pytest.raises(AssertionError, match=r"1 modules .*togi.model.heads \(cannot import name 'gone'"):
            next(found)


def test_buckets_reach_a_second_process() -> None:
    """The whole exchange, over shared memory of the host: only the figures of the GPU are missing."""
    with patch.object(transfers, "need_cuda"), patch("torch.accelerator.synchronize"):
        found = dict(transfers.ipc(CPU, True))
    assert found["ms a GB"] > 0 and found["through host memory: ms a GB"] > 0


def test_syncs_are_counted_by_their_place() -> None:
    def call() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    with patch("torch.cuda.set_sync_debug_mode") as mode:
        found = dict(steps._syncs(call, "flash"))
    assert found["flash: host syncs"] == 3 and found["flash: syncs at"].startswith("test_gpu_check.py:")
    assert [given.args[0] for given in mode.call_args_list] == ["warn", "default"]


def test_bounds_name_all_that_is_wrong() -> None:
    bounds = Bounds()
    bounds.hold("good", 0.1, 0.2)
    bounds.hold("far", 0.3, 0.2)
    bounds.hold("lost", float("nan"), 0.2)
    bounds.fail("broken", RuntimeError("no kernel\nmore"))
    with pytest.raises(AssertionError, match=r"3 wrong: far 0.3 > 0.2; lost nan > 0.2; broken raised RuntimeError: no"):
        bounds.check()
    assert tools.error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, -2.0])) == 2.25


# ---- the runner

FAKE = """
from gpu.tools import Skip

def good(device, small):
    yield "figure", 0.5
    yield "device", f"{device} {small}"

def bad(device, small):
    yield "before", 1
    raise ValueError("first line\\nlast line")

def absent(device, small):
    yield "before", 1
    import no_such_package

def skips(device, small):
    raise Skip("needs a bigger machine")
    yield

def dies(device, small):
    yield "before", 1
    import os
    os._exit(7)
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fakes.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "log.txt"


def test_a_part_passes_fails_or_skips(fakes: Path) -> None:
    parts = {name: Part(f"fakes:{name}", 60) for name in ("good", "bad", "absent", "skips", "dies")}
    found = dict(run_all(parts, fakes, "cpu", small=True))
    assert {name: (result.outcome, result.reason) for name, result in found.items()} == {
        "good": (PASS, ""),
        "bad": (FAIL, "ValueError: last line"),
        "absent": (SKIP, "needs the package no_such_package"),
        "skips": (SKIP, "needs a bigger machine"),
        "dies": (FAIL, "its process ended with status 7; see the log"),
    }
    assert found["good"].figures == {"figure": 0.5, "device": "cpu True"}
    assert found["bad"].figures == found["dies"].figures == {"before": 1}, "what was found before the end is kept"
    log = fakes.read_text()
    assert "==== good" in log and "last line" in log and "Skip" not in log


def test_a_part_is_killed_at_its_limit_with_what_it_started(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    log = tmp_path / "log.txt"
    with log.open("w") as sink:
        assert run_within([sys.executable, "-c", script], 3, os.environ, sink) is None
    child, deadline = int(log.read_text()), time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child of the part is alive"
        time.sleep(0.1)
    result = judged(tmp_path / "nothing", None, 3, 3.1)
    assert (result.outcome, result.reason) == (FAIL, "took more than 3 s; see the log")


def test_what_there_is_no_time_for_is_skipped(fakes: Path) -> None:
    found = dict(run_all({"good": Part("fakes:good", 60)}, fakes, "cpu", small=True, total=1.0))
    assert (found["good"].outcome, found["good"].reason) == (SKIP, "no time is left: run it with --only good")


def test_results_and_the_table() -> None:
    found = {
        "one": Result(PASS, 1.0, "", {"ms": 2.5}),
        "another": Result(FAIL, 12.5, "ValueError: wrong", {"ms": float("nan")}),
    }
    assert table(found).splitlines() == [
        "one      PASS     1.0 s",
        "another  FAIL    12.5 s  ValueError: wrong",
        "1 PASS, 1 FAIL, 0 SKIP",
    ]
    assert gpu_check.line("one", found["one"]) == "PASS one (1 s) ms 2.5"
    assert plain({"a": {"b": float("inf"), "c": 1.5}}) == {"a": {"b": "inf", "c": 1.5}}


def test_a_crash_after_passing_is_told(tmp_path: Path) -> None:
    file = tmp_path / "figures"
    file.write_text(json.dumps(["ms", 1.0]) + "\n" + json.dumps([PASS, "", True]) + "\n")
    assert judged(file, 0, 10, 1) == Result(PASS, 1, "", {"ms": 1.0})
    assert judged(file, -6, 10, 1).reason == "but its process ended with status -6: see the log"
    assert judged(file, None, 10, 1).reason == "but its process hung at its end: see the log"


def test_a_module_of_togi_that_is_missing_is_a_failure() -> None:
    problem = ModuleNotFoundError("No module named 'togi.gone'", name="togi.gone")
    assert outcome_of(problem) == (FAIL, "ModuleNotFoundError: No module named 'togi.gone'")


def test_every_part_exists() -> None:
    import importlib

    for part in PARTS.values():
        module, _, name = part.function.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_the_script_runs(tmp_path: Path) -> None:
    """A few parts as on a GPU machine, one of which needs a GPU: figures, versions and the log are beside each other."""
    words = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--small", "--out", tmp_path]
    done = subprocess.run([*words, "--only", "head", "ipc"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "results.json").read_text())
    assert {name: part["outcome"] for name, part in record["parts"].items()} == {
        "head": PASS,
        "ipc": SKIP,
    }
    assert record["versions"]["torch"] == torch.__version__
    assert record["parts"]["head"]["figures"]["error of log-probs"] < steps.LOGIT_ERROR
    assert "PASS head" in done.stdout and done.stdout.splitlines()[-1] == "1 PASS, 0 FAIL, 1 SKIP"
    assert "==== head" in (tmp_path / "log.txt").read_text()
    # with a GPU asked for, the first part says that there is none
    words[words.index("cpu")] = "cuda"
    done = subprocess.run([*words, "--only", "versions"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "torch finds no usable GPU" in done.stdout
