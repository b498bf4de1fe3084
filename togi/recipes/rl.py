"""Online RL in one screen: generate, score, advantages, update, sync, log. See ``train`` for the order of things."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from togi.config.parse import Parsed
from togi.config.rl import RLConfig
from togi.learn.checkpoint import Checkpoint
from togi.obs.progress import Progress
from togi.obs.report import cause, end_run
from togi.obs.run_dir import RunDirectory, State
from togi.obs.way_out import way_out
from togi.plan.machine import this_machine
from togi.plan.placement import Role
from togi.recipes.event_loop import run_to_end
from togi.recipes.rl_rewards import connect, describe
from togi.recipes.rl_run import Run
from togi.recipes.rl_setup import Opening, open_run, opening
from togi.workers import start as workers
from togi.workers.worker_group import StepUpdate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean reward on the held-out prompts after ``step`` rollouts, with the standard error over prompts."""

    step: int
    reward: float
    stderr: float


@dataclass(frozen=True, slots=True)
class Result:
    """Where a finished run left what. ``evaluations`` are in the order of training."""

    run_dir: Path
    report: Path
    model: Path
    rollouts: int
    evaluations: tuple[Evaluation, ...]


def run(
    parsed: Parsed[RLConfig],
    *,
    argv: Sequence[str] = (),
    reward: Callable[..., Any] | None = None,
    announce: Callable[[str], None] = logger.info,
) -> Result:
    """Train with settings that ``preflight.check`` let through (``start`` calls both).

    ``reward`` replaces ``--reward_func`` by a Python function. Raises UserError for what only a tokenizer, a call of the
    reward function or a loaded model can tell.
    """
    with Progress() as progress:
        return run_to_end(_run(parsed, argv, reward, progress, announce))


async def _run(
    parsed: Parsed[RLConfig],
    argv: Sequence[str],
    reward: Callable[..., Any] | None,
    progress: Progress,
    announce: Callable[[str], None],
) -> Result:
    config = parsed.config
    opened = await opening(config, reward, progress, announce)
    try:
        directory = open_run(parsed, argv, opened.material)
        try:
            result = await _with_session(config, opened, directory, progress, announce)
        except BaseException as error:
            end_run(directory, State.FAILED, cause(error))
            raise
        end_run(directory, State.FINISHED)
        return result
    finally:
        with way_out("closing the rewards"):
            await opened.material.rewards.close()


async def _with_session(
    config: RLConfig,
    opened: Opening,
    directory: RunDirectory,
    progress: Progress,
    announce: Callable[[str], None],
) -> Result:
    material, plan = opened.material, opened.plan
    with progress.phase("starting engines and loading models", expected_seconds=25):
        updates = {Role.ACTOR: plan.actor_updates, Role.CRITIC: plan.updates}
        session = await workers.start(config, this_machine(), updates, announce)
    try:
        reward = await connect(config, material.rewards, session)
        if line := describe(config, reward):
            announce(f"reward: {line}")
        with Run(config, material, reward, plan, session, directory, progress) as run_state:
            evaluations = await train(run_state, opened.checkpoint)
        await session.close()
    except BaseException:
        with way_out("ending the workers"):
            session.abandon()
        raise
    return Result(directory.root, directory.report_path, Path(config.save_path), run_state.step, tuple(evaluations))


async def train(run: Run, checkpoint: Checkpoint | None) -> list[Evaluation]:
    """The RL loop, synchronous: every rollout is made by the weights that learn from it."""
    config, evaluations = run.config, list[Evaluation]()
    await run.resume(checkpoint)
    await run.sync()
    if config.eval_at_start and run.step == 0:
        evaluations.append(Evaluation(0, *await run.evaluate()))
    while not run.is_done:
        groups = await run.generate()
        items, samples = await run.score(groups)
        updates: list[StepUpdate] = []
        if items:
            samples = run.with_advantages(items, samples)
            if Role.CRITIC in run.session.learners:
                await run.update(Role.CRITIC, samples)
            if not run.actor_is_frozen:
                updates = await run.update(Role.ACTOR, samples)
        run.step += 1
        await run.sync()
        if run.evaluation_is_due:
            evaluations.append(Evaluation(run.step, *await run.evaluate()))
        await run.log(groups, items, samples, updates)
        await run.checkpoint_if_due()
    await run.save()
    return evaluations
