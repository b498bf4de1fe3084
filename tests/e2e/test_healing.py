"""Whatever dies in a run, nothing is lost: engines are restarted in their place, the run from its checkpoint, by itself."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.rl_world import GRPO, HF, ROOT, command, metrics, model_bytes, train

pytestmark = pytest.mark.busy

# Every sample has its own seed, so what an engine computes does not depend on which engine it is or how often it is asked.
SEEDED = [*GRPO, *HF, "--full_determinism", "--num_episodes", "2", "--save_steps", "1", "--workers", "ray"]
# Long answers, so that a run is nearly always generating.
SEEDED += ["--generate_max_len", "160"]
STEPS = 6


def processes(run: subprocess.Popen[str], kind: str) -> list[psutil.Process]:
    """Those of a run whose command has ``kind`` in it."""
    children = psutil.Process(run.pid).children(recursive=True)
    return [child for child in children if kind in " ".join(child.cmdline())]


def disturbed(
    world: Path, folder: Path, disturb: Callable[[subprocess.Popen[str]], None], *flags: str
) -> tuple[int, str, str]:
    """Start a run, do something to it as soon as its second rollout is generated, and wait for its end."""
    output, errors = folder.with_suffix(".out"), folder.with_suffix(".err")
    words = command(world, folder, *SEEDED, *flags)
    with output.open("w") as out, errors.open("w") as err:
        run = subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=err, text=True)
        deadline = time.monotonic() + 300
        while not (folder / "rollouts" / "step_000001.parquet").exists():
            assert run.poll() is None, errors.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        children = psutil.Process(run.pid).children(recursive=True)
        disturb(run)
        run.wait(timeout=400)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, [child.cmdline() for child in alive]
    return run.returncode, output.read_text(), errors.read_text()


@pytest.fixture(scope="module")
def calm(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    run = tmp_path_factory.mktemp("calm") / "run"
    train(world, run, *SEEDED)
    return run


def is_like(run: Path, calm: Path) -> None:
    """Every step was trained once, and the weights are the same, bit for bit."""
    assert [record["step"] for record in metrics(run)] == list(range(1, STEPS + 1))
    for mine, other in zip(metrics(run), metrics(calm), strict=True):
        assert mine["values"]["reward/mean"] == other["values"]["reward/mean"]
    assert model_bytes(run / "model") == model_bytes(calm / "model")
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def kill_engine(run: subprocess.Popen[str]) -> None:
    time.sleep(0.3)
    processes(run, "EngineActor")[0].kill()


def stop_engine(run: subprocess.Popen[str]) -> None:
    time.sleep(0.3)
    processes(run, "EngineActor")[0].send_signal(signal.SIGSTOP)


@pytest.mark.parametrize(
    ("disturb", "flags"),
    [
        (kill_engine, ""),
        (kill_engine, "--vllm_num_engines 2"),
        # the group of the carrier is made anew
        (kill_engine, "--vllm_num_engines 2 --vllm_sync_backend gloo"),
        (stop_engine, "--engine_timeout 6"),
    ],
    ids=["killed", "killed of two", "killed of two over gloo", "hung"],
)
def test_an_engine_is_restarted_in_its_place_and_nothing_changes(
    world: Path, tmp_path: Path, calm: Path, disturb: Callable[[subprocess.Popen[str]], None], flags: str
) -> None:
    run = tmp_path / "run"
    code, output, errors = disturbed(world, run, disturb, *flags.split())
    assert code == 0, errors[-3000:]
    # It died with requests in it, which are generated again.
    said = re.findall(r"; engine [01], \d+ requests are repeated, is restarted \(1 of at most 3 restarts", output)
    assert len(said) == output.count("is restarted") == 1, output
    assert "Traceback" not in errors and "raylet" not in output + errors
    is_like(run, calm)
    assert metrics(run)[-1]["values"]["restarts/engines"] == 1
