"""Calling a reward as a run does."""

from __future__ import annotations

import asyncio

from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.run.rewards import EarlyRewards
from togi.sample import FinishReason, Prompt, Rollout, Score


def scored(flags: list[str], texts: list[str], label: object, tokens: int = 1) -> list[Score]:
    async def run() -> list[Score]:
        rewards = EarlyRewards(parse(RLConfig, [*flags, "--reward_workers", "1"], "rl").config, None)
        prompt = Prompt("p", (1,), "How many? 99 ", label)
        group = [
            Rollout(
                prompt, "g", (3,) * tokens, (True,) * tokens, (-1.0,) * tokens, text, FinishReason.STOP, (0,) * tokens
            )
            for text in texts
        ]
        scores = await next(iter(rewards.functions.values())).score(group)
        await rewards.close()
        return scores

    return asyncio.run(run())
