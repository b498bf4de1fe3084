"""Agents in processes of their own: what they return, how they fail, how they are killed, and the tokens of their episodes."""

from __future__ import annotations

import asyncio
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engines import settings
from tests.scripted_agent import LIMITS, PROMPT, SAMPLING, ChatML, Policy, answers, sampled, smol, whole
from tests.tiny import save_tiny_model
from togi.config.choices import EngineName
from togi.data.chat import load_tokenizer
from togi.env.agent import AgentEnvironment, AgentHost
from togi.env.proxy import Proxy
from togi.env.session import Limits, Session
from togi.errors import ConfigError
from togi.rollout import create_engine
from togi.rollout.collect import Generate, collect_groups
from togi.sample import Generation, Outcome, Rollout, Sampling

AGENT = """
import os, subprocess, time
from openai import AsyncOpenAI, OpenAI

async def unchanged(base_url, task, api_key):
    assert base_url == os.environ["OPENAI_BASE_URL"] and api_key == os.environ["OPENAI_API_KEY"]
    client, messages = AsyncOpenAI(), [{"role": "user", "content": task["question"]}]
    for question in ("Sure?", ""):
        reply = await client.chat.completions.create(model="m", messages=messages)
        messages += [reply.choices[0].message, {"role": "user", "content": question}]
    return {"reward": float(messages[1].content == task["label"]), "turns": 2}

def silent(base_url, task):
    return None

def wrong(base_url, task):
    OpenAI().completions.create(model="m", prompt="x", max_tokens=2)
    return "good"

def fails(base_url, task):
    raise KeyError("no such tool")

def leaves(base_url, task):
    os._exit(3)

def hangs(base_url, task):
    child = subprocess.Popen(["sleep", "60"])
    with open(task["place"], "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    time.sleep(60)

def greedy(base_url, task):
    client = OpenAI()
    while True:
        client.completions.create(model="m", prompt="x", max_tokens=3)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("agent") / "agent.py"
    path.write_text(AGENT)
    return path


def played(
    host: AgentHost, generate: Generate, row: dict[str, Any], seconds: float = 20.0, limits: Limits = LIMITS
) -> Rollout:
    async def play() -> Rollout:
        tokenizer = smol()
        prompt = PROMPT.__class__(PROMPT.id, (), "", PROMPT.label, row={**PROMPT.row, **row})
        async with Proxy(ChatML(tokenizer), tokenizer) as proxy:
            return await AgentEnvironment(proxy, host, SAMPLING, limits, seconds).run(prompt, "g", generate)

    try:
        return asyncio.run(asyncio.wait_for(play(), 30))
    finally:
        host.close()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def test_an_agent_that_uses_the_official_client_needs_no_change(file: Path) -> None:
    policy = Policy(smol(), answers("42", "Yes"))
    rollout = played(AgentHost.from_file(f"{file}:unchanged", 8), policy.generate, {})
    assert rollout.score is not None and rollout.score.outcome is Outcome.SCORE, rollout.score
    assert (rollout.score.value, rollout.score.components) == (1.0, {"agent": 1.0, "turns": 2.0})
    assert whole(rollout) == policy.contexts[1] + policy.sampled[1] and not rollout.forks
    assert sampled(rollout) == policy.sampled[0] + policy.sampled[1]
    assert [message["content"] for message in rollout.messages] == ["What is 6 * 7?", "42", "Sure?", "Yes"]


@pytest.mark.parametrize(
    ("name", "outcome", "message"),
    [
        ("silent", Outcome.ABSTAIN, "silent in {file} abstained."),
        (
            "wrong",
            Outcome.ERROR,
            "wrong in {file} returned the string 'good' as 'reward' on prompt '0:7'; return a number",
        ),
        ("fails", Outcome.ERROR, "fails in {file} raised KeyError: 'no such tool' at line 21 (raise KeyError("),
        ("leaves", Outcome.ERROR, "leaves in {file} ended its process on prompt '0:7'; let it return its reward"),
    ],
)
def test_whatever_is_no_number_is_no_reward(file: Path, name: str, outcome: Outcome, message: str) -> None:
    policy = Policy(smol(), lambda *_: "abc")
    score = played(AgentHost.from_file(f"{file}:{name}", 8), policy.generate, {}).score
    assert score is not None and score.outcome is outcome and math.isnan(score.value)
    assert score.message.startswith(message.format(file=file)), score.message


def test_an_agent_that_hangs_is_killed_with_all_that_it_started(file: Path, tmp_path: Path) -> None:
    place = tmp_path / "pids"
    policy, start = Policy(smol(), answers()), time.monotonic()
    score = played(AgentHost.from_file(f"{file}:hangs", 8), policy.generate, {"place": str(place)}, seconds=1.0).score
    assert time.monotonic() - start < 20
    assert score is not None and score.outcome is Outcome.ERROR
    assert "ran longer than the limit of 1 s and was killed on prompt '0:7'; make it faster or raise" in score.message
    pids = [int(pid) for pid in place.read_text().split()]
    deadline = time.monotonic() + 5
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline and os.getpid() not in pids
        time.sleep(0.01)


def test_an_agent_that_wants_more_than_its_budget_is_told_and_so_is_the_user(file: Path) -> None:
    policy = Policy(smol(), lambda *_: "abc")
    rollout = played(AgentHost.from_file(f"{file}:greedy", 8), policy.generate, {}, limits=Limits(7, 50, 100))
    assert rollout.score is not None and rollout.score.outcome is Outcome.ERROR
    assert "(The episode may sample 7 tokens, and 0 of them are left.)" in rollout.score.message
    assert len(sampled(rollout)) == 7 and rollout.finish_reason.value == "length"


def test_a_failure_of_generation_is_not_the_agents(file: Path) -> None:
    async def broken(*_: object) -> Generation:
        raise RuntimeError("engine 0 died")

    with pytest.raises(RuntimeError, match="engine 0 died"):
        played(AgentHost.from_file(f"{file}:unchanged", 8), broken, {})


def test_a_program_gets_its_task_and_prints_its_reward() -> None:
    line = 'test -n "$OPENAI_API_KEY" && python3 -c "import json, sys; print(1); print(len(json.load(sys.stdin)[\'question\']))"'
    policy = Policy(smol(), answers())
    score = played(AgentHost.from_command(line, 8), policy.generate, {}).score
    assert score is not None and (score.outcome, score.value) == (Outcome.SCORE, len("What is 6 * 7?")), score
    for line, message in (
        ("exit 4", "ended with exit code 4"),
        ("echo 1; echo well", "printed 'well' as its last line"),
    ):
        score = played(AgentHost.from_command(line, 8), policy.generate, {}).score
        assert score is not None and score.outcome is Outcome.ERROR and message in score.message


def test_what_cannot_be_loaded_is_said_before_any_episode(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"names no existing \.py file"):
        AgentHost.from_file(f"{tmp_path / 'none.py'}:run", 8)
    broken = tmp_path / "broken.py"
    broken.write_text("import not_there\n")
    for place, message in (
        (f"{file}:run", "does not exist: the file defines unchanged, silent"),
        (f"{broken}:run", "cannot be imported: ModuleNotFoundError"),
    ):
        with pytest.raises(ConfigError, match=message):
            asyncio.run(AgentHost.from_file(place, 8).check())


def test_the_tokens_of_many_episodes_are_those_of_the_engine(file: Path, tmp_path: Path) -> None:
    """A real engine, many agents at once: each token, log-probability and version is the one that was sampled."""
    folder = save_tiny_model(tmp_path / "model")
    tokenizer = load_tokenizer(str(folder), chat_template=None, trust_remote_code=False)
    engine = create_engine(EngineName("transformers"), settings(folder))
    made = dict[tuple[int, ...], Generation]()
    sessions = list[Session]()

    async def generate(prompt_tokens: Any, sampling: Sampling) -> Generation:
        generation = await engine.generate(list(prompt_tokens), sampling)
        made[(*prompt_tokens, *generation.tokens)] = generation
        return generation

    async def play() -> list[Rollout]:
        async with Proxy(ChatML(tokenizer), tokenizer) as proxy:
            sampling, limits = Sampling(max_tokens=10, stop_token_ids=(258,)), Limits(20, 3, 300)
            environment = AgentEnvironment(proxy, host, sampling, limits, 60.0, sessions.append)
            prompts = [(f"g{n}", PROMPT) for n in range(3)]
            groups = collect_groups(prompts, environment, generate, n_samples=4, max_in_flight=12, seed=7)
            return [rollout async for group in groups for rollout in group]

    host = AgentHost.from_file(f"{file}:unchanged", 8)
    try:
        rollouts = asyncio.run(asyncio.wait_for(play(), 100))
    finally:
        host.close()
        engine.stop()
    assert len(rollouts) == len(sessions) == 12 and len(made) == 24
    for rollout in rollouts:
        assert rollout.score is not None and rollout.score.outcome is Outcome.SCORE, rollout.score
        # The last request with its answer is the whole row, and the first one is its beginning.
        last = made[whole(rollout)]
        (first,) = [each for ids, each in made.items() if whole(rollout)[: len(ids)] == ids and ids != whole(rollout)]
        assert sampled(rollout) == first.tokens + last.tokens
        own = [value for value, mine in zip(rollout.response_logprobs, rollout.response_mask, strict=True) if mine]
        assert tuple(own) == first.logprobs + last.logprobs and not rollout.forks
    assert len({sampled(rollout) for rollout in rollouts}) > 6, "each request has its own seed"
