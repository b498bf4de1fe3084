"""Asynchronous RL end to end under Ray: every prompt once, whatever dies and when, and a run that its own record repeats."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.rl_world import GRPO, HF, ROOT, command, metrics, model_bytes, train
from togi.pump.ledger import Event, balance, read

pytestmark = pytest.mark.busy

EPISODES, PROMPTS, STALENESS = 6, 10, 2
FILTER = "--dynamic_filtering --dynamic_filtering_reward_range 0.36 0.9"
LOOP = f"--max_staleness {STALENESS} --num_episodes {EPISODES} --generate_max_len 40 --vllm_num_engines 2"
ASYNC = [*GRPO, *HF, *LOOP.split(), *FILTER.split(), "--save_steps", "2", "--temperature", "0.9"]


@pytest.fixture(scope="module")
def original(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("original") / "run"
    train(world, run, *ASYNC)
    return run


def rows_of(run: Path) -> list[dict[str, object]]:
    files = sorted((run / "rollouts").glob("step_*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def check_every_prompt_once(run: Path) -> None:
    """The ledger says so, and the stored rollouts, which are what was trained."""
    states = balance(read(run / "ledger.jsonl"))
    assert set(states) == set(range(EPISODES * PROMPTS))
    assert set(states.values()) <= {Event.TRAINED, Event.FILTERED}
    stored = rows_of(run)
    groups = {(row["step"], row["group_id"]): row for row in stored}
    assert len(stored) == 4 * len(groups)
    assert Counter(row["prompt_id"] for row in groups.values()) == {f"0:{i}": EPISODES for i in range(PROMPTS)}
    filtered = sum(row["filtered"] for row in groups.values())
    assert filtered == Counter(states.values())[Event.FILTERED]


def test_prompts_tokens_and_ages_add_up(original: Path) -> None:
    check_every_prompt_once(original)
    records = metrics(original)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    by_step: dict[int, list[int]] = {}
    for row in rows_of(original):
        assert len(row["versions"]) == len(row["response_tokens"])
        assert row["versions"] == sorted(row["versions"])
        if not row["filtered"]:
            # Weights of step n have learnt from n rollouts; those of rollout n are trained by weights n - 1.
            by_step.setdefault(row["step"], []).extend(row["step"] - 1 - version for version in row["versions"])
    for record in records:
        ages, values = by_step[record["step"]], record["values"]
        assert min(ages) >= 0
        assert values["staleness/token"] == pytest.approx(sum(ages) / len(ages))
        assert values["staleness/token_max"] == max(ages)
        assert values["staleness/masked_share"] == sum(age > 3 * STALENESS for age in ages) / len(ages)
        assert 0 < values["pump/occupancy"] <= 1
        assert 0 <= values["pump/engines_idle_share"] <= 1
        assert values["mismatch/probe_mean_abs"] < 1e-4
    assert max(record["values"]["staleness/token_max"] for record in records) > 0
    assert records[-1]["values"]["staleness/trained_length"] == pytest.approx(1, abs=0.05)
    assert "mismatch/mean_weight" in records[-1]["values"]  # the correction is on by itself
    assert not (original / "ledger").exists()  # nothing is kept of a run that has ended


def test_its_record_repeats_the_run_bit_for_bit(world: Path, original: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = command(world, run, *ASYNC, "--replay", str(original))
    at = words.index("--reward_func")
    del words[at : at + 2]
    at = words.index("--vllm_num_engines")
    del words[at : at + 2]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert model_bytes(run / "model") == model_bytes(original / "model")
    for before, after in zip(metrics(original), metrics(run), strict=True):
        for name in ("policy/loss", "policy/grad_norm", "staleness/token", "staleness/masked_share", "reward/mean"):
            assert before["values"].get(name) == after["values"].get(name), name


KINDS = ("driver", "EngineActor", "LearnerActor", "worker.py")


def kill(run: subprocess.Popen[str], kind: str) -> None:
    """The driver, or a process of the run whose command names its kind."""
    if kind == "driver":
        run.kill()
        return
    found = [p for p in psutil.Process(run.pid).children(recursive=True) if kind in " ".join(p.cmdline())]
    if found:
        random.choice(found).kill()


def alive_under(world: Path) -> list[str]:
    """Processes of runs on this world, or of their Ray."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        line = " ".join(process.info["cmdline"] or ())
        if str(world) in line:
            found.append(line[:120])
    return found


def run_through_kills(world: Path, run: Path, kills: int, seed: int) -> None:
    """Kill something at a random moment, as often as asked, and start again after each kill of the driver."""
    dice = random.Random(seed)
    words = command(world, run, *ASYNC, "--load_checkpoint", "--max_restarts", "100")
    process = None
    for number in range(kills):
        if process is None or process.poll() is not None:
            process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            limit = time.monotonic() + 120
            while not (run / "ledger.jsonl").exists() and process.poll() is None and time.monotonic() < limit:
                time.sleep(0.1)
            time.sleep(dice.uniform(0, 12))
        kill(process, KINDS[number % len(KINDS)])
        time.sleep(dice.uniform(0, 6))
        if process.poll() == 0:
            break
    if process is not None and process.poll() is None:
        process.wait(timeout=600)
    if process is None or process.returncode != 0:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]


def test_whatever_is_killed_every_prompt_is_trained_once(world: Path, tmp_path: Path) -> None:
    run_through_kills(world, tmp_path / "run", 3, seed=1)
    check_every_prompt_once(tmp_path / "run")


@pytest.mark.large
def test_fifty_kills(world: Path, tmp_path: Path) -> None:
    """Many short runs: each is killed until it has ended, at other moments."""
    for seed in range(10):
        run = tmp_path / str(seed)
        run_through_kills(world, run, 5, seed=seed + 10)
        check_every_prompt_once(run)
        assert not alive_under(run)


@pytest.mark.large
def test_sigterm_leaves_a_checkpoint_with_all_that_is_in_work(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = command(world, run, *ASYNC, "--save_steps", "1000")
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 200
    while not (run / "rollouts" / "step_000003.parquet").exists():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    assert process.stderr is not None
    [checkpoint] = (run / "checkpoints").glob("step_*")
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["pump"]["slots"]
    fewer = command(world, run, *ASYNC, "--load_checkpoint", "--max_staleness", "1")
    refused = subprocess.run(fewer, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "that may become as old as --max_staleness 2 --max_token_lag 6 allow: go on with these" in refused.stderr
    train(world, run, *ASYNC, "--load_checkpoint")
    check_every_prompt_once(run)
    assert (run / "report.html").exists()


@pytest.mark.large
@pytest.mark.parametrize("seed", [1, 2])
def test_sigterm_in_an_update_waits_for_the_end_of_the_step(world: Path, tmp_path: Path, seed: int) -> None:
    """Training takes nearly all of the time, so the signal comes in an update; the step is finished and kept."""
    run, sizes = (
        tmp_path / "run",
        "--max_staleness 2 --num_episodes 6 --save_steps 100 --max_epochs 30 --train_batch_size 4",
    )
    words = command(world, run, *GRPO, *HF, *sizes.split())
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    limit = time.monotonic() + 200
    while len(metrics(run) if (run / "metrics.jsonl").exists() else []) < 3:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    time.sleep(random.Random(seed).uniform(0.2, 1.0))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output[-3000:]
    last = metrics(run)[-1]["step"]
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == [f"step_{last:08d}"], output[-3000:]
    assert f"The run goes on from its checkpoint of step {last} by: " in output


@pytest.mark.large
def test_two_hundred_steps_need_no_more_than_fifty(world: Path, tmp_path: Path) -> None:
    """Resident memory, open files and threads of every process of a run but Ray's servers, over its last 150 of 200 steps.

    A step of the C library's heaps is 16 MB, which for these tiny models is more than 2 %.
    """
    run = tmp_path / "run"
    sizes = "--rollout_batch_size 2 --train_batch_size 8 --generate_max_len 8 --num_episodes 41 --max_steps 200"
    flags = [*GRPO, *HF, *sizes.split(), "--max_staleness", "2", "--vllm_num_engines", "2"]
    process = subprocess.Popen(
        command(world, run, *flags), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    seen: dict[int, list[tuple[int, int, int, int]]] = {}
    names: dict[int, str] = {}
    while process.poll() is None:
        time.sleep(0.5)
        try:
            step = len((run / "metrics.jsonl").read_text().splitlines())
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        except (OSError, psutil.Error):
            continue
        for one in family:
            with suppress(psutil.Error):
                if one.pid != process.pid and not " ".join(one.cmdline()).startswith("ray::"):
                    continue
                facts = (step, one.memory_info().rss, one.num_fds(), one.num_threads())
                seen.setdefault(one.pid, []).append(facts)
                names[one.pid] = " ".join(one.cmdline())[:60]
    assert process.returncode == 0
    grown = []
    for pid, facts in seen.items():
        settled = [fact for fact in facts if fact[0] >= 50]
        if len(settled) < 20:
            continue
        first, last = settled[: len(settled) // 4], settled[-len(settled) // 4 :]
        for kind, name in enumerate(("resident bytes", "open files", "threads"), start=1):
            before, after = (sorted(fact[kind] for fact in part)[len(part) // 2] for part in (first, last))
            if after > (before * 1.02 + (16 << 20) if kind == 1 else before + 1):
                grown.append(f"{names[pid]}: {name} {before} -> {after}")
    assert not grown, grown
