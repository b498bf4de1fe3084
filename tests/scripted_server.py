"""A real HTTP server on a free port that answers what a script says, one entry a request; the last entry repeats."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Step = Callable[["Handler"], None]


@dataclass
class Script:
    """What was asked, and the URL to ask at."""

    steps: list[Step]
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    now: int = 0
    most_at_once: int = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: Script
    lock: threading.Lock

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.script.now += 1
            self.script.most_at_once = max(self.script.most_at_once, self.script.now)
            step = self.script.steps[min(len(self.script.bodies), len(self.script.steps) - 1)]
            self.script.bodies.append(body)
            self.script.headers.append(dict(self.headers))
        try:
            step(self)
        finally:
            with self.lock:
                self.script.now -= 1

    def log_message(self, *_: object) -> None:
        """Quiet."""


def says(value: object, status: int = 200) -> Step:
    """Answer with ``value`` as JSON, or as it is when it is a string."""

    def step(handler: Handler) -> None:
        content = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return step


def resets(handler: Handler) -> None:
    """Drop the connection without an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def lengths(handler: Handler) -> None:
    """The right answer: each query's length."""
    says({"rewards": [len(query) for query in handler.script.bodies[-1]["query"]]})(handler)


@contextmanager
def serving(*steps: Step, port: int = 0) -> Iterator[Script]:
    """Serve the script until the end of the block."""
    script = Script(list(steps))
    handler = type("Scripted", (Handler,), {"script": script, "lock": threading.Lock()})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    script.url = f"http://127.0.0.1:{server.server_address[1]}/get_reward"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
