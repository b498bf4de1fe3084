"""A penalty for long responses, as an example of an async function and of returning a dict.

    togi rl --reward_func examples/rewards/length_penalty.py ...

Free up to FREE_WORDS words, then falling linearly to -1 at MAX_WORDS and beyond. A response that was cut off
(finish reason "length") gets -1 however long it is. Use it together with a reward for the content.

An async function may wait for slow things at the same time: replace ``penalty`` by a request to a judge of your own
and the whole group is judged at once. What it returns under "extra_logs" is logged by name.
"""

import asyncio
from typing import Any

FREE_WORDS = 100
MAX_WORDS = 200


async def reward_func(
    queries: list[str],
    prompts: list[str],
    labels: list[Any],
    responses: list[str],
    finish_reasons: list[str],
    **kwargs: Any,
) -> dict[str, Any]:
    """The penalties in [-1, 0], with the words per response and the share of responses that were cut off."""
    penalties = await asyncio.gather(*map(penalty, responses, finish_reasons))
    cut_off = [reason == "length" for reason in finish_reasons]
    return {
        "rewards": penalties,
        "extra_logs": {
            "words": [len(response.split()) for response in responses],
            "cut_off": sum(cut_off) / len(cut_off),
        },
    }


async def penalty(response: str, finish_reason: str) -> float:
    """0 for a short response, -1 for one that is too long or was cut off."""
    if finish_reason == "length":
        return -1.0
    over = len(response.split()) - FREE_WORDS
    return -min(1.0, max(0.0, over / (MAX_WORDS - FREE_WORDS)))
