"""The agents of examples/, against servers that answer what a script says: what they ask, do, and return."""

from __future__ import annotations

import asyncio
import sys
from itertools import pairwise
from typing import Any

import pytest

from tests.example_files import Asked, completion, example, in_turn, serving

SUM = {"question": "What is (17 + 4) * 12?", "answer": 252}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of the episode."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-episode")


def run(name: str, url: str, task: dict[str, Any]) -> Any:
    return asyncio.run(example("agents", name).run(f"{url}/v1", task))


# ---- the client of OpenAI ----


def test_a_sum_is_computed_over_two_turns() -> None:
    calls = completion(None, ("compute", '{"expression": "17 + 4"}'), ("compute", '{"expression": "-(2 - 4) * 6 / 4"}'))
    with serving(in_turn(calls, completion(" 252\n"))) as (url, asked):
        assert run("openai_agent", url, SUM) == 1.0
    assert [each.path for each in asked] == ["/v1/chat/completions"] * 2
    assert {each.key for each in asked} == {"Bearer sk-episode"}
    first, second = (each.body["messages"] for each in asked)
    assert first == second[:2] and asked[0].body["tools"] == asked[1].body["tools"]
    assert second[2] == {key: value for key, value in calls["choices"][0]["message"].items() if value is not None}
    assert second[3:] == [
        {"role": "tool", "tool_call_id": "call0", "content": "21"},
        {"role": "tool", "tool_call_id": "call1", "content": "3.0"},
    ]


def test_a_wrong_sum_is_worth_nothing() -> None:
    with serving(in_turn(completion("253"))) as (url, asked):
        assert run("openai_agent", url, SUM) == 0.0
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("search", "{}", "There is no tool search, only compute."),
        ("compute", "{", "That cannot be computed: JSONDecodeError."),
        ("compute", '{"sum": "1"}', "That cannot be computed: KeyError."),
        ("compute", '{"expression": "1 / 0"}', "That cannot be computed: ZeroDivisionError."),
        ("compute", '{"expression": "__import__(\'os\')"}', "That cannot be computed: ValueError."),
        ("compute", '{"expression": "9 ** 9"}', "That cannot be computed: ValueError."),
    ],
)
def test_a_faulty_call_is_told_and_the_episode_goes_on(name: str, arguments: str, words: str) -> None:
    with serving(in_turn(completion(None, (name, arguments)), completion("252"))) as (url, asked):
        assert run("openai_agent", url, SUM) == 1.0
    assert asked[1].body["messages"][-1]["content"] == words


def test_an_agent_that_only_calls_ends_after_its_turns() -> None:
    with serving(lambda _: completion(None, ("compute", '{"expression": "1"}'))) as (url, asked):
        assert run("openai_agent", url, SUM) == 0.0
    assert len(asked) == example("agents", "openai_agent").TURNS


# ---- a loop of its own ----

ROOMS = {
    "question": "Where does Ann's brother live?",
    "answer": "Rome",
    "notes": {"Ann": "Her brother is Bob.", "Bob": "He lives in Rome."},
}


def test_notes_are_looked_up_until_the_answer_is_known() -> None:
    texts = (
        "Who is Ann?\nLook up: Ann",
        "Look up: Cid",
        "I am thinking.",
        "Look up: Bob",
        "Answer: Paris?\nAnswer: Rome",
    )
    with serving(in_turn(*map(completion, texts))) as (url, asked):
        assert run("loop_agent", url, ROOMS) == {"reward": 1.1, "answer": 1.0, "read": 0.1}
    assert {(each.path, each.key) for each in asked} == {("/v1/chat/completions", "Bearer sk-episode")}
    said = [message["content"] for message in asked[-1].body["messages"] if message["role"] == "user"][1:]
    assert said == [
        "Her brother is Bob.",
        "There is no note of Cid.",
        "End with 'Look up: NAME' or 'Answer: TEXT'.",
        "He lives in Rome.",
    ]
    # Each request continues the one before.
    for before, after in pairwise(asked):
        assert after.body["messages"][: len(before.body["messages"])] == before.body["messages"]


def test_a_loop_without_answer_or_with_a_wrong_one() -> None:
    with serving(in_turn(completion("Answer: Paris"))) as (url, _):
        assert run("loop_agent", url, ROOMS) == {"reward": 0.0, "answer": 0.0, "read": 0.0}
    with serving(lambda _: completion("Look up: Ann")) as (url, asked):
        assert run("loop_agent", url, ROOMS) == {"reward": 0.1, "answer": 0.0, "read": 0.1}
    assert len(asked) == example("agents", "loop_agent").TURNS


# ---- NeMo Gym ----

TOOL = {
    "type": "function",
    "name": "increment_counter",
    "parameters": {"type": "object", "properties": {}},
    "strict": True,
}
COUNT = {
    "responses_create_params": {"input": [{"role": "user", "content": "Add 1, then 2."}], "tools": [TOOL]},
    "expected_count": 6,
    "initial_count": 3,
}


class Gym:
    """A resources server that counts: seed_session, a route for its tool, verify. Each answer sets the cookie of the session."""

    def __init__(self) -> None:
        self.count = 0

    def answer(self, asked: Asked) -> Any:
        is_new = asked.path == "/seed_session"
        assert asked.cookie == ("" if is_new else f"session={self.count}"), asked.path
        match asked.path, asked.body:
            case "/seed_session", {"initial_count": int(count)}:
                status, value, self.count = 200, {}, count
            case "/increment_counter", {"count": int(count)}:
                status, value, self.count = 200, {"success": True}, self.count + count
            case "/verify", {
                "response": {"output": list()},
                "responses_create_params": dict(),
                "expected_count": count,
            }:
                status, value = 200, {**asked.body, "reward": float(self.count == count)}
            case _:
                status, value = 422, {"detail": "Field required"}
        return status, value, f"session={self.count}; path=/; httponly"


def response(*items: dict[str, Any]) -> dict[str, Any]:
    return {"id": "r", "object": "response", "created_at": 1, "model": "policy", "output": list(items), "tools": []}


def call(arguments: str, name: str = "increment_counter") -> dict[str, Any]:
    return {"type": "function_call", "id": "fc", "call_id": "c1", "name": name, "arguments": arguments}


TEXT = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": []}


def test_a_task_of_nemo_gym(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = in_turn(response(call('{"count": 1}')), response(call('{"count": 2}')), response(TEXT))
    with serving(Gym().answer) as (gym_url, gym), serving(answers) as (url, policy):
        monkeypatch.setenv("NEMO_GYM_URL", f"{gym_url}/")
        assert run("nemo_gym_agent", url, COUNT) == 1.0
    assert [each.path for each in gym] == ["/seed_session", "/increment_counter", "/increment_counter", "/verify"]
    assert gym[0].body == COUNT
    assert {(each.path, each.key) for each in policy} == {("/v1/responses", "Bearer sk-episode")}
    user = COUNT["responses_create_params"]["input"]  # type: ignore[index]
    done = {"type": "function_call_output", "call_id": "c1", "output": '{"success": true}'}
    output = [call('{"count": 1}'), done, call('{"count": 2}'), done, TEXT]
    assert [each.body["input"] for each in policy] == [user, user + output[:2], user + output[:4]]
    assert all(each.body["tools"] == [TOOL] for each in policy)
    assert gym[-1].body == {**COUNT, "response": {**response(), "output": output}}


def test_a_faulty_call_of_nemo_gym_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = in_turn(response(call("{"), call('{"number": 1}'), call("{}", "nothing")), response(TEXT))
    with serving(Gym().answer) as (gym_url, gym), serving(answers) as (url, policy):
        assert run("nemo_gym_agent", url, {**COUNT, "resources_url": gym_url}) == 0.0
    told = [item["output"] for item in policy[1].body["input"] if item.get("type") == "function_call_output"]
    assert "The arguments are not JSON" in told[0] and told[1:] == ['{"detail": "Field required"}'] * 2
    assert [each.path for each in gym] == ["/seed_session", "/increment_counter", "/nothing", "/verify"]


def test_an_answer_that_was_cut_is_judged_as_it_is() -> None:
    cut = {**response(call('{"count": 3}')), "incomplete_details": {"reason": "max_output_tokens"}}
    with serving(Gym().answer) as (gym_url, gym), serving(in_turn(cut)) as (url, _):
        assert run("nemo_gym_agent", url, {**COUNT, "resources_url": gym_url}) == 0.0
    assert [each.path for each in gym] == ["/seed_session", "/verify"]


def test_without_a_session_or_a_server_there_is_no_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEMO_GYM_URL", raising=False)
    with pytest.raises(ValueError, match="set NEMO_GYM_URL, or resources_url in the row"):
        run("nemo_gym_agent", "", COUNT)
    with (
        serving(Gym().answer) as (gym_url, _),
        pytest.raises(RuntimeError, match="seed_session answered with status 422"),
    ):
        run("nemo_gym_agent", "", {"responses_create_params": {}, "resources_url": gym_url})


# ---- packages that are not there ----


@pytest.mark.parametrize(
    ("name", "package", "command"),
    [("openai_agent", "openai", "pip install openai"), ("verifiers_agent", "verifiers", "pip install verifiers")],
)
def test_a_missing_package_is_one_sentence(
    name: str, package: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [found for found in sys.modules if found == name or found.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError) as raised:
        example("agents", name)
    assert str(raised.value).endswith(command) and "\n" not in str(raised.value)
    monkeypatch.delitem(sys.modules, name, raising=False)
