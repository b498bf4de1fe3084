"""Training on a fixed data set in one screen, the same for every method (``togi.methods``): see ``train``.

One process, or several that a launcher started (``torchrun -m togi.cli.train_sft``); no Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from togi.config.parse import Parsed
from togi.learn.checkpoint import Checkpoint
from togi.methods.method import Method
from togi.obs.progress import Progress
from togi.obs.report import cause
from togi.obs.run_dir import State
from togi.obs.way_out import way_out
from togi.parallel.process import World
from togi.recipes.notices import NO_CUDA_FOR_LIGER
from togi.recipes.offline_data import Data, check_plan, load_data, uses_flash
from togi.recipes.offline_generation import check_ranks
from togi.recipes.offline_journal import Journal, RunJournal
from togi.recipes.offline_plan import EpochPlan
from togi.recipes.offline_run import Evaluation, OfflineRun
from togi.recipes.offline_setup import find_checkpoint, load_models, offload_notice

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """Where a finished run left what. ``evaluations`` are in the order of training. ``is_first``: of the rank that speaks."""

    run_dir: Path
    model: Path
    steps: int
    evaluations: tuple[Evaluation, ...]
    is_first: bool

    @property
    def report(self) -> Path:
        return self.run_dir / "report.html"


def run(parsed: Parsed[Method], command: str, *, argv: Sequence[str], announce: Callable[[str], None]) -> Result:
    """Train with settings that ``offline_preflight.check`` let through (``offline_start`` calls both)."""
    world = World.from_environment(parsed.config.local_rank)
    if not world.is_first:
        logging.getLogger("togi").setLevel(logging.ERROR)
    result = run_in(world, parsed, command, argv=argv, announce=announce)
    world.leave()
    return result


def run_in(
    world: World,
    parsed: Parsed[Method],
    command: str,
    *,
    argv: Sequence[str],
    announce: Callable[[str], None],
) -> Result:
    """``run`` among processes that have met already."""
    with Progress(quiet=not world.is_first) as progress:
        journal = RunJournal(parsed, command, argv, announce, progress) if world.is_first else Journal(progress)
        return _run(parsed.config, command, world, journal)


@dataclass(frozen=True, slots=True, eq=False)
class Opening:
    """What a run knows before it loads a model or makes a folder. ``found``: the checkpoint it goes on from."""

    data: Data
    plan: EpochPlan
    found: Checkpoint | None


def opening(config: Method, command: str, world: World, journal: Journal) -> Opening:
    """Everything of a run that comes before its models: what is said, its rows, its steps. Raises UserError."""
    if config.flash_attn and config.ring_attn_size > 1:
        journal.announce(
            "--flash_attn: ring attention (--ring_attn_size) has kernels of its own, which are used instead"
        )
    elif config.flash_attn and not uses_flash(config, world):
        journal.announce("--flash_attn: there is no CUDA device here, attention runs through SDPA segments instead")
    if config.use_liger_kernel and world.device.type != "cuda":
        journal.announce(NO_CUDA_FOR_LIGER)
    if notice := offload_notice(config, world):
        journal.announce(notice)
    check_ranks(config, world)
    if config.eval_steps > 0 and config.eval_dataset is None:
        journal.announce("--eval_steps: there is no --eval_dataset, so nothing is evaluated")
    data = load_data(config, world, journal.progress)
    plan = EpochPlan(len(data.train), config.train_batch_size, config.max_epochs, config.seed)
    check_plan(config, plan, data)
    journal.announce(plan.describe())
    return Opening(data, plan, find_checkpoint(config, command, data, world))


def _run(config: Method, command: str, world: World, journal: Journal) -> Result:
    world = world.in_teams(config.ring_attn_size, config.ds_tensor_parallel_size)
    opened = opening(config, command, world, journal)
    data, plan, found = opened.data, opened.plan, opened.found
    journal.open(data.reports, found.step if found is not None else 0, plan.steps)
    try:
        run = start(config, command, data, plan, world, journal)
        try:
            evaluations = train(run, found)
        finally:
            with way_out("ending what runs beside the training"):
                run.close()
    except BaseException as error:
        journal.close(State.FAILED, cause(error))
        raise
    journal.close(State.FINISHED)
    return Result(journal.root, Path(config.save_path), plan.steps, tuple(evaluations), world.is_first)


def train(run: OfflineRun, checkpoint: Checkpoint | None) -> list[Evaluation]:
    """The loop: a batch of rows, one optimizer step, and now and then an evaluation and a checkpoint."""
    evaluations: list[Evaluation] = []
    run.resume(checkpoint)
    if run.config.eval_at_start and run.step == 0:
        evaluations += run.evaluate()
    while run.step < run.plan.steps:
        samples = run.prepare(run.next_samples())
        run.update(samples)
        if run.evaluation_is_due:
            evaluations += run.evaluate()
        run.log()
        run.checkpoint_if_due()
    run.save()
    return evaluations


def start(
    config: Method,
    command: str,
    data: Data,
    plan: EpochPlan,
    world: World,
    journal: Journal,
) -> OfflineRun:
    """Load the models."""
    with journal.progress.phase("loading models", expected_seconds=10):
        models = load_models(config, data, plan, world, journal)
    return OfflineRun(config, command, models.data, plan, models, world, journal)
