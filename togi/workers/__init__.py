"""Start the workers of a run, in this process or under Ray (--workers). Only the chosen module is imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from togi.config.choices import WorkersKind
from togi.config.rl import RLConfig
from togi.plan.machine import Machine
from togi.plan.placement import Role
from togi.workers.protocol import Health
from togi.workers.session import Session


async def start(
    config: RLConfig,
    machine: Machine,
    updates: Mapping[Role, int],
    announce: Callable[[str], None],
    health: Health | None = None,
) -> Session:
    """Start and load every model and engine. ``config`` is resolved. ``updates``: planned optimizer steps of each learner.

    ``health``: of the run, over all its attempts; None: nothing is restarted.
    """
    health = health or Health(0, announce)
    if config.workers is WorkersKind.LOCAL:
        from togi.workers import local

        return await local.start(config, machine, updates, health)
    # Read when Ray is imported: its own screen about a dead process, which a run says in a line.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
    from togi.workers.ray import start as start_under_ray

    return await start_under_ray(config, machine, updates, health)
