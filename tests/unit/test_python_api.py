"""togi.rl from Python: names, sources, what is refused, and that importing it is light."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import togi
from togi.config.parse import Parsed, Source
from togi.config.rl import RLConfig
from togi.errors import UserError
from togi.run import start
from togi.run.start import run_to_end

ROOT = Path(__file__).parents[2]


def reward(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]) -> list[float]:
    return [0.0 for _ in queries]


def test_importing_is_light() -> None:
    code = (
        "import sys, togi; assert callable(togi.rl);"
        "print([m for m in ('torch', 'pydantic', 'yaml', 'numpy', 'asyncio', 'togi.config') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_settings_reach_the_recipe_with_their_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[Parsed[RLConfig], Callable[..., Any] | None]] = []

    def stop(parsed: Parsed[RLConfig], *, reward: Callable[..., Any] | None) -> None:
        seen.append((parsed, reward))

    monkeypatch.setattr(start, "start_rl", stop)
    togi.rl(
        pretrain=tmp_path,  # paths may be pathlib's
        prompt_data="p.jsonl",
        reward=reward,
        advantage_estimator="rloo",
        adam_betas=(0.8, 0.9),
        max_samples=1e3,
        bf16=True,
    )
    parsed, function = seen[0]
    config = parsed.config
    assert function is reward
    assert (config.pretrain, config.advantage_estimator, config.adam_betas) == (str(tmp_path), "rloo", (0.8, 0.9))
    assert (config.max_samples, config.bf16, config.gamma) == (1000, True, 1.0)
    assert {name for name, source in parsed.sources.items() if source is Source.PYTHON} == {
        "pretrain",
        "prompt_data",
        "advantage_estimator",
        "adam_betas",
        "max_samples",
        "bf16",
    }
    assert parsed.sources["gamma"] is Source.DEFAULT
    # a file below them, as on the command line
    (tmp_path / "c.yaml").write_text("seed: 7\ngamma: 0.5\n")
    togi.rl(config=tmp_path / "c.yaml", reward=reward, gamma=0.25)
    parsed, _ = seen[1]
    assert (parsed.config.seed, parsed.config.gamma) == (7, 0.25)
    assert (parsed.sources["seed"], parsed.sources["gamma"]) == (Source.FILE, Source.PYTHON)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pretrian": "x"}, ["pretrian", "did you mean pretrain?"]),
        ({"temperature": "hot"}, ["--temperature hot", "a number"]),
        ({"prompt_data": [{"input": "x" * 1000}]}, ["--prompt_data", "must be text"]),
        ({"local_rank": 0}, ["--local_rank is not supported yet"]),
        ({}, ["--pretrain is required"]),
        ({"pretrain": "m", "prompt_data": "p"}, ["There is no reward"]),
        ({"reward": "reward.py"}, ["reward must be a function", "not str", "reward_func"]),
        (
            {"reward": Source},
            [
                "reward is the class Source, which is not called with queries: give an object of it, Source(...), or a function"
            ],
        ),
        ({"config": "no/such.yaml"}, ["--config no/such.yaml cannot be read (No such file or directory)"]),
        (
            {"pretrain": "m", "prompt_data": "p", "reward": reward, "reward_func": "r.py"},
            ["A reward function was passed and --reward_func is set too"],
        ),
        (
            {"pretrain": "/none/model", "prompt_data": "p", "reward": reward, "n_samples_per_prompt": 2}
            | {"advantage_estimator": "rloo", "rollout_engine": "transformers"},
            ["--pretrain /none/model is not a folder"],
        ),
    ],
)
def test_mistakes_are_one_sentence(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        togi.rl(**settings)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 300


def test_work_runs_to_its_end_beside_a_running_event_loop() -> None:
    async def work() -> asyncio.AbstractEventLoop:
        await asyncio.sleep(0)
        return asyncio.get_running_loop()

    async def notebook() -> bool:
        return run_to_end(work()) is not asyncio.get_running_loop()

    assert asyncio.run(notebook())


def test_an_interrupt_beside_a_running_event_loop_lets_the_work_close_what_it_opened() -> None:
    closed: list[str] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does: the main thread gets it
            await asyncio.sleep(60)
        finally:
            closed.append("work")

    async def notebook() -> None:
        with pytest.raises(KeyboardInterrupt):
            run_to_end(work())
        assert closed == ["work"]

    loop = asyncio.new_event_loop()  # asyncio.run would take the signal for itself
    try:
        loop.run_until_complete(notebook())
    finally:
        signal.signal(signal.SIGINT, before)
        loop.close()


INTERRUPTED = """
import asyncio, os, signal
from togi.run.start import run_to_end

async def work(told):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)
    finally:
        print(told, "is closed", flush=True)

async def notebook():
    own = signal.getsignal(signal.SIGINT)
    try:
        run_to_end(work("the first"))
    except KeyboardInterrupt:
        print("interrupted", signal.getsignal(signal.SIGINT) is own, asyncio.current_task().cancelling())
    run_to_end(work("the second"))

signal.signal(signal.SIGINT, signal.default_int_handler)
asyncio.run(notebook())
"""


def test_ctrl_c_stops_a_run_inside_asyncio_run() -> None:
    """Python's runner takes the signal for itself, and cancels a task that waits for the run and cannot be reached."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.stdout == "the first is closed\ninterrupted True 0\nthe second is closed\n"
    assert done.stderr.rstrip().endswith("KeyboardInterrupt") and done.returncode == -signal.SIGINT
