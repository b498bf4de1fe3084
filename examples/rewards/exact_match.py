"""The smallest reward: 1 if the response is the label, else 0. Surrounding and repeated white space does not count.

    togi train_ppo_ray --reward_func examples/rewards/exact_match.py --label_key target ...

Asking for ``responses`` by name is enough to be given them; ``queries`` are prompt + response.
"""

from typing import Any


def reward_func(
    queries: list[str], prompts: list[str], labels: list[Any], responses: list[str], **kwargs: Any
) -> list[bool]:
    """One True or False (1 or 0) per query."""
    return [response.split() == str(label).split() for response, label in zip(responses, labels, strict=True)]
