"""Which rollouts of ``togi rl`` are trained on, and what a response that ends badly costs."""

from __future__ import annotations

from togi.config.fields import Count, Settings, flag


class SampleSettings(Settings):
    """Filtering and length penalties"""

    dynamic_filtering: bool = flag(
        False,
        "Train only on groups whose mean reward lies inside --dynamic_filtering_reward_range; each other one is replaced by that "
        "of another prompt, until the rollout is full or the episode ends (DAPO).",
    )
    dynamic_filtering_reward_range: tuple[float, float] = flag(
        (0.0, 1.0), "The open range, of the reward before length penalties: a mean that is one of its ends is outside."
    )
    dynamic_filtering_max_generations: Count = flag(
        20, "Stop the run when a rollout is not full after so many times its number of prompts."
    )
    overlong_buffer_len: Count | None = flag(
        None, "Responses that reach into the last so many tokens of --generate_max_len lose reward, linearly (DAPO)."
    )
    overlong_penalty_factor: float = flag(1.0, "What a response of --generate_max_len tokens loses.", gt=0)
    stop_properly_penalty_coef: float | None = flag(
        None,
        "Reward of a response cut off by the limit: from 0 to 1 it is multiplied by this, below 0 replaced by it (ProRL).",
        le=1,
    )

    @property
    def uses_length_penalties(self) -> bool:
        return self.overlong_buffer_len is not None or self.stop_properly_penalty_coef is not None
