"""The environments of examples/ that speak to a server: of tools over MCP, and of OpenEnv over a WebSocket."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.server import ServerConnection, serve

from tests.example_files import example

# ---- MCP ----

SERVER = """
from mcp.server.mcpserver import MCPServer
server = MCPServer("own", log_level="ERROR")
@server.tool({name})
def tool({arguments}) -> str:
    '''A tool.'''
    return "it was called"
server.run("stdio")
"""


@pytest.fixture(scope="module")
def shop() -> Any:
    """The class with the tools of the example's own server. Its import leaves no thread, as episodes are forked after it."""
    before = set(threading.enumerate())
    tools = example("environments", "mcp_tools").Tools
    assert set(threading.enumerate()) <= before
    return tools


@pytest.fixture
def customer(shop: Any) -> Iterator[Any]:
    episode = shop()
    assert episode.reset("What do 3 pens and a book cost?", answer=21, other=1) == "What do 3 pens and a book cost?"
    yield episode
    episode.close()


def test_the_tools_of_a_server_are_methods_with_its_schemas(shop: Any) -> None:
    from pydantic import TypeAdapter

    assert {"price_of", "put", "total", "answer"} <= {name for name in dir(shop) if not name.startswith("_")}
    assert shop.price_of.__doc__ == "Look up the price of an item, in euros."
    item = TypeAdapter(shop.price_of.__annotations__["item"]).json_schema()
    assert item == {"description": "What is sold.", "title": "Item", "type": "string"}
    lines = TypeAdapter(signature(shop.put).parameters["lines"].annotation).json_schema()
    # The server's schema has the line in $defs; here it stands in its place.
    assert lines["items"]["properties"]["count"] == {"default": 1, "minimum": 1, "title": "Count", "type": "integer"}
    assert "$ref" not in json.dumps(lines)
    assert list(signature(shop.total).parameters) == ["self"]


def test_a_question_is_answered_with_the_tools_of_the_server(customer: Any) -> None:
    assert (customer.price_of(item="pen"), customer.price_of(item="book")) == ("2", "15")
    assert customer.put(lines=[{"item": "pen", "count": 3}, {"item": "book"}]) == "There are 2 lines in the cart."
    assert customer.total() == "21" and not customer.done and customer.reward() == 0.0
    customer.answer("21")
    assert (customer.done, customer.reward()) == (True, 1.0)


def test_an_error_of_the_server_is_raised_with_its_words(customer: Any) -> None:
    with pytest.raises(RuntimeError, match=r"There is no house, only pen, book, lamp\."):
        customer.price_of(item="house")
    with pytest.raises(RuntimeError, match="greater than or equal to 1"):
        customer.put(lines=[{"item": "pen", "count": 0}])
    with pytest.raises(TypeError, match="item"):
        customer.price_of()
    assert customer.total() == "0", "the server still works"
    customer.answer("0")
    assert customer.reward() == 0.0


def test_each_episode_has_a_server_of_its_own_that_ends_with_it(shop: Any, customer: Any) -> None:
    customer.put(lines=[{"item": "lamp"}])
    other = shop()
    other.reset("", answer="0")
    assert (other.total(), customer.total()) == ("0", "30")
    other.close()
    other.close()
    shop().close()  # an episode that never began
    assert customer.total() == "30"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("'close'", "", "The server's tool close has a name that an environment needs"),
        (
            "'t'",
            "value: __import__('typing').Annotated[int, __import__('pydantic').Field(alias='a-b')]",
            "The server's tool t has an argument 'a-b', which cannot be one in Python",
        ),
    ],
)
def test_a_tool_that_cannot_be_a_method_is_refused(name: str, arguments: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "server.py"
    path.write_text(SERVER.format(name=name, arguments=arguments))
    with pytest.raises(ValueError, match=message):
        example("environments", "mcp_tools").tools_of([sys.executable, str(path)])


# ---- OpenEnv ----


class Counter:
    """What a session of OpenEnv 0.3 answers, as its http_server and types define it. ``heard``: all messages but close."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.has_ended = threading.Event()

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        self.heard.append(message)
        match message:
            case {"type": "reset", "data": data}:
                self.number = data.get("seed", 0)
                return self.observed(None)
            case {"type": "step", "data": {"number": int(number)}} if number == 99:
                return {"type": "error", "data": {"message": "broken", "code": "EXECUTION_ERROR"}}
            case {"type": "step", "data": {"number": int(number)}}:
                self.number += number
                return self.observed(number)
            case _:
                errors = [{"type": "missing", "loc": ["number"], "msg": "Field required", "input": {}}]
                data = {"message": "Invalid message", "code": "VALIDATION_ERROR", "errors": errors}
                return {"type": "error", "data": data}

    def observed(self, reward: int | None) -> dict[str, Any]:
        data = {"observation": {"text": f"Now {self.number}."}, "reward": reward, "done": self.number >= 5}
        return {"type": "observation", "data": data}


@pytest.fixture
def openenv() -> Iterator[tuple[str, list[Counter]]]:
    """A stand-in on a free port: GET /schema, and a session for each WebSocket at /ws, one at once."""
    sessions: list[Counter] = []

    def schema(connection: ServerConnection, request: Any) -> Any:
        return (
            connection.respond(200, json.dumps({"action": {"type": "object"}})) if request.path == "/schema" else None
        )

    def session(connection: ServerConnection) -> None:
        assert connection.request is not None and connection.request.path == "/ws"
        sessions.append(Counter())
        counter = sessions[-1]
        for text in connection:
            message = json.loads(text)
            if message == {"type": "close"}:
                counter.has_ended.set()
                return
            connection.send(json.dumps(counter.answer(message)))

    with serve(session, "127.0.0.1", 0, process_request=schema) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}", sessions
        server.shutdown()
        thread.join()


def test_an_episode_of_openenv(openenv: tuple[str, list[Counter]]) -> None:
    url, sessions = openenv
    game = example("environments", "openenv_game").Game()
    first = game.reset(f"{url}/", prompt_text="Count to 5.", options={"seed": 2}, other=1)
    assert first.startswith("Count to 5.\n\nNow 2.\n\n") and first.endswith('Its schema is {"type": "object"}')
    assert game.step('{"number": 1}') == ("Now 3.", 1.0, False)
    assert game.step('```json\n{"number": 2}\n```') == ("Now 5.", 2.0, True)
    game.close()
    assert sessions[0].has_ended.wait(30)
    assert sessions[0].heard == [
        {"type": "reset", "data": {"seed": 2}},
        {"type": "step", "data": {"number": 1}},
        {"type": "step", "data": {"number": 2}},
    ]
    game.close()


def test_what_is_no_action_of_openenv_says_why(openenv: tuple[str, list[Counter]]) -> None:
    game = example("environments", "openenv_game").Game()
    game.reset(openenv[0])
    for action, words in (
        ("go", "since it is no JSON (Expecting value"),
        ("[1]", "since it is no JSON object."),
        ('{"nummer": 1}', "That is no action. number: Field required"),
    ):
        text, reward, is_over = game.step(action)
        assert words in text and (reward, is_over) == (None, False)
    assert game.step('{"number": 4}') == ("Now 4.", 4.0, False)
    game.close()


def test_a_failure_of_openenv_is_no_observation(openenv: tuple[str, list[Counter]]) -> None:
    module = example("environments", "openenv_game")
    game = module.Game()
    game.reset(openenv[0])
    with pytest.raises(module.ServerError, match="EXECUTION_ERROR: broken"):
        game.step('{"number": 99}')
    game.close()
    module.Game().close()


def test_an_observation_of_several_values_is_json() -> None:
    text_of = example("environments", "openenv_game").text_of
    assert text_of({"observation": {"text": "é"}}) == "é"
    assert text_of({"observation": {"text": "é", "left": 2}}) == '{"text": "é", "left": 2}'
    assert text_of({"observation": {"left": 2}}) == '{"left": 2}'
