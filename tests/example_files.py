"""The examples of environments and agents as modules, and what they talk to: servers that answer what a script says."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType
from typing import Any

from tests.source import ROOT

EXAMPLES = ROOT / "examples"


def example(folder: str, name: str) -> ModuleType:
    """An example imported as Togi imports it: the folder it is in comes first on the path."""
    path = str(EXAMPLES / folder)
    if path not in sys.path:
        sys.path.insert(0, path)
    return importlib.import_module(name)


class Asked:
    """A request that came. ``cookie``: what the client sent as Cookie."""

    def __init__(self, path: str, body: Any, headers: Any) -> None:
        self.path, self.body = path, body
        self.key, self.cookie = headers.get("Authorization", ""), headers.get("Cookie", "")


@contextmanager
def serving(answer: Callable[[Asked], Any]) -> Iterator[tuple[str, list[Asked]]]:
    """A server on a free port, and what it was asked. ``answer`` gives JSON, or a status, JSON and a cookie."""
    asked: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(Asked(self.path, body, self.headers))
            found = answer(asked[-1])
            status, value, cookie = found if isinstance(found, tuple) else (200, found, "")
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if cookie:
                self.send_header("Set-Cookie", cookie)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(content: str | None, *calls: tuple[str, str]) -> dict[str, Any]:
    """An answer of the chat interface. ``calls``: names and arguments as text; their ids are call0, call1, ..."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {"id": f"call{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for number, (name, arguments) in enumerate(calls)
        ]
    choice = {"index": 0, "finish_reason": "tool_calls" if calls else "stop", "message": message}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "policy",
        "choices": [choice],
        "usage": usage,
    }


def in_turn(*answers: Any) -> Callable[[Asked], Any]:
    """Each answer once, in this order."""
    left = list(answers)
    return lambda _: left.pop(0)
