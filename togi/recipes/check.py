"""``togi check``: what a run does before its first step, by the run's own code. Loads no weights and makes no folder.

Imports no torch, so that a mistake is told in a moment.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from togi.config.parse import Parsed
from togi.config.rl import RLConfig
from togi.methods.method import Method
from togi.recipes import offline_start, start

Say = Callable[[str], None]


def check_rl(parsed: Parsed[RLConfig], *, sample_groups: int, say: Say) -> None:
    """Check ``togi rl``; with ``sample_groups`` also whether it would learn. Raises UserError."""
    ready = start.opening(parsed, reward_given=False, announce=say)
    from togi.recipes.check_run import look_at_rl

    look_at_rl(ready, sample_groups, say)


def check_offline(parsed: Parsed[Method], command: str, *, say: Say) -> None:
    """Check a command on fixed data. Raises UserError."""
    config, launched = parsed.config, "WORLD_SIZE" in os.environ
    ready = offline_start.opening(parsed, announce=say, launched=launched)
    if not launched and (team := config.ring_attn_size * config.ds_tensor_parallel_size) > 1:
        say(f"processes: the run needs a multiple of {team}, started with torchrun --nproc_per_node {team}")
    from togi.recipes.check_run import look_at_offline

    look_at_offline(ready, command, say)
