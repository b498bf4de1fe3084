"""Start the workers of a run, in this process or under Ray (--workers). Only the chosen module is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from togi.config.choices import WorkersKind
from togi.config.rl import RLConfig
from togi.plan.machine import Machine
from togi.plan.placement import Role
from togi.workers.session import Session


async def start(
    config: RLConfig, machine: Machine, updates: Mapping[Role, int], announce: Callable[[str], None], step: int = 0
) -> Session:
    """Start and load every model and engine. ``config`` is resolved. ``updates``: planned optimizer steps of each learner.
    ``step``: the rollouts that a resumed run has already.
    """
    if config.workers is WorkersKind.LOCAL:
        from togi.workers import local

        return await local.start(config, machine, updates, announce, step)
    from togi.workers.ray import start as start_under_ray

    return await start_under_ray(config, machine, updates, announce, step)
