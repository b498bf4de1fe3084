"""Tasks of NeMo Gym: a resources server has the tools and the reward, the policy is asked over the Responses interface.

    togi rl --agent examples/agents/nemo_gym_agent.py:run --prompt_data rows.jsonl --apply_chat_template ...

A row is one of NeMo Gym's own data files as it is, with ``responses_create_params`` (input and tools) and whatever else its server
wants; the server's URL is in NEMO_GYM_URL, or in the row's ``resources_url``. An agent and no environment class, for two reasons:
each row has tools of its own, and the server judges the whole of what the model wrote. The standard library does for it.

What is asked of the server, as its own agents do: POST /seed_session with the row, POST /TOOL with the arguments of each call,
POST /verify with the row and the ``response``, all with the cookies of the answer before, which are the session.
"""

from __future__ import annotations

import asyncio
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.cookiejar import CookieJar
from typing import Any

TURNS = 16
SECONDS = 600.0


async def run(base_url: str, task: Mapping[str, Any]) -> float:
    """One episode: the reward of the server."""
    server = Server(str(task.get("resources_url") or os.environ.get("NEMO_GYM_URL", "")))
    params = dict(task["responses_create_params"])
    await server.checked("seed_session", task)
    given = params["input"]
    conversation = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
    said: list[Any] = []
    for _ in range(TURNS):
        body = {"model": "policy"} | params | {"input": [*conversation, *said]}
        response = await asked_policy(base_url, body)
        said += response["output"]
        calls = [item for item in response["output"] if item["type"] == "function_call"]
        if not calls or response.get("incomplete_details"):
            break
        for call in calls:
            said.append(
                {"type": "function_call_output", "call_id": call["call_id"], "output": await result(server, call)}
            )
    judged = await server.checked("verify", {**task, "response": {**response, "output": said}})
    return float(judged["reward"])


async def result(server: Server, call: Mapping[str, Any]) -> str:
    """What a tool says. An error of it is for the model too."""
    try:
        arguments = json.loads(call["arguments"])
    except ValueError as error:
        return json.dumps({"error": f"The arguments are not JSON: {error}"})
    return (await server.post(call["name"], arguments))[1]


class Server:
    """A resources server, with the cookies of one session."""

    def __init__(self, url: str) -> None:
        if not url:
            raise ValueError("No server of NeMo Gym is named: set NEMO_GYM_URL, or resources_url in the row.")
        self._url = url.rstrip("/")
        self._open = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))

    async def post(self, path: str, body: object) -> tuple[int, str]:
        """Status and text of an answer."""
        return await asyncio.to_thread(posted, self._open, f"{self._url}/{path}", body, {})

    async def checked(self, path: str, body: object) -> dict[str, Any]:
        """The JSON of an answer. Raises RuntimeError, as the episode cannot go on without it."""
        return parsed(*await self.post(path, body), f"{self._url}/{path}")


async def asked_policy(base_url: str, body: object) -> dict[str, Any]:
    """An answer of the policy, whose key is in OPENAI_API_KEY."""
    url, key = f"{base_url.rstrip('/')}/responses", os.environ.get("OPENAI_API_KEY", "")
    opener = urllib.request.build_opener()
    return parsed(*await asyncio.to_thread(posted, opener, url, body, {"Authorization": f"Bearer {key}"}), url)


def posted(opener: urllib.request.OpenerDirector, url: str, body: object, headers: dict[str, str]) -> tuple[int, str]:
    request = urllib.request.Request(url, json.dumps(body).encode(), headers | {"Content-Type": "application/json"})
    try:
        with opener.open(request, timeout=SECONDS) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(errors="replace")


def parsed(status: int, text: str, url: str) -> dict[str, Any]:
    if status != 200:
        raise RuntimeError(f"{url} answered with status {status}: {text[:500]}")
    found: dict[str, Any] = json.loads(text)
    return found
