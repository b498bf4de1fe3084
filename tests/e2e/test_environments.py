"""Runs in an environment end to end, of a tiny policy: what is stored, that a replay repeats it, that a kill loses nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from tests.example_scripts import run_script
from tests.rl_world import GRPO, HF, ROOT, command, metrics, model_bytes
from tests.tiny import STOP, save_tiny_model, tiny_tokenizer
from togi.pump.ledger import Event, balance, read

CHATTER = '''
class Chatter:
    """Three turns. A turn is worth how many different characters it has; what raises now and then is an error."""

    def reset(self, letter: str, **row):
        self.turn, self.letter = 0, letter

    def step(self, action: str):
        self.turn += 1
        return f"go on {self.turn}", len(set(action)) / 8, self.turn == 3

    def reward(self):
        return {"turns": 0.1 * self.turn}
'''
EXAMPLES = ("rl_environment.sh", "rl_agent.sh")
SIZES = ["--prompt_max_len", "64", "--generate_max_len", "8", "--max_len", "160", "--num_episodes", "2"]


def acting(world: Path, run: Path, *flags: str) -> list[str]:
    """The command of a run in the environment, which has a reward of its own."""
    (world / "chatter.py").write_text(CHATTER)
    words = command(world, run, *GRPO, *HF, "--environment", f"{world}/chatter.py:Chatter", *SIZES, *flags)
    at = words.index("--reward_func")
    del words[at : at + 2]
    return words


def play(world: Path, run: Path, *flags: str) -> None:
    done = subprocess.run(
        acting(world, run, *flags), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def is_own(process: psutil.Process) -> bool:
    """Whether a process is a worker of the run or an episode; what Ray runs for itself ends in its own time."""
    with suppress(psutil.Error):
        line = " ".join(process.cmdline())
        return "Actor" in line or "togi" in line
    return False


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [row for file in sorted((run / "rollouts").glob("step_*")) for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def original(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("acting") / "run"
    play(world, run, "--turn_discount", "0.5", "--save_steps", "1")
    return run


def test_every_turn_is_trained_with_the_tokens_that_were_sampled(original: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows = rows_of(original)
    assert len(rows) == 2 * 10 * 4
    for row in rows:
        tokens, mask, logprobs = row["response_tokens"], row["response_mask"], row["rollout_logprobs"]
        turns = int(dict(row["counts"])["turns"])
        assert 1 <= turns <= 3 and mask[0]
        # An answer that was cut ends the episode; else there are three.
        assert turns == 3 or row["finish_reason"] == "length"
        said = [message for message in json.loads(row["messages"]) if message["role"] == "assistant"]
        assert len(said) == turns == len(row["turn_rewards"])
        # Given tokens are the template's, and nothing was sampled there.
        given = tokenizer.decode([t for t, own in zip(tokens, mask, strict=True) if not own])
        assert given.count("<|im_start|>user\ngo on") == turns - 1 == given.count("<|im_start|>assistant\n")
        assert all(value == 0 for value, own in zip(logprobs, mask, strict=True) if not own)
        # The end token belongs to the answer, and rewards come after it.
        for place, reward in row["turn_rewards"]:
            last = int(place)
            assert mask[last] and (tokens[last] == STOP or row["finish_reason"] == "length")
            assert reward >= 0
        total = sum(reward for _, reward in row["turn_rewards"]) + 0.1 * turns
        assert row["reward"] == pytest.approx(total)
        assert row["forks"] == []
    by_step = metrics(original)
    assert [record["step"] for record in by_step] == list(range(1, 7))
    for record in by_step:
        own = [row for row in rows if row["step"] == record["step"]]
        turns = [dict(row["counts"])["turns"] for row in own]
        assert record["values"]["episode/turns"] == pytest.approx(sum(turns) / len(turns))
        assert record["values"]["episode/failed"] == 0
        assert record["values"]["mismatch/mean_abs"] < 1e-4  # trainer and engine agree on every sampled token


def test_a_replay_repeats_the_run_bit_for_bit(world: Path, original: Path, tmp_path: Path) -> None:
    play(world, tmp_path / "run", "--turn_discount", "0.5", "--replay", str(original))
    assert model_bytes(tmp_path / "run" / "model") == model_bytes(original / "model")


@pytest.mark.busy
def test_an_asynchronous_run_that_is_killed_plays_every_row_once(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--max_staleness", "2", "--vllm_num_engines", "2", "--save_steps", "1", "--num_episodes", "4"]
    words = acting(world, run, *flags, "--load_checkpoint")
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 200
    while not (run / "rollouts" / "step_000003.parquet").exists():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    # An engine first, which is healed while episodes run; then everything.
    family = psutil.Process(process.pid).children(recursive=True)
    next(child for child in family if "EngineActor" in " ".join(child.cmdline())).kill()
    time.sleep(1)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs([each for each in family if is_own(each)], timeout=60)
    assert not alive
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    states = balance(read(run / "ledger.jsonl"))
    assert set(states) == set(range(40)) and set(states.values()) == {Event.TRAINED}
    groups = {(row["step"], row["group_id"]): row for row in rows_of(run)}
    assert Counter(row["prompt_id"] for row in groups.values()) == {f"0:{i}": 4 for i in range(10)}
    for row in rows_of(run):
        assert row["versions"] == sorted(row["versions"])
    replayed = tmp_path / "replayed"
    again = acting(world, replayed, *flags, "--replay", str(run))
    at = again.index("--vllm_num_engines")
    del again[at : at + 2]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert model_bytes(replayed / "model") == model_bytes(run / "model")


AGENT = """
import openai

def run(base_url, task):
    # an agent with the official client: two questions, the second of which knows the first answer
    client = openai.OpenAI(base_url=base_url)
    messages = [{"role": "user", "content": f"say {task['letter']}"}]
    for _ in range(2):
        answer = client.chat.completions.create(model="policy", messages=messages).choices[0].message
        messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": "again"}]
    return {"reward": len(set(answer.content or "")) / 8, "asked": 2}
"""


def test_an_agent_of_the_official_client_is_trained(world: Path, tmp_path: Path) -> None:
    """The tokens of both answers are in one row with those of the trainer; a replay repeats the run."""
    (tmp_path / "agent.py").write_text(AGENT)
    run = tmp_path / "run"
    words = [word if word != "--environment" else "--agent" for word in acting(world, run, "--max_steps", "2")]
    words = [word if not word.endswith(":Chatter") else f"{tmp_path}/agent.py:run" for word in words]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = rows_of(run)
    assert len(rows) == 2 * 16
    for row in rows:
        assert dict(row["counts"])["requests"] == 2 and dict(row["components"])["asked"] == 2
        assert [message["role"] for message in json.loads(row["messages"])].count("assistant") == 2
        assert sum(row["response_mask"]) <= 2 * 8
    for record in metrics(run):
        assert record["values"]["mismatch/mean_abs"] < 1e-4
        assert record["values"]["episode/failed"] == 0
    again = [*words, "--replay", str(run)]
    for flag in ("--run_dir", "--save_path", "--ckpt_path"):
        again[again.index(flag) + 1] = str(tmp_path / "replayed" / flag[2:])
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert model_bytes(tmp_path / "replayed" / "save_path") == model_bytes(run / "model")


@pytest.mark.parametrize("script", EXAMPLES)
def test_the_examples_run(tmp_path: Path, script: str) -> None:
    """As users start them, but with a tiny model, whose calls are malformed or none at all."""
    save_tiny_model(tmp_path / "model", arch="llama", seed=0, max_position_embeddings=2048)
    rows = [{"prompt": f"{i} + 1?", "answer": str(i + 1)} for i in range(4)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    tiny = "--no_bf16 --rollout_engine transformers --no_enforce_eager --max_steps 1 --rollout_batch_size 2 --train_batch_size 4 "
    tiny += (
        "--n_samples_per_prompt 2 --prompt_max_len 1700 --generate_max_len 8 --max_len 1720 --max_tokens_per_gpu 1720"
    )
    quick = ["--no_eval_at_start", "--eval_n_samples_per_prompt", "1"] if "environment" in script else []
    places = {"MODEL": tmp_path / "model", "DATA": tmp_path / "sums.jsonl", "OUT": run, "PYTHON": sys.executable}
    run_script(script, *tiny.split(), *quick, **places)
    assert len(rows_of(run)) == 4
    assert all(row["outcome"] == "score" and len(json.loads(row["messages"])) >= 2 for row in rows_of(run))
