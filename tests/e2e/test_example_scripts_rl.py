"""Example scripts of online RL with a tiny model, as users start them: what they store is checked, not only that they end."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests import warm
from tests.example_scripts import SCRIPTS, run_script
from tests.offline_world import ROOT, values, write
from tests.tiny import save_tiny_model, tiny_config, tiny_tokenizer
from togi.pump.ledger import Event, balance, read

TINY = "--no_bf16 --rollout_engine transformers --no_enforce_eager --max_steps 1 --rollout_batch_size 2 --train_batch_size 4 "
TINY += "--n_samples_per_prompt 2 --prompt_max_len 64 --generate_max_len 8 --max_tokens_per_gpu 256"
REWARD = """
def reward_func(queries, prompts, labels, responses):
    return [len(response) / 10 for response in responses]
"""
MEAN, STD = 0.25, 2.0
# What each script trains besides the actor, and where everything goes.
EXAMPLES = {
    "rl_ppo_reward_model.sh": "engine 1 + actor, ref 1 + critic, reward 1 = 3",
    "rl_ppo_remote_rm.sh": "engine, actor, critic, ref 1 = 1",
    "rl_several_rewards.sh": "engine, actor, reward, reward 1 = 1",
    "rl_verifiers.sh": "engine, actor 1 = 1",
    "rl_workers.sh": "engine, actor 2 = 2",
    "rl_ppo_ring.sh": "engine 1 + critic 2 + actor, ref 2 = 5",
    "rl_dapo.sh": "engine, actor 1 = 1",
    "rl_prorl.sh": "engine, actor, ref 1 = 1",
    "rl_ppo_70b.sh": "engine 1 + actor, ref 1 + critic, reward 1 = 3",
    "rl_ppo_hybrid.sh": "engine, actor, critic, ref 1 = 1",
    "rl_grpo_hybrid.sh": "engine, actor, ref 1 = 1",
    "rl_reinforce_hybrid.sh": "engine, actor, ref 1 = 1",
    "rl_async.sh": "engine 1 + actor 1 = 2",
    "rl_async_lora.sh": "engine 1 + actor 1 = 2",
    "serve_rm.sh": "",
}
# Those that ask for more than one worker of a kind, or for an engine that works beside the model.
RAY = ("rl_workers.sh", "rl_ppo_ring.sh")
MORE = {
    "rl_verifiers.sh": ["--format_regex", ".*e.*"],
    "rl_workers.sh": ["--save_steps", "1"],
    "rl_dapo.sh": ["--overlong_buffer_len", "4"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    for seed, name in enumerate(("helpful", "harmless")):
        torch.manual_seed(seed)
        config = tiny_config("llama", num_labels=1, initializer_range=0.1)
        config.mean, config.std = MEAN, STD
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    write(folder / "prompts.jsonl", [{"prompt": f"what is {i} + 1?", "answer": str(i + 1)} for i in range(2)])
    (folder / "reward.py").write_text(REWARD)
    return folder


def places(world: Path, run: Path) -> dict[str, Path]:
    files = {"MODEL": world / "model", "DATA": world / "prompts.jsonl", "REWARD": world / "reward.py", "OUT": run}
    return files | {"RM": world / "helpful"}


@contextmanager
def served(world: Path) -> Iterator[str]:
    """serve_rm.sh on a free port; its URL."""
    words = [SCRIPTS / "serve_rm.sh", "--no_bf16"]
    names = {"TOGI": warm.script(), "PYTHONPATH": ROOT, "PORT": 0, **places(world, world)}
    names = os.environ | {name: str(value) for name, value in names.items()}
    process = subprocess.Popen(words, env=names, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("reward server: http://127.0.0.1:"), line + process.stderr.read()
        yield line.removeprefix("reward server: ").strip()
    finally:
        process.kill()
        process.communicate()


def train(world: Path, script: str, run: Path, **more: object) -> list[dict[str, Any]]:
    """Run a script for one step; returns its stored rollouts."""
    done = run_script(script, *TINY.split(), *MORE.get(script, []), **{**places(world, run), **more})
    where = "worker processes" if script in RAY else "workers in this process"
    assert f"placement: {EXAMPLES[script]} {where}\n" in done.stdout
    (step,) = values(run)
    assert math.isfinite(step["policy/loss"]) and math.isfinite(step["policy/grad_norm"])
    assert math.isfinite(step.get("value/loss", 0.0)) and ("value/loss" in step) == ("critic" in EXAMPLES[script])
    assert (run / "model" / "model.safetensors").is_file()
    rows: list[dict[str, Any]] = pq.read_table(run / "rollouts" / "step_000001.parquet").to_pylist()
    assert len(rows) == 4
    return rows


def score(model: Path, ids: list[int]) -> float:
    """The head's output at the last token, by plain Transformers, standardised."""
    loaded = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return (loaded.score(loaded.model(torch.tensor([ids])).last_hidden_state[0, -1]).item() - MEAN) / STD


def tokens(row: dict[str, Any]) -> list[int]:
    return [*row["prompt_tokens"], *row["response_tokens"]]


def text(row: dict[str, Any]) -> str:
    return tiny_tokenizer().decode(row["response_tokens"], skip_special_tokens=True)


def test_ppo_with_a_local_reward_model(world: Path, tmp_path: Path) -> None:
    for row in train(world, "rl_ppo_reward_model.sh", tmp_path / "run"):
        assert row["reward"] == pytest.approx(score(world / "helpful", tokens(row)), abs=1e-4)


def test_ppo_with_a_served_reward_model(world: Path, tmp_path: Path) -> None:
    """The server reads text: of what is no text, such as half a character, it scores what is left."""
    tokenizer = tiny_tokenizer()
    with served(world) as url:
        rows = train(world, "rl_ppo_remote_rm.sh", tmp_path / "run", URL=url)
    for row in rows:
        sent = tokenizer(tokenizer.decode(tokens(row)), add_special_tokens=False)["input_ids"]
        assert row["reward"] == pytest.approx(score(world / "helpful", sent), abs=1e-4)


def test_several_rewards_add_up_by_their_weights(world: Path, tmp_path: Path) -> None:
    models = [world / "helpful", world / "harmless"]
    for row in train(world, "rl_several_rewards.sh", tmp_path / "run", RM=f"{models[0]},{models[1]}"):
        parts = dict(row["components"])
        raw = [score(model, tokens(row)) * STD + MEAN for model in models]  # the script does not ask to standardise
        assert [parts["helpful"], parts["harmless"]] == pytest.approx(raw, abs=1e-4)
        assert row["reward"] == pytest.approx(raw[0] + 0.5 * raw[1] + 0.2 * parts["function"], abs=1e-4)


def test_verifiers(world: Path, tmp_path: Path) -> None:
    for row in train(world, "rl_verifiers.sh", tmp_path / "run"):
        parts = dict(row["components"])
        assert parts["format"] == float(re.fullmatch(".*e.*", text(row).strip(), re.DOTALL) is not None)
        assert row["reward"] == pytest.approx(parts["math"] + 0.2 * parts["format"])


@pytest.mark.large
def test_workers(world: Path, tmp_path: Path) -> None:
    train(world, "rl_workers.sh", tmp_path / "run")
    state = json.loads((tmp_path / "run" / "status.json").read_text())["state"]
    assert state == "finished" and (tmp_path / "run" / "checkpoints" / "step_00000001").is_dir()


@pytest.mark.large
def test_ppo_in_a_ring(world: Path, tmp_path: Path) -> None:
    """Whatever the ring is, all its ranks are one actor: the ratio to the engine's log-probs is 1."""
    train(world, "rl_ppo_ring.sh", tmp_path / "run")
    (step,) = values(tmp_path / "run")
    assert step["mismatch/max_ratio"] == pytest.approx(1, abs=1e-3)


def test_dapo_takes_reward_from_responses_near_the_limit(world: Path, tmp_path: Path) -> None:
    """Of at most 8 tokens the last 4 cost, a quarter each."""
    for row in train(world, "rl_dapo.sh", tmp_path / "run"):
        length = len(row["response_tokens"])
        assert row["reward"] == pytest.approx(len(text(row)) / 10 - max(0, length - 4) / 4)
    (step,) = values(tmp_path / "run")
    assert step["mismatch/max_ratio"] == pytest.approx(1, abs=1e-3) and "kl/reference" not in step


def test_prorl_gives_nothing_for_a_response_that_was_cut_off(world: Path, tmp_path: Path) -> None:
    for row in train(world, "rl_prorl.sh", tmp_path / "run"):
        assert row["reward"] == pytest.approx(0 if row["finish_reason"] == "length" else len(text(row)) / 10)
    (step,) = values(tmp_path / "run")
    assert step["kl/reference"] == pytest.approx(0, abs=1e-6)  # nothing has moved yet


def test_the_large_script_in_small_numbers(world: Path, tmp_path: Path) -> None:
    """Only how many there are of everything is changed: every other flag of the 70B script is in force."""
    sizes = {"NODES": 1, "GPUS": 1, "ENGINES": 1, "TP": 1}
    for row in train(world, "rl_ppo_70b.sh", tmp_path / "run", **sizes):
        assert row["reward"] == pytest.approx(score(world / "helpful", tokens(row)), abs=1e-4)


@pytest.mark.parametrize(
    "name",
    ["grpo", pytest.param("ppo", marks=pytest.mark.large), pytest.param("reinforce", marks=pytest.mark.large)],
)
def test_hybrid_engines(world: Path, tmp_path: Path, name: str) -> None:
    """What slept is whole again: the trainer's log-probs are the engine's."""
    for row in train(world, f"rl_{name}_hybrid.sh", tmp_path / "run"):
        assert row["reward"] == pytest.approx(len(text(row)) / 10)
    (step,) = values(tmp_path / "run")
    assert step["mismatch/max_ratio"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("script", "engine"),
    [("rl_async.sh", "transformers"), pytest.param("rl_async_lora.sh", "vllm", marks=pytest.mark.large)],
)
def test_asynchronous_rl(world: Path, tmp_path: Path, script: str, engine: str) -> None:
    """Six passes over two prompts, a step each, with three of them at work: tokens are trained on that older weights sampled."""
    run, flags = tmp_path / "run", ["--rollout_engine", engine, "--max_steps", "-1", "--num_episodes", "6"]
    flags += ["--target_modules", "q_proj", "v_proj"] if "lora" in script else []
    done = run_script(script, *TINY.split(), *flags, "--generate_max_len", "32", **places(world, run))
    assert f"placement: {EXAMPLES[script]} worker processes\n" in done.stdout
    steps = values(run)
    assert len(steps) == 6
    assert set(balance(read(run / "ledger.jsonl"))) == set(range(12))
    assert set(balance(read(run / "ledger.jsonl")).values()) == {Event.TRAINED}
    assert 0 < max(step["staleness/token_max"] for step in steps) <= 6
    for step in steps:
        # Corrected by itself, and engine and trainer agree on weights that came in the middle of responses.
        assert 0.5 <= step["mismatch/mean_weight"] <= 5
        assert step["mismatch/probe_mean_abs"] < 1e-3
    if "lora" in script:
        adapter = load_file(run / "model" / "adapter_model.safetensors").values()
        assert {step["weights/sync_bytes"] for step in steps} == {sum(4 * each.numel() for each in adapter)}
        assert steps[-1]["kl/reference"] != 0
    # The page shows what the 3 x 2 slots and the trainer did.
    found = re.search(r'id="togi-data">(.*?)</script>', (run / "report.html").read_text(), re.DOTALL)
    picture = json.loads(found[1])["gantt"]
    assert {row for _, row, *_ in picture["spans"]} == set(range(-1, 6))
    assert [text for _, text in picture["lines"]] == [f"version {number}" for number in range(1, 7)]
    trained = [text for kind, row, *_, text in picture["spans"] if (kind, row) == ("training", -1)]
    assert trained == [f"step {number}" for number in range(1, 7)]
