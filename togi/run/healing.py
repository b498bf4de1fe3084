"""The workers of an RL run, and what happens if they die or hang, or it is told to stop: a restart, stacks, a last checkpoint."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from togi.config.parse import Parsed
from togi.config.rl import RLConfig
from togi.data.prompts import LoaderState
from togi.errors import RunError, UserError, WorkerDied, WorkerError
from togi.learn.checkpoint import Checkpoint
from togi.obs.metrics import read_records
from togi.obs.progress import Progress
from togi.obs.run_dir import RunDirectory
from togi.obs.way_out import way_out
from togi.plan.machine import this_machine
from togi.plan.placement import Role
from togi.run.journal import RunJournal
from togi.run.plan import StepPlan
from togi.run.rl_setup import Material, find_checkpoint
from togi.workers import start
from togi.workers.protocol import Health
from togi.workers.session import Session

logger = logging.getLogger(__name__)
LOOKS = 20
"""How often a stall is looked for in the time that makes it one."""


def again(
    parsed: Parsed[RLConfig],
    journal: RunJournal,
    material: Material,
    start: tuple[Checkpoint | None, LoaderState],
    died: WorkerDied,
    health: Health,
) -> tuple[Parsed[RLConfig], Checkpoint | None]:
    """How a run goes on after a death that ended its workers: settings and checkpoint of its next attempt, in the same folder.

    ``start``: the checkpoint and the loader's position that the run began with, which is where it goes on if it has trained
    nothing yet. Raises ``died`` if it cannot go on or was restarted too often.
    """
    try:
        changed = parsed.config.model_copy(update={"load_checkpoint": True, "run_dir": str(journal.root)})
        found, position = start
        if changed.save_steps > 0 and not changed.disable_ds_ckpt:
            found = find_checkpoint(changed, material, journal.progress) or found
        records = read_records(RunDirectory(journal.root).metrics_path)
        if found is start[0]:
            material.loader.load_state(position)
            if records and records[-1].step > (found.step if found is not None else 0):
                raise died
        health.allow(died, "the run" if found is None else f"the run, from its checkpoint of step {found.step},")
        return replace(parsed, config=changed), found
    except WorkerDied:
        journal.progress.say(journal.advice)
        raise


@asynccontextmanager
async def workers(config: RLConfig, plan: StepPlan, journal: RunJournal, health: Health) -> AsyncIterator[Session]:
    """Start all engines and models of a run. They stop with the block: in order, or at once after an error."""
    with journal.progress.phase("starting engines and loading models", expected_seconds=25):
        updates = {Role.ACTOR: plan.actor_updates, Role.CRITIC: plan.updates}
        health.stacks = journal.root.resolve() / "stacks"
        session = await start(config, this_machine(), updates, journal.announce, health)
    try:
        async with watched(session, journal.progress, config.stall_timeout):
            journal.record_engine(await session.engine_facts())
            yield session
        await session.close()
    except BaseException as error:
        # Those that computed with a worker that died may have failed first.
        is_consequence = isinstance(error, WorkerError) and not isinstance(error, WorkerDied)
        died = await session.processes.find_dead() if is_consequence else None
        with way_out("ending the workers"):
            session.abandon()
        if died is not None:
            raise died from error
        raise


@asynccontextmanager
async def leaving_a_checkpoint(
    write: Callable[[], Awaitable[None]], finishing: Callable[[], bool]
) -> AsyncIterator[None]:
    """Let Ctrl-C, SIGTERM and what the user can mend (a failed reward, a server that stays away) end the block after ``write``.

    It writes a checkpoint if one is possible. Between the beginning of an update and the end of its step none is, and an
    asynchronous run is nearly always there: the block may be ``finishing`` its step, and then cancels itself. A second signal
    ends it at once.
    """
    task, loop, told = asyncio.current_task(), asyncio.get_running_loop(), list[signal.Signals]()
    assert task is not None
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    on_main = threading.current_thread() is threading.main_thread()
    ours = [number for number, handler in before.items() if on_main and handler is not signal.SIG_IGN]

    def restore() -> None:
        for number in ours:
            if loop.remove_signal_handler(number):
                signal.signal(number, before[number])

    def leave(number: signal.Signals) -> None:
        is_first = not told
        told.append(number)
        if not (is_first and finishing()):
            restore()
            task.cancel()

    for number in ours:
        loop.add_signal_handler(number, leave, number)
    try:
        yield
    except (asyncio.CancelledError, UserError):
        with way_out("writing a last checkpoint"):
            await write()
        if told and told[-1] == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM) from None
        if told:
            raise KeyboardInterrupt from None
        raise
    finally:
        restore()


@asynccontextmanager
async def watched(session: Session, progress: Progress, seconds: float) -> AsyncIterator[None]:
    """End the block with a RunError if workers are asked and none has answered for ``seconds``.

    Before that, the stacks of all processes and tasks are in the folder ``Health.stacks``.
    """
    loop, waiting = asyncio.get_running_loop(), list[str]()

    async def watch(limit: asyncio.Timeout) -> None:
        while session.health.stalled_for() < seconds:
            await asyncio.sleep(seconds / LOOKS)
        waiting.extend([*session.health.waiting(), f"the run is {progress.describe()}"])
        with way_out("writing the stacks"):
            await write_stacks(session, waiting)
        session.health.has_stalled = True
        limit.reschedule(loop.time())

    watching: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(None) as limit:
            watching = asyncio.create_task(watch(limit))
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        error = RunError(
            f"The run has stalled: {waiting[0]}. The stacks of all processes are in {session.health.stacks}. Raise "
            f"--stall_timeout {seconds:g} if a call may take longer."
        )
        error.lines = tuple(waiting)
        raise error from None
    finally:
        if watching is not None:
            watching.cancel()


async def write_stacks(session: Session, waiting: list[str]) -> None:
    """Write into ``Health.stacks`` the stacks of each worker, of this process and its tasks, and whom the run waits for."""
    folder = session.health.stacks
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "waiting.txt").write_text("\n".join(waiting) + "\n", encoding="utf-8")
    await session.processes.write_stacks()
    with (folder / "driver.txt").open("a", encoding="utf-8") as file:
        faulthandler.dump_traceback(file)
        for task in asyncio.all_tasks():
            task.print_stack(file=file)
