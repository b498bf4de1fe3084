"""Contradictions in filtering, penalties, freezing and averaging of ``togi rl``. Part of ``checks``, which calls it."""

from __future__ import annotations

from collections.abc import Iterator

from togi.config.rl import RLConfig
from togi.config.samples import PretrainMixSettings


def sample_problems(c: RLConfig) -> Iterator[str]:
    """Faults of filtering, length penalties, freezing and averaging."""
    if c.freezing_actor_steps > 0 and not c.uses_critic:
        yield (
            f"--freezing_actor_steps {c.freezing_actor_steps} is a warm-up of the critic but --advantage_estimator "
            f"{c.advantage_estimator} has none: use gae, or leave it out."
        )
    low, high = c.dynamic_filtering_reward_range
    if not low < high:
        yield f"--dynamic_filtering_reward_range {low:g} {high:g}: the first number must be below the second."
    if c.dynamic_filtering and c.n_samples_per_prompt < 2:
        yield "--dynamic_filtering judges the responses to one prompt together: set --n_samples_per_prompt to 2 or more."
    # Flags of a feature that is off.
    if not c.dynamic_filtering:
        yield from _without(
            c, "--dynamic_filtering", "dynamic_filtering_reward_range", "dynamic_filtering_max_generations"
        )
    if not c.enable_ema:
        yield from _without(c, "--enable_ema", "ema_beta")
    yield from _pretrain_problems(c)
    if c.overlong_buffer_len is None:
        yield from _without(c, "--overlong_buffer_len", "overlong_penalty_factor")
    elif c.overlong_buffer_len > c.generate_max_len:
        yield (
            f"--overlong_buffer_len {c.overlong_buffer_len} is more than --generate_max_len {c.generate_max_len}, of which it is "
            "the last part: lower it."
        )


def _pretrain_problems(c: RLConfig) -> Iterator[str]:
    if c.pretrain_data is None:
        yield from _without(
            c, "--pretrain_data", *(n for n in PretrainMixSettings.model_fields if n != "pretrain_data")
        )
    if c.pretrain_max_len is not None and c.pretrain_max_len > c.max_tokens_per_gpu:
        yield (
            f"--pretrain_max_len {c.pretrain_max_len} is more than --max_tokens_per_gpu {c.max_tokens_per_gpu}: raise the second "
            "or lower the first."
        )


def _without(c: RLConfig, needed: str, *names: str) -> Iterator[str]:
    """The first of ``names`` that was changed although the setting that reads it, ``needed``, is not set."""
    for name in c.changed(*names):
        yield f"--{name} has no effect without {needed}: add it, or leave the first out."
