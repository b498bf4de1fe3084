"""Which models a run keeps on disk: resumable checkpoints and the best model by evaluation, and how it finds them again.

All ranks call together and the first one writes; the driver of RL is a world of one rank. The training loop writes the files.

The bytes that a run will write, compared with the free disk space before it starts.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from togi.config.rl import RLConfig
from togi.config.shared import NO_METRIC, ModelSettings, OutputSettings
from togi.errors import CheckpointError
from togi.learn import checkpoint as checkpoints
from togi.learn.checkpoint import size
from togi.learn.learner import Divergence
from togi.methods.method import Method
from togi.model.checkpoint import FLOAT32, Sizes, sizes
from togi.parallel.process import World
from togi.run.journal import Journal
from togi.run.preflight import existing


@dataclass(frozen=True, slots=True)
class Writing:
    """Bytes that a run writes. ``state``, ``model``: parts of one checkpoint, 0 for a part that it does not have.

    ``kept``: the largest number of checkpoints at a time, including the one being written. ``best``, ``final``: the folders of the
    best model and of the final models.
    """

    state: int
    model: int
    kept: int
    best: int
    final: int

    @property
    def checkpoint(self) -> int:
        return self.state + self.model

    def describe(self) -> str:
        """The sum in one line."""
        parts = []
        if self.kept > 0:
            inside = [f"{size(self.state)} masters and moments"] * (self.state > 0)
            inside += [f"{size(self.model)} model"] * (self.model > 0)
            parts.append(f"{self.kept} x {size(self.checkpoint)} checkpoints ({' + '.join(inside)})")
        if self.best > 0:
            parts.append(f"{size(self.best)} best model")
        return " + ".join([*parts, f"{size(self.final)} final model"])


def rl_writing(config: RLConfig, rollouts: int, of: Callable[[str, bool], Sizes]) -> Writing:
    """The bytes that ``togi rl`` writes. ``of``: the sizes of a model folder as a language model or with a scalar head."""
    actor = of(config.pretrain, False)
    model = actor.folder_bytes(bf16=config.bf16)
    # The moving average is float32 in the checkpoint, and a second model folder at the end.
    average = FLOAT32 * actor.trained if config.enable_ema else 0
    state, final = actor.state_bytes + average, model * (2 if config.enable_ema else 1)
    if config.uses_critic:
        critic = of(config.critic_source, True)
        state += critic.state_bytes
        final += critic.folder_bytes(bf16=config.bf16) if config.save_value_network else 0
    return _writing(config, rollouts, state, model, final)


def offline_writing(config: Method, steps: int, of: Callable[[str, bool], Sizes]) -> Writing:
    """Like ``rl_writing``, for a command on fixed data."""
    trained = of(config.pretrain, config.is_scalar)
    model = trained.folder_bytes(bf16=config.bf16)
    return _writing(config, steps, trained.state_bytes, model, model)


def size_of(config: ModelSettings) -> Callable[[str, bool], Sizes]:
    """A function from model folder (and whether it has a scalar head) to its sizes under these settings."""
    return lambda path, scalar: sizes(path, scalar=scalar, lora=config.lora, trust_remote_code=config.trust_remote_code)


def _writing(config: OutputSettings, steps: int, state: int, model: int, final: int) -> Writing:
    state = 0 if config.disable_ds_ckpt else state
    inside = model if config.save_hf_ckpt else 0
    written = steps // config.save_steps if config.save_steps > 0 else 0
    fitting = max(1, int(config.max_ckpt_mem * 1e9 / max(1, state + inside)))
    kept = min(written, config.max_ckpt_num, fitting)
    # An old checkpoint is removed only when the next one is complete.
    return Writing(state, inside, kept + (written > kept), model if config.best_metric_key != NO_METRIC else 0, final)


def check_room(config: OutputSettings, writing: Writing) -> str:
    """Compare what is written with the free space; returns a line for the log. Raises CheckpointError if it does not fit.

    Existing checkpoints are counted as free, because they are replaced.
    """
    ckpt, final = existing(Path(config.ckpt_path)), existing(Path(config.save_path))
    files = Path(config.ckpt_path).glob(f"{checkpoints.PREFIX}*/**/*")
    there = sum(file.stat().st_size for file in files if file.is_file())
    wanted = {ckpt: max(0, writing.checkpoint * writing.kept + writing.best - there)}
    # Checkpoints and final model may share a disk.
    if ckpt.stat().st_dev == final.stat().st_dev:
        wanted[ckpt] += writing.final
    else:
        wanted[final] = writing.final
    free = {folder: shutil.disk_usage(folder).free for folder in wanted}
    for folder, needed in wanted.items():
        if free[folder] < needed * checkpoints.SPACE_MARGIN:
            raise CheckpointError(
                f"The run would write {size(needed)} to {folder} ({writing.describe()}), where {size(free[folder])} are free: "
                "make room, choose another --ckpt_path or --save_path, or keep fewer checkpoints with --max_ckpt_num."
            )
    rooms = ", ".join(f"{size(number)} free in {folder}" for folder, number in free.items())
    return f"{writing.describe()}; {rooms}"


logger = logging.getLogger(__name__)
DRIVER = World.solo(torch.device("cpu"))
"""The one process that decides for all workers of an RL run."""


def checkpoint_store(config: OutputSettings) -> checkpoints.CheckpointStore:
    """The checkpoint store of a run."""
    return checkpoints.CheckpointStore(Path(config.ckpt_path), config.max_ckpt_num, config.max_ckpt_mem)


def newest_checkpoint(config: OutputSettings, world: World) -> checkpoints.Checkpoint | None:
    """The checkpoint that a run with ``--load_checkpoint`` resumes from. The first rank looks and tells the others.

    None if there is none. Raises CheckpointError if it has no resumable state.
    """
    found = world.gather("checkpoint", checkpoint_store(config).latest() if world.is_first else None)[0]
    if found is None:
        logger.warning("--load_checkpoint: %s has no complete checkpoint, starting anew", config.ckpt_path)
    elif not found.state["resumable"]:
        raise CheckpointError(
            f"The checkpoint {found.path} was written with --disable_ds_ckpt and cannot be resumed: start without "
            f"--load_checkpoint, with --pretrain set to its folder {checkpoints.HF_FOLDER}, and with other --save_path and "
            "--ckpt_path."
        )
    return found


def every(steps: int, step: int) -> bool:
    """Whether an action that runs every ``steps`` steps is due after ``step``; never if ``steps`` is below 1."""
    return steps > 0 and step % steps == 0


class Keep:
    """The checkpoints and the best model of one run. ``aim``: the metric of the best model, None if none is kept."""

    def __init__(self, config: OutputSettings, aim: checkpoints.Aim | None, world: World, journal: Journal) -> None:
        self._config, self._aim, self._world, self._journal = config, aim, world, journal
        self._store, self._bests = checkpoint_store(config), checkpoints.BestStore(Path(config.ckpt_path))
        self._best: checkpoints.Best | None = None

    def resume(self, found: checkpoints.Checkpoint) -> None:
        """Load the best evaluation before ``found``, and a later one whose model is in the folder."""
        if self._aim is not None:
            best = self._bests.resumed(self._aim, found.state.get("best")) if self._world.is_first else None
            self._best = self._world.gather("best evaluation", best)[0]

    def is_best(self, values: Mapping[str, float]) -> bool:
        """Whether these values beat every earlier evaluation."""
        return self._aim is not None and checkpoints.better(self._aim, values[self._aim.metric], self._best)

    @contextmanager
    def best(self, step: int, values: Mapping[str, float]) -> Iterator[Path]:
        """Yields the folder for the new best model, from the evaluation after ``step``."""
        assert self._aim is not None
        metric, folder = self._aim.metric, self._bests.folder
        best = self._best = checkpoints.Best(self._aim, values[metric], step)
        with self._journal.progress.phase("writing the best model"), ExitStack() as stack:
            yield stack.enter_context(self._bests.write(best)) if self._world.is_first else folder
        self._journal.announce(f"best so far: {metric} {best.value:.5g} at step {step}, in {folder}")

    def checkpoint_is_due(self, step: int, trained: Iterable[Divergence]) -> bool:
        """True every ``--save_steps`` steps, unless one of the ``trained`` models may have diverged: a checkpoint of it would
        push out one from before.
        """
        due, may_have = every(self._config.save_steps, step), any(model.in_a_row > 0 for model in trained)
        if due and may_have:
            logger.warning("step %d: no checkpoint is written, as the last gradient was not finite", step)
        return due and not may_have

    @contextmanager
    def checkpoint(self, step: int, state: Mapping[str, object], size: int) -> Iterator[Path]:
        """Yields the folder for checkpoint ``step``, the same on every rank.

        ``state``: what the loop resumes from, as JSON. ``size``: bytes of the resumable part.
        """
        resumable, best = not self._config.disable_ds_ckpt, self._best
        whole = {**state, "resumable": resumable, "best": asdict(best) if best is not None else None}
        whole["run_id"] = self._journal.run_id
        with self._journal.progress.phase("writing a checkpoint"), ExitStack() as stack:
            writing = self._store.write(step, whole, size if resumable else 0)
            folder = stack.enter_context(writing) if self._world.is_first else Path()
            yield self._world.gather("checkpoint folder", folder)[0]
