"""Online RL in one screen: generate, score, advantages, update, sync, log. See ``train`` for the order of things."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from togi.config.parse import Parsed
from togi.config.rl import RLConfig
from togi.learn.checkpoint import Checkpoint
from togi.obs.progress import Progress
from togi.obs.way_out import way_out
from togi.plan.machine import this_machine
from togi.plan.placement import Role
from togi.run.journal import Journal, open_journal
from togi.run.plan import StepPlan
from togi.run.rl_phases import Evaluation, RLRun, probe_of
from togi.run.rl_rewards import connect, describe
from togi.run.rl_setup import COMMAND, opening
from togi.workers.session import Session
from togi.workers.start import start
from togi.workers.worker_group import StepUpdate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """Where a finished run left what. ``evaluations`` are in the order of training."""

    run_dir: Path
    report: Path
    model: Path
    rollouts: int
    evaluations: tuple[Evaluation, ...]


async def run(
    parsed: Parsed[RLConfig],
    *,
    argv: Sequence[str] = (),
    reward: Callable[..., Any] | None = None,
    announce: Callable[[str], None] = logger.info,
) -> Result:
    """Train with settings that came through ``start.rl_door``.

    ``reward`` replaces ``--reward_func`` by a Python function. Raises UserError for what only a tokenizer, a call of the
    reward function or a loaded model can tell.
    """
    config = parsed.config
    with Progress() as progress:
        async with opening(config, reward, progress, announce) as opened:
            material, found = opened.material, opened.checkpoint
            with open_journal(parsed, COMMAND, argv, progress, announce, material.reports, found) as journal:
                async with workers(config, opened.plan, journal) as session:
                    combined = await connect(config, material.rewards, session)
                    if line := describe(config, combined):
                        announce(f"reward: {line}")
                    state = RLRun(config, material, combined, opened.plan, session, journal)
                    evaluations = await train(state, found)
    return Result(journal.root, journal.root / "report.html", Path(config.save_path), state.step, tuple(evaluations))


@asynccontextmanager
async def workers(config: RLConfig, plan: StepPlan, journal: Journal) -> AsyncIterator[Session]:
    """All engines and models of a run, which end with the block: in an orderly way, or at once after an error."""
    with journal.progress.phase("starting engines and loading models", expected_seconds=25):
        updates = {Role.ACTOR: plan.actor_updates, Role.CRITIC: plan.updates}
        session = await start(config, this_machine(), updates, journal.announce)
    try:
        yield session
        await session.close()
    except BaseException:
        with way_out("ending the workers"):
            session.abandon()
        raise


async def train(run: RLRun, checkpoint: Checkpoint | None) -> list[Evaluation]:
    """The RL loop, synchronous: every rollout is made by the weights that learn from it.

    ``metrics``: what each phase of a step has measured.
    """
    config, evaluations = run.config, list[Evaluation]()
    await run.resume(checkpoint)
    await run.sync(run.first_probe)
    if config.eval_at_start and run.step == 0:
        evaluations.append(await run.evaluate())
        run.journal.write(0, evaluations[-1].metrics)
    while not run.is_done:
        episode = run.episode
        groups, metrics = await run.generate()
        items, samples, scored = await run.score(groups)
        metrics |= scored
        updates: list[StepUpdate] = []
        if items:
            samples = run.with_advantages(items, samples)
            if Role.CRITIC in run.session.learners:
                metrics |= (await run.update(Role.CRITIC, samples))[1]
            if not run.actor_is_frozen:
                updates, updated = await run.update(Role.ACTOR, samples)
                metrics |= updated
        run.step += 1
        metrics |= await run.sync(probe_of(groups))
        if run.evaluation_is_due(episode):
            evaluations.append(await run.evaluate())
            metrics |= evaluations[-1].metrics
        await run.log(groups, items, samples, updates, metrics)
        await run.checkpoint_if_due()
    await run.save()
    return evaluations
