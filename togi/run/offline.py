"""Training on a fixed data set, the same for every method (``togi.methods``). ``train`` is the loop.

One process, or several that a launcher started (``torchrun -m togi.cli.train_sft``); no Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from togi.config.parse import Parsed
from togi.errors import CheckpointError
from togi.learn.checkpoint import Checkpoint
from togi.learn.learner_state import check_rank
from togi.methods.method import Method
from togi.obs.progress import Progress
from togi.parallel.process import World
from togi.recipes.offline_data import Data, check_plan, load_data, uses_flash
from togi.recipes.offline_generation import check_ranks
from togi.recipes.offline_setup import load_models, offload_notice
from togi.run.journal import Journal, open_journal
from togi.run.keep import newest_checkpoint
from togi.run.offline_phases import Evaluation, OfflineRun, identity
from togi.run.plan import EpochPlan
from togi.run.start import NO_CUDA_FOR_LIGER

NOT_SET = "not one that follows a loss"


@dataclass(frozen=True, slots=True)
class Result:
    """The output of a finished run. ``evaluations`` are in the order of training. ``is_first``: whether this rank logs."""

    run_dir: Path
    model: Path
    steps: int
    evaluations: tuple[Evaluation, ...]
    is_first: bool

    @property
    def report(self) -> Path:
        return self.run_dir / "report.html"


@contextmanager
def launched(local_rank: int) -> Iterator[World]:
    """Join the processes that a launcher started. Ranks other than the first log errors only."""
    world = World.from_environment(local_rank)
    if not world.is_first:
        logging.getLogger("togi").setLevel(logging.ERROR)
    yield world
    world.leave()  # not after an error, when others may still wait in a collective


@dataclass(frozen=True, slots=True, eq=False)
class Opening:
    """The state of a run before it loads a model or makes a folder. ``found``: the checkpoint to resume from."""

    data: Data
    plan: EpochPlan
    found: Checkpoint | None


def run(
    world: World,
    parsed: Parsed[Method],
    command: str,
    *,
    argv: Sequence[str],
    announce: Callable[[str], None],
) -> Result:
    """Train with settings from ``start.offline_door``, in a process group that is already set up."""
    config, first = parsed.config, world.is_first
    world = world.in_teams(config.ring_attn_size, config.ds_tensor_parallel_size)
    with Progress(quiet=not first) as progress, ExitStack() as stack:
        # Data, plan and checkpoint first: a user's mistake ends the run before a model is loaded.
        opened = opening(config, command, world, progress, announce if first else silent)
        journal, data, found = Journal(progress), opened.data, opened.found
        if first:
            folder = open_journal(parsed, command, argv, progress, announce, data.reports, found)
            journal = stack.enter_context(folder)
        with progress.phase("loading models", expected_seconds=10):
            models = load_models(config, data, opened.plan, world, journal)
        # From here on the loop owns the models and closes them.
        state = OfflineRun(config, command, opened.plan, models, world, journal)
        stack.callback(state.close)
        evaluations = train(state, found)
    return Result(journal.root, Path(config.save_path), opened.plan.steps, tuple(evaluations), first)


def opening(config: Method, command: str, world: World, progress: Progress, announce: Callable[[str], None]) -> Opening:
    """Everything that comes before the models: notices, rows, the step plan, the checkpoint. Raises UserError."""
    # Notices about flags that this machine or these settings change.
    if config.flash_attn and config.ring_attn_size > 1:
        announce("--flash_attn: ring attention (--ring_attn_size) has kernels of its own, which are used instead")
    elif config.flash_attn and not uses_flash(config, world):
        announce("--flash_attn: there is no CUDA device here, attention runs through SDPA segments instead")
    if config.use_liger_kernel and world.device.type != "cuda":
        announce(NO_CUDA_FOR_LIGER)
    if notice := offload_notice(config, world):
        announce(notice)
    check_ranks(config, world)
    if config.eval_steps > 0 and config.eval_dataset is None:
        announce("--eval_steps: there is no --eval_dataset, so nothing is evaluated")
    # Rows and the number of steps.
    data = load_data(config, world, progress)
    plan = EpochPlan(len(data.train), config.train_batch_size, config.max_epochs, config.seed)
    check_plan(config, plan, data)
    announce(plan.describe())
    return Opening(data, plan, find_checkpoint(config, command, data, world))


def silent(line: str) -> None:
    """The announcement of all ranks but the first: nothing."""


def train(run: OfflineRun, checkpoint: Checkpoint | None) -> list[Evaluation]:
    """The training loop: a batch of rows, one optimizer step, and at intervals an evaluation and a checkpoint.

    ``metrics``: the measurements of each phase of a step.
    """
    evaluations = list[Evaluation]()
    run.resume(checkpoint)
    if run.config.eval_at_start and run.step == 0 and run.data.held_out:
        evaluations.append(run.evaluate())
        run.log(evaluations[-1].values)
    while run.step < run.plan.steps:
        samples, metrics = run.next_samples()
        metrics |= run.update(run.prepare(samples))
        if run.evaluation_is_due:
            evaluations.append(run.evaluate())
            metrics |= evaluations[-1].values
        run.log(metrics)
        run.checkpoint_if_due()
    run.save()
    return evaluations


def find_checkpoint(config: Method, command: str, data: Data, world: World) -> Checkpoint | None:
    """The checkpoint to resume from. Raises CheckpointError if it is of another run or has no resumable state."""
    found = newest_checkpoint(config, world) if config.load_checkpoint else None
    if found is None:
        return None
    check_rank(found.path, config.lora_rank)
    saved, now = found.state["identity"], identity(config, command, data)
    # Other rows or another batch size would train some rows twice and others never.
    if saved != now:
        pairs = {name: (saved.get(name, NOT_SET), now.get(name, NOT_SET)) for name in {**now, **saved}}
        different = "; ".join(f"{name} was {a}, is {b}" for name, (a, b) in pairs.items() if a != b)
        raise CheckpointError(
            f"The checkpoint {found.path} belongs to another run ({different}): resume with the same rows and settings, "
            "or choose another --ckpt_path."
        )
    return found
