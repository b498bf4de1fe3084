"""A served reward model end to end: many requests at once, and a training run whose server dies and comes back."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from tests.rl_world import GRPO, HF, ROOT, command, metrics
from tests.scripted_server import free_port
from tests.tiny import save_tiny_model, tiny_config, tiny_tokenizer
from togi.model.loading import keep_layout, nf4
from togi.pump.ledger import Event, balance, read

pytestmark = pytest.mark.busy

FUNCTION = """
def reward_func(queries, prompts, labels, responses):
    return [len(response) for response in responses]
"""
REQUESTS, AT_ONCE = 2000, 64


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny policy, a tiny reward model, prompts and a reward function."""
    folder = tmp_path_factory.mktemp("served")
    save_tiny_model(folder / "model", arch="llama", seed=0)
    save_reward_model(folder / "rm")
    rows = [{"prompt": f"write number {i}", "letter": "e"} for i in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(FUNCTION)
    return folder


def save_reward_model(folder: Path) -> None:
    torch.manual_seed(3)
    config = tiny_config("llama", num_labels=1, initializer_range=0.1)
    config.mean, config.std = 0.25, 2.0
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def direct(model: PreTrainedModel, text: str) -> float:
    """What plain Transformers gives for the last token of a text, standardised with the config's numbers."""
    ids = tiny_tokenizer()(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        score = model.score(model.model(ids).last_hidden_state[0, -1]).item()
    return (score - 0.25) / 2.0


@contextmanager
def server(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``togi serve-rm`` as users start it, and its URL."""
    words = [sys.executable, "-m", "togi.cli.serve_rm", *flags]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("reward server: http://127.0.0.1:"), line + process.stderr.read()
        yield process, line.removeprefix("reward server: ").strip()
    finally:
        process.kill()
        process.communicate()


def test_many_requests_at_once_lose_nothing_and_get_the_model_s_own_scores(world: Path) -> None:
    texts = [f"question {i}: " + "word " * (i * 7 % 40) + "<|im_end|>" * (i % 2) for i in range(100)]
    model = AutoModelForSequenceClassification.from_pretrained(world / "rm").eval()
    expected = [direct(model, text) for text in texts]

    async def load(url: str) -> list[tuple[int, list[float]]]:
        left = iter(range(REQUESTS))
        results: list[tuple[int, list[float]]] = []

        async def one_client(session: aiohttp.ClientSession) -> None:
            for i in left:
                queries = [texts[i % 100], texts[(i * 3 + 1) % 100]]
                async with session.post(
                    url, json={"query": queries, "prompts": ["", ""], "labels": ["", ""]}
                ) as answer:
                    assert answer.status == 200, await answer.text()
                    results.append((i, (await answer.json())["rewards"]))

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=AT_ONCE)) as session:
            await asyncio.gather(*(one_client(session) for _ in range(AT_ONCE)))
            async with session.get(url.replace("get_reward", "metrics")) as answer:
                counted = await answer.text()
        assert f'togi_reward_requests_total{{status="200"}} {REQUESTS}' in counted.splitlines()
        assert f"togi_reward_items_total {2 * REQUESTS}" in counted.splitlines()
        return results

    with server("--reward_pretrain", str(world / "rm"), "--normalize_reward", "--port", "0") as (process, url):
        results = asyncio.run(load(url))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert sorted(i for i, _ in results) == list(range(REQUESTS))
    for i, (first, second) in results:
        assert first == pytest.approx(expected[i % 100], abs=1e-4)
        assert second == pytest.approx(expected[(i * 3 + 1) % 100], abs=1e-4)
    assert (process.returncode, out) == (0, "reward server: ended\n")
    assert "question" not in err


def test_a_model_in_four_bits_gives_transformers_own_scores(world: Path) -> None:
    texts = [f"question {i}: " + "word " * i for i in range(6)]
    quantised = AutoModelForSequenceClassification.from_pretrained(
        world / "rm", quantization_config=nf4(torch.float32)
    ).eval()
    keep_layout(quantised)
    expected = [direct(quantised, text) for text in texts]
    whole = AutoModelForSequenceClassification.from_pretrained(world / "rm").eval()
    assert max(abs(direct(whole, text) - score) for text, score in zip(texts, expected, strict=True)) > 1e-2

    async def ask(url: str) -> list[float]:
        body = {"query": texts, "prompts": [""] * len(texts)}
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
            return (await answer.json())["rewards"]

    flags = ["--normalize_reward", "--load_in_4bit", "--port", "0"]
    with server("--reward_pretrain", str(world / "rm"), *flags) as (_, url):
        assert asyncio.run(ask(url)) == pytest.approx(expected, abs=1e-4)


def test_a_query_that_is_too_long_is_refused_and_a_function_is_served_too(world: Path) -> None:
    async def ask(url: str, *queries: str) -> tuple[int, dict[str, object]]:
        body = {"query": list(queries), "prompts": ["Q: "] * len(queries)}
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
            return answer.status, await answer.json()

    with server("--reward_pretrain", str(world / "rm"), "--max_len", "10", "--port", "0") as (_, url):
        status, answer = asyncio.run(ask(url, "short", "longer than ten"))
        assert (status, "query 1: it has 15 tokens, more than --max_len 10" in str(answer["error"])) == (422, True)
    with server("--reward_func", str(world / "reward.py"), "--port", "0") as (_, url):
        assert asyncio.run(ask(url, "Q: four", "Q: a")) == (200, {"rewards": [4.0, 1.0]})


def test_a_run_waits_for_its_server_and_every_reward_is_true(world: Path, tmp_path: Path) -> None:
    """The server is killed after the first step: the run pauses, and goes on when a new one listens in its place."""
    run, port = tmp_path / "run", free_port()
    serve = ["--reward_pretrain", str(world / "rm"), "--normalize_reward", "--port", str(port)]
    flags = [*GRPO, *HF, "--num_episodes", "4", "--remote_rm_url", f"http://127.0.0.1:{port}/get_reward"]
    log = tmp_path / "stderr"
    with log.open("w") as stderr, server(*serve) as (first, _):
        words = command(world, run, *flags, "--reward_weights", "2", "-0.5")
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            wait_for(lambda: len(steps(run)) >= 1, process, log)
            first.kill()
            wait_for(lambda: "its requests wait until it is back" in log.read_text(), process, log)
            paused_at = len(steps(run))
            time.sleep(2)
            assert process.poll() is None
            assert len(steps(run)) == paused_at < 4
            with server(*serve):
                assert process.wait(timeout=120) == 0, log.read_text()[-3000:]
        finally:
            process.kill()
            process.wait()
    assert "answers again after" in log.read_text()
    records = metrics(run)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert sum(record["values"]["reward/paused_seconds"] for record in records) > 2
    assert all(record["values"]["reward/error_share"] == 0 for record in records)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(world / "rm").eval(), tiny_tokenizer()
    rows = [row for path in sorted((run / "rollouts").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert len(rows) == 4 * 16
    for row in rows:
        parts = dict(row["components"])
        sent = row["prompt_text"] + tokenizer.decode(row["response_tokens"], skip_special_tokens=False)
        text = re.sub(r"(<pad>)+$", "", sent)  # a policy that writes padding at the end is not scored on it
        assert row["outcome"] == "score"
        assert parts == {"remote": pytest.approx(direct(model, text), abs=1e-4), "function": len(row["response_text"])}
        assert row["reward"] == pytest.approx(2 * parts["remote"] - 0.5 * parts["function"], abs=1e-5)


@pytest.mark.large
def test_an_engine_and_the_server_die_in_an_asynchronous_run_and_it_ends_by_itself(world: Path, tmp_path: Path) -> None:
    """Every prompt is trained once; the page shows how long rewards were away, and that an engine was restarted."""
    run, port, away = tmp_path / "run", free_port(), 6.0
    serve = ["--reward_func", str(world / "reward.py"), "--port", str(port)]
    flags = [*GRPO, *HF, "--num_episodes", "12", "--max_staleness", "2", "--vllm_num_engines", "2"]
    words = command(world, run, *flags, "--remote_rm_url", f"http://127.0.0.1:{port}/get_reward")
    at = words.index("--reward_func")
    del words[at : at + 2]
    log = tmp_path / "stderr"
    with log.open("w") as stderr, server(*serve) as (first, _):
        process = subprocess.Popen(words, cwd=ROOT, stdout=stderr, stderr=stderr)
        try:
            wait_for(lambda: len(steps(run)) >= 3, process, log)
            first.kill()
            family = psutil.Process(process.pid).children(recursive=True)
            next(child for child in family if "EngineActor" in " ".join(child.cmdline())).kill()
            time.sleep(away)
            assert process.poll() is None
            with server(*serve):
                assert process.wait(timeout=200) == 0, log.read_text()[-3000:]
        finally:
            process.kill()
            process.wait()
    states = balance(read(run / "ledger.jsonl"))
    assert set(states) == set(range(4 * 12)) and set(states.values()) == {Event.TRAINED}
    records = metrics(run)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert all(record["values"]["reward/error_share"] == 0 for record in records)
    assert records[-1]["values"]["restarts/engines"] == 1
    # The page: the pause in the numbers, and in the picture groups that waited for their rewards.
    assert sum(record["values"]["reward/paused_seconds"] for record in records) > away / 2
    found = re.search(r'id="togi-data">(.*?)</script>', (run / "report.html").read_text(), re.DOTALL)
    page = json.loads(found[1])
    assert max(value or 0 for value in page["series"]["reward/paused_seconds"]) > away / 2
    assert max(value or 0 for value in page["series"]["restarts/engines"]) == 1
    assert max(end - start for kind, _, start, end, _ in page["gantt"]["spans"] if kind == "rewards") > away / 2


def steps(run: Path) -> Sequence[object]:
    return metrics(run) if (run / "metrics.jsonl").exists() else []


def wait_for(condition: object, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)
