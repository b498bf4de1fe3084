"""Whatever dies in a run, nothing is lost: engines are restarted in their place, the run from its checkpoint, by itself."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForSequenceClassification

from tests.rl_world import GRPO, HF, ROOT, command, metrics, model_bytes, train
from tests.tiny import tiny_config, tiny_tokenizer

pytestmark = pytest.mark.busy

# Every sample has its own seed, so what an engine computes does not depend on which engine it is or how often it is asked.
SEEDED = [*GRPO, *HF, "--full_determinism", "--num_episodes", "2", "--save_steps", "1", "--workers", "ray"]
# Long answers, so that a run is nearly always generating.
SEEDED += ["--generate_max_len", "220"]
STEPS = 6


def processes(run: subprocess.Popen[str], kind: str) -> list[psutil.Process]:
    """Those of a run whose command has ``kind`` in it."""
    found = []
    for child in psutil.Process(run.pid).children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if kind in " ".join(child.cmdline()):
                found.append(child)
    return found


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
        pytest.param(kill_engine, "--vllm_num_engines 2", marks=pytest.mark.large),
        # the group of the carrier is made anew
        pytest.param(kill_engine, "--vllm_num_engines 2 --vllm_sync_backend gloo", marks=pytest.mark.large),
        pytest.param(stop_engine, "--engine_timeout 6", marks=pytest.mark.large),
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
    said = re.findall(r"; engine [01](?:, \d+ requests are repeated,)? is restarted \(1 of at most 3 restarts", output)
    assert len(said) == output.count("is restarted") == 1, output
    assert "Traceback" not in errors and "raylet" not in output + errors
    is_like(run, calm)
    assert metrics(run)[-1]["values"]["restarts/engines"] == 1


@pytest.mark.large
def test_an_engine_of_vllm_is_restarted(world: Path, tmp_path: Path) -> None:
    run, flags = tmp_path / "run", "--rollout_engine vllm --vllm_num_engines 2 --vllm_cpu_kv_cache_gb 0.1"
    code, output, errors = disturbed(world, run, kill_engine, *flags.split())
    assert code == 0, errors[-3000:]
    assert output.count("is restarted (1 of at most 3 restarts)") == 1
    assert [record["step"] for record in metrics(run)] == list(range(1, STEPS + 1))
    assert all(record["values"]["mismatch/probe_mean_abs"] < 1e-4 for record in metrics(run))


def learner(run: subprocess.Popen[str]) -> psutil.Process:
    return processes(run, "LearnerActor")[0]


def killing_after_a_checkpoint(run: Path) -> Callable[[subprocess.Popen[str]], None]:
    def kill(started: subprocess.Popen[str]) -> None:
        while not list((run / "checkpoints").glob("step_*")):
            time.sleep(0.05)
        learner(started).kill()

    return kill


@pytest.mark.large
def test_a_killed_learner_sends_the_run_back_to_its_checkpoint(world: Path, tmp_path: Path, calm: Path) -> None:
    run = tmp_path / "run"
    code, output, errors = disturbed(world, run, killing_after_a_checkpoint(run))
    assert code == 0, errors[-3000:]
    (said,) = re.findall(
        r"actor 0 died \(process \d+\).*; (the run.*) is restarted \((\d of at most 3) restarts\)", output
    )
    assert re.fullmatch(r"the run(, from its checkpoint of step \d,)?", said[0]) and said[1] == "1 of at most 3"
    assert "Traceback" not in errors and "raylet" not in output + errors
    is_like(run, calm)
    assert metrics(run)[-1]["values"]["restarts/run"] == 1
    assert not (run / "failure.md").exists()


@pytest.mark.large
def test_whichever_model_worker_is_killed_the_run_goes_on_from_its_checkpoint(world: Path, tmp_path: Path) -> None:
    """Actor, critic, reference and reward model in turn, in one run; the weights are those of a run that nothing disturbs."""
    judge = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1, initializer_range=0.1))
    judge.save_pretrained(tmp_path / "rm")
    tiny_tokenizer().save_pretrained(tmp_path / "rm")
    flags = ["--advantage_estimator", "gae", "--init_kl_coef", "0.01", "--reward_pretrain", str(tmp_path / "rm")]
    train(world, calm := tmp_path / "calm", *SEEDED, *flags)
    run = tmp_path / "run"

    def kill_each(started: subprocess.Popen[str]) -> None:
        for number in range(4):
            deadline = time.monotonic() + 120
            # The workers of this life are there, and it has written a checkpoint that the one before had not.
            while len(models := processes(started, "LearnerActor") + processes(started, "ScorerActor")) < 4 or not list(
                (run / "checkpoints").glob(f"step_{number + 1:08d}")
            ):
                assert started.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            sorted(models, key=psutil.Process.create_time)[number].kill()
            time.sleep(1)

    code, output, errors = disturbed(world, run, kill_each, *flags, "--max_restarts", "4")
    assert code == 0, errors[-3000:]
    assert set(re.findall(r"(\w+ 0) died \(process", output)) == {"actor 0", "critic 0", "ref 0", "reward 0"}
    is_like(run, calm)
    assert metrics(run)[-1]["values"]["restarts/run"] == 4


@pytest.mark.large
def test_after_too_many_restarts_a_page_says_how_to_go_on(world: Path, tmp_path: Path, calm: Path) -> None:
    """Who died, when, where, its last lines; the command in it goes on, and ends with the weights of a calm run."""
    run = tmp_path / "run"
    code, _, errors = disturbed(world, run, killing_after_a_checkpoint(run), "--max_restarts", "0")
    assert code == 1
    assert "togi: the run failed: actor 0 died (process" in errors and "Traceback" not in errors
    assert len(errors.splitlines()) < 40, "no screen of Ray's own"
    page = (run / "failure.md").read_text()
    assert re.search(r"^actor 0 died \(process \d+\)", page, re.MULTILINE)
    assert re.search(r"^When: 20\d\d-.* in step \d of 6", page, re.MULTILINE)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and "actor 0 died" in status["message"]
    assert "goes on from its checkpoint of step" in (run / "report.html").read_text()
    (resume,) = re.findall(r"The run goes on from its checkpoint of step \d by: (.*)", page)
    done = subprocess.run(
        ["/bin/bash", "-c", f'togi() {{ "{sys.executable}" -m togi "$@"; }}; {resume}'],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    is_like(run, calm)
    assert not (run / "failure.md").exists()


@pytest.mark.large
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_run_that_is_told_to_stop_leaves_its_last_step(
    world: Path, tmp_path: Path, calm: Path, number: signal.Signals
) -> None:
    """Checkpoints are due only every 100 steps; the one of the last finished step is written, and the command goes on."""
    run = tmp_path / "run"

    def tell(started: subprocess.Popen[str]) -> None:
        while not (run / "metrics.jsonl").read_text().count("\n"):
            time.sleep(0.02)
        time.sleep(0.1)
        started.send_signal(number)

    code, output, errors = disturbed(world, run, tell, "--save_steps", "100")
    assert code == (143 if number is signal.SIGTERM else 130), errors[-3000:]
    assert "Traceback" not in errors
    (step,) = re.findall(r"a checkpoint of step (\d) is written", output)
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == [f"step_{int(step):08d}"]
    assert f"The run goes on from its checkpoint of step {step} by: " in errors
    train(world, run, *SEEDED, "--load_checkpoint")
    is_like(run, calm)


@pytest.mark.large
def test_a_stalled_run_shows_every_stack_and_ends(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped = list[psutil.Process]()

    def stop(started: subprocess.Popen[str]) -> None:
        stopped.append(learner(started))
        stopped[0].send_signal(signal.SIGSTOP)

    code, _, errors = disturbed(world, run, stop, "--stall_timeout", "10")
    assert code == 1, errors[-3000:]
    assert re.search(r"togi: the run failed: The run has stalled: actor 0 has not answered \w+ for 1\d s", errors)
    waiting = (run / "stacks" / "waiting.txt").read_text()
    assert "actor 0 has not answered" in waiting
    assert "engine" in (run / "stacks" / "engine0.txt").read_text()
    assert (
        "RLRun" in (run / "stacks" / "driver.txt").read_text()
        or "train(" in (run / "stacks" / "driver.txt").read_text()
    )
    assert "actor 0 has not answered" in (run / "failure.md").read_text()
