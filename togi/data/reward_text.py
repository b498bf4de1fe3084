"""The reward text of conditional SFT. One function writes it, for training and for generation.

``togi.run.select`` chooses the reward; ``prompts`` formats prompts.
"""

from __future__ import annotations

import math
import re

from togi.errors import DataError

DECIMALS = 2


def with_reward(template: str, prompt: str, reward: float) -> str:
    """``template`` with {input} replaced by the prompt and {reward} by the reward with two decimals.

    Both are replaced at once, so braces in the prompt stay. Minus zero is written as zero.
    """
    assert math.isfinite(reward)
    shown = f"{reward:.{DECIMALS}f}"
    texts = {"{input}": prompt, "{reward}": shown.removeprefix("-") if float(shown) == 0 else shown}
    return re.sub(r"{input}|{reward}", lambda found: texts[found.group()], template)


def asked_reward(csft_prompt: str, template: str) -> float:
    """The reward in ``--csft_prompt``: a number alone, or a number in the words of the template.

    Raises DataError for other words, because the model was not trained on them.
    """
    words = re.escape(template.replace("{input}", "").strip()).replace(re.escape("{reward}"), "(?P<reward>.+?)")
    found = re.fullmatch(words, csft_prompt.strip())
    text = found["reward"] if found else csft_prompt
    try:
        reward = float(text)
    except ValueError:
        reward = math.nan
    if not math.isfinite(reward):
        raise DataError(
            f"--csft_prompt {csft_prompt!r} does not fit --reward_template {template!r}: give a number, or the template's "
            "words with a number in the place of {reward}."
        )
    return reward
