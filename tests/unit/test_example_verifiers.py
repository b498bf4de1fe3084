"""The agent of examples/ that plays environments of verifiers, which needs other versions of packages than the tested ones.

Give it a folder of its own: pip install --target FOLDER 'verifiers>=0.4,<0.5', then run this file alone with PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
from typing import Any

import pytest

from tests.example_files import completion, example, serving

INSTALLED = importlib.util.find_spec("verifiers") is not None
pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(not INSTALLED, reason="verifiers needs a folder of its own (above)"),
]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of the episode."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-episode")


def run(url: str, task: dict[str, Any]) -> Any:
    return asyncio.run(example("agents", "verifiers_agent").run(f"{url}/v1", task))


@pytest.mark.parametrize(
    ("answer", "reward"), [("duolc", 1.0), ("cloud", 0.5), ("rain", 0.0)], ids=["backwards", "letters", "other"]
)
def test_a_task_of_verifiers(answer: str, reward: float) -> None:
    task = {"environment": "verifiers_words", "index": 2}
    with serving(lambda _: completion(answer)) as (url, asked):
        assert run(url, task) == {"reward": reward, "backwards": reward}
    ((path, key, messages),) = [(each.path, each.key, each.body["messages"]) for each in asked]
    assert (path, key) == ("/v1/chat/completions", "Bearer sk-episode")
    assert messages == [{"role": "user", "content": "Spell 'cloud' backwards."}]


def test_a_rollout_of_verifiers_that_fails_is_no_reward() -> None:
    broken = (400, {"error": {"message": "no such model"}}, "")
    with serving(lambda _: broken) as (url, _), pytest.raises(RuntimeError, match="verifiers_words, task 0, failed"):
        run(url, {"environment": "verifiers_words", "index": 0})


def test_the_rows_of_an_environment_of_verifiers(capsys: pytest.CaptureFixture[str]) -> None:
    example("agents", "verifiers_agent").main("verifiers_words")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{"environment": "verifiers_words", "index": index} for index in range(4)]
