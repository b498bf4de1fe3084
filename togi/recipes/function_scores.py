"""Rewards of generated rows from a user's function, a prompt with all its outputs at a time, as in online RL."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from togi.config.iterate import IterateConfig
from togi.data.row_log import RowLog
from togi.obs.way_out import way_out
from togi.reward.function import FunctionReward
from togi.reward.pool import CallLimits
from togi.sample import FinishReason, Outcome, Prompt, Rollout

Row = dict[str, Any]


def function_scores(config: IterateConfig, rows: Sequence[Row], path: Path) -> list[float | None]:
    """One reward a row, None where the function abstained. What was scored is kept in ``path`` if this is stopped.

    Raises RewardError as ``FunctionReward.score`` does.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    text = "\n".join(f"{row['input']}\0{row['output']}" for row in rows).encode("utf-8", "surrogatepass")
    code = Path(str(config.reward_file)).read_bytes()
    identity = {
        "--reward_func": hashlib.blake2b(code, digest_size=16).hexdigest(),
        "outputs": hashlib.blake2b(text, digest_size=16).hexdigest(),
    }
    with RowLog(path, identity) as log:
        asyncio.run(_score(config, list(groups.values()), log))
        scored = {(row["id"], row["sample"]): row["reward"] for row in log.in_order()}
        log.finish(log.in_order())
    return [scored[row["id"], row["sample"]] for row in rows]


def try_function(config: IterateConfig) -> None:
    """Call the function once for real. Raises RewardError."""
    row = {
        "id": "0:0",
        "sample": 0,
        "input": "A trial question?",
        "output": "A trial answer: 42",
        "finish_reason": "stop",
    }
    asyncio.run(_try(config, [_rollout(row | {"label": "42"}), _rollout(row | {"label": "42", "sample": 1})]))


async def _try(config: IterateConfig, group: Sequence[Rollout]) -> None:
    function = _function(config)
    try:
        await function.check(group)
    finally:
        with way_out("closing the reward"):
            await function.close()


async def _score(config: IterateConfig, groups: Sequence[Sequence[Row]], log: RowLog) -> None:
    function, room = _function(config), asyncio.Semaphore(2 * config.reward_workers)

    async def one(unit: int, group: Sequence[Row]) -> None:
        async with room:
            scores = await function.score([_rollout(row) for row in group])
        rewards = [score.value if score.outcome is Outcome.SCORE else None for score in scores]
        pairs = zip(group, rewards, strict=True)
        log.add(unit, [{"id": row["id"], "sample": row["sample"], "reward": reward} for row, reward in pairs])

    try:
        async with asyncio.TaskGroup() as tasks:
            for unit, group in enumerate(groups):
                if unit not in log.done:
                    tasks.create_task(one(unit, group))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        with way_out("closing the reward"):
            await function.close()


def _function(config: IterateConfig) -> FunctionReward:
    limits = CallLimits(workers=config.reward_workers, timeout=config.reward_timeout)
    return FunctionReward.from_file(str(config.reward_file), limits)


def _rollout(row: Row) -> Rollout:
    """The row as a reward function sees it; there are texts only."""
    text = row["prompt"] if "prompt" in row else row["input"]
    label = row["label"] if "label" in row else ""
    datasource = row["datasource"] if "datasource" in row else "default"
    prompt = Prompt(row["id"], (0,), text, label, datasource)
    return Rollout(prompt, row["id"], (), (), (), row["output"], FinishReason(row["finish_reason"]), 0)
