"""An environment of OpenEnv on a server, such as a container, over its WebSocket (``pip install websockets``).

    togi rl --environment examples/environments/openenv_game.py:Game --prompt_data rows.jsonl --apply_chat_template ...

A row has the URL of the server, and may have a first message and arguments of the environment's own reset:
{"url": "http://localhost:8000", "prompt_text": "Echo what I say.", "options": {"seed": 3}}. Rows:

    python examples/environments/openenv_game.py 1000 http://localhost:8000 "Echo what I say." > rows.jsonl

The model writes an action as a JSON object, whose schema the server tells. Rewards are the environment's own, turn by turn. An
action that is no object, or that does not fit the schema, is answered with what is wrong and gets none.

Of OpenEnv's two interfaces only the WebSocket keeps an environment between two requests; POST /reset and POST /step make one for
each, so nothing could be played there. A server takes as many episodes at once as it has sessions (its max_concurrent_envs).
"""

from __future__ import annotations

import json
import sys
import urllib.request
from contextlib import ExitStack, suppress
from typing import Any

try:
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect
except ModuleNotFoundError:
    raise ModuleNotFoundError("Servers of OpenEnv need the package: pip install websockets") from None

SECONDS = 60.0
LONGEST_MESSAGE = 100 << 20
NO_ACTION = "VALIDATION_ERROR"


class ServerError(RuntimeError):
    """The server refused. ``code``: OpenEnv's word for it."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(f"{data.get('code')}: {data.get('message')}")
        self.code, self.errors = data.get("code"), data.get("errors", ())


class Game:
    """One session of the server."""

    def __init__(self) -> None:
        self._open = ExitStack()

    def reset(self, url: str, prompt_text: str = "", options: dict[str, Any] | None = None, **row: object) -> str:
        """Begin a session, and an episode in it."""
        url = url.rstrip("/")
        with urllib.request.urlopen(f"{url}/schema", timeout=SECONDS) as answer:
            schema = json.load(answer)["action"]
        # A thread of the connection answers pings while the model writes.
        address = f"ws{url.removeprefix('http')}/ws"
        self._socket = self._open.enter_context(connect(address, max_size=LONGEST_MESSAGE, open_timeout=SECONDS))
        self._open.callback(self._say_goodbye)
        first = self._ask({"type": "reset", "data": options or {}})
        return (
            f"{prompt_text}\n\n{text_of(first)}\n\nAnswer with an action: one JSON object and nothing else. "
            f"Its schema is {json.dumps(schema)}"
        ).strip()

    def step(self, action: str) -> tuple[str, float | None, bool]:
        """The whole answer is the action, but for a fence of Markdown around it."""
        text = action.strip()
        if text.startswith("```") and text.endswith("```"):
            text = text[3:-3].removeprefix("json")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return f"That is no action, since it is no JSON ({error}).", None, False
        if not isinstance(value, dict):
            return "That is no action, since it is no JSON object.", None, False
        try:
            observed = self._ask({"type": "step", "data": value})
        except ServerError as error:
            if error.code != NO_ACTION:
                raise
            faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors)
            return f"That is no action. {faults}", None, False
        reward = observed.get("reward")
        return text_of(observed), None if reward is None else float(reward), bool(observed.get("done"))

    def close(self) -> None:
        """End the session."""
        self._open.close()

    def _say_goodbye(self) -> None:
        with suppress(ConnectionClosed):
            self._socket.send(json.dumps({"type": "close"}))

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self._socket.send(json.dumps(message))
        answer = json.loads(self._socket.recv(timeout=SECONDS))
        if answer["type"] == "error":
            raise ServerError(answer["data"])
        data: dict[str, Any] = answer["data"]
        return data


def text_of(observed: dict[str, Any]) -> str:
    """An observation: its only text alone, or else all of it as JSON."""
    found = observed["observation"]
    values = list(found.values())
    return values[0] if len(values) == 1 and isinstance(values[0], str) else json.dumps(found, ensure_ascii=False)


def main(count: str, url: str, prompt_text: str = "") -> None:
    """Print rows that differ in the seed."""
    for seed in range(int(count)):
        print(json.dumps({"url": url, "prompt_text": prompt_text, "options": {"seed": seed}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
