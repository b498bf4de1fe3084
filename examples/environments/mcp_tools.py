"""Tools of a server of the Model Context Protocol, started for each episode and spoken to over stdio (``pip install mcp``).

    MCP_COMMAND="python examples/environments/mcp_shop_server.py" \\
        togi rl --environment examples/environments/mcp_tools.py:Tools --prompt_data rows.jsonl --apply_chat_template ...

A row has a ``question`` and its ``answer``: {"question": "What do 3 pens and a book cost?", "answer": "21"}.

Tools are methods, so they must be known when this file is imported: ``tools_of`` starts the server once, asks what it has, and
makes a method of each tool, with the server's own description and schema. Rows cannot differ in their tools. For a reward
of your own, take the class that it makes as a base, and override ``reset`` and ``reward``.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

try:
    from anyio.from_thread import start_blocking_portal
    from mcp import Client, StdioServerParameters
except ImportError as missing:
    raise ImportError(f"Tools of MCP servers need the package in version 2 ({missing}): pip install 'mcp>=2'") from None
from pydantic import WithJsonSchema

OWN_SERVER = shlex.join([sys.executable, str(Path(__file__).with_name("mcp_shop_server.py"))])
SECONDS = 30.0


class Episode:
    """A question that is answered with the tool ``answer``; what is needed for it is found with the server's tools."""

    done = False
    command: tuple[str, ...]

    def __init__(self) -> None:
        self._open = ExitStack()

    def reset(self, question: str, answer: str, **row: object) -> str:
        """Begin with a row, and with a server of the episode's own."""
        self._right, self._answer = str(answer).strip(), ""
        # The connection lives in a thread with an event loop, so it is served between calls too, and closed where it was opened.
        self._portal = self._open.enter_context(start_blocking_portal())
        self._client = self._open.enter_context(self._portal.wrap_async_context_manager(client_of(self.command)))
        return question

    def answer(self, text: str) -> str:
        """Give the final answer.

        Args:
            text: The answer alone, without explanation.
        """
        self._answer, self.done = text.strip(), True
        return "Thank you."

    def reward(self) -> float:
        """1 if the answer is the right one, letter by letter."""
        return float(self.done and self._answer == self._right)

    def close(self) -> None:
        """End the server."""
        self._open.close()

    def _call(self, name: str, arguments: Mapping[str, object]) -> str:
        result = self._portal.call(self._client.call_tool, name, dict(arguments))
        text = "\n".join(part.text if part.type == "text" else f"[{part.type}]" for part in result.content)
        if result.is_error:
            raise RuntimeError(text)
        return text


def tools_of(command: Sequence[str]) -> type[Episode]:
    """A class with a method for each tool of the server that ``command`` starts."""

    async def tools() -> list[Any]:
        async with client_of(command) as client:
            found, page = [], None
            while True:
                result = await client.list_tools(cursor=page)
                found, page = [*found, *result.tools], result.next_cursor
                if not page:
                    return found

    methods: dict[str, Any] = {"command": tuple(command)}
    for tool in asyncio.run(tools()):
        if hasattr(Episode, tool.name) or tool.name in methods:
            raise ValueError(f"The server's tool {tool.name} has a name that an environment needs: leave it out.")
        methods[tool.name] = method_of(tool.name, tool.description or tool.title or tool.name, tool.input_schema)
    return type("Tools", (Episode,), methods)


def method_of(name: str, description: str, schema: Mapping[str, Any]) -> Callable[..., str]:
    """A method that calls a tool. Its type hints hold the server's schema of each argument, and the server checks what comes."""
    required, definitions = schema.get("required", ()), schema.get("$defs", {})
    parameters = []
    # First those without a default, as Python wants it.
    for key, value in sorted(schema.get("properties", {}).items(), key=lambda item: item[0] not in required):
        if not key.isidentifier():
            raise ValueError(f"The server's tool {name} has an argument {key!r}, which cannot be one in Python.")
        default = inspect.Parameter.empty if key in required else value.get("default")
        hint = Annotated[object, WithJsonSchema(inlined(value, definitions))]
        parameters.append(inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint))
    signature = inspect.Signature(parameters, return_annotation=str)

    def method(self: Episode, **arguments: object) -> str:
        # Only what was given: the server has defaults of its own.
        return self._call(name, signature.bind(**arguments).arguments)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = signature.replace(parameters=[own, *parameters])  # type: ignore[attr-defined]
    method.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": str}
    method.__name__, method.__doc__ = name, description
    return method


def inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """A schema of one argument with the definitions of the whole in their places."""
    if isinstance(schema, list):
        return [inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {**definitions.get(str(schema.get("$ref", "")).rpartition("/")[2], {}), **schema}
    return {key: inlined(value, definitions) for key, value in found.items() if key != "$ref"}


def client_of(command: Sequence[str]) -> Client:
    """A client that starts the server. It has this process's variables, as many servers find their keys there."""
    start = StdioServerParameters(command=command[0], args=list(command[1:]), env=dict(os.environ))
    return Client(start, read_timeout_seconds=SECONDS)


Tools = tools_of(shlex.split(os.environ.get("MCP_COMMAND", OWN_SERVER)))
