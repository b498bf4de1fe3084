"""Environments of ``verifiers`` as they are: a row names a task, and the episode is a rollout of it (``pip install verifiers``).

    togi rl --agent examples/agents/verifiers_agent.py:run --prompt_data rows.jsonl --apply_chat_template ...

A row: {"environment": "verifiers_words", "index": 2}, and may name a ``harness``, the program that talks to the model; without, it
is the environment's own, or verifiers' bash. Rows of all tasks of an environment:

    python examples/agents/verifiers_agent.py verifiers_words > rows.jsonl

Harnesses run here as processes of this machine (runtime "subprocess"), not in verifiers' cloud. The environments must be
installed, or lie beside this file. verifiers needs other versions of openai and mcp than vLLM: give it a virtual environment of
its own. Its training client is not used, as Togi records the tokens itself: the model is asked as in an evaluation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

try:
    import verifiers.v1 as vf
    from verifiers.v1.utils.loaders import load_environment
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"Environments of verifiers need the package ({missing}): pip install verifiers"
    ) from None


async def run(base_url: str, task: Mapping[str, Any]) -> dict[str, float]:
    """One rollout: its rewards by name, weighted as the environment wants them, and their sum. The key is in OPENAI_API_KEY."""
    environment = loaded(task["environment"], task.get("harness", ""))
    chosen = tasks_of(environment)[task["index"]]
    client = vf.EvalClientConfig(base_url=base_url, api_key_var="OPENAI_API_KEY")
    async with environment.serving():
        episode = await environment.run_episode(chosen, vf.ModelContext(model="policy", client=client))
    if not episode.ok:
        # A failure is no reward of 0: Togi counts it, and leaves the episode out.
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        why = errors[-1].message if errors else "no error was recorded"
        raise RuntimeError(f"The rollout of {task['environment']}, task {task['index']}, failed: {why}")
    (trace,) = episode.traces
    parts = {name: reward.value for name, reward in trace.rewards.items() if reward is not None}
    return parts | {"reward": trace.reward}


def loaded(name: str, harness: str) -> Any:
    """The environment, new for each rollout: it holds what serves one."""
    agent: dict[str, Any] = {"runtime": {"type": "subprocess"}}
    if harness:
        agent["harness"] = {"id": harness}
    return load_environment(vf.SingleAgentEnvConfig.model_validate({"taskset": {"id": name}, "agent": agent}))


@cache
def known_tasks(name: str) -> tuple[Any, ...]:
    """All tasks of an environment, read once."""
    return tuple(loaded(name, "").taskset)


def tasks_of(environment: Any) -> tuple[Any, ...]:
    """The tasks of an environment."""
    return known_tasks(environment.config.taskset.id)


def main(name: str) -> None:
    """Print a row for each task."""
    for index in range(len(known_tasks(name))):
        print(json.dumps({"environment": name, "index": index}))


if __name__ == "__main__":
    main(*sys.argv[1:])
