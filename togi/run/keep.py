"""Which models a run keeps on disk: resumable checkpoints and the best model by evaluation, and how it finds them again.

All ranks call together and the first one writes; the driver of RL is a world of one rank. The training loop writes the files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from togi.config.shared import OutputSettings
from togi.errors import CheckpointError
from togi.learn.checkpoint import HF_FOLDER, Aim, Best, BestStore, Checkpoint, CheckpointStore, better
from togi.parallel.process import World
from togi.run.journal import Journal

logger = logging.getLogger(__name__)
DRIVER = World.solo(torch.device("cpu"))
"""The one process that decides for all workers of an RL run."""


def checkpoint_store(config: OutputSettings) -> CheckpointStore:
    """The checkpoint store of a run."""
    return CheckpointStore(Path(config.ckpt_path), config.max_ckpt_num, config.max_ckpt_mem)


def newest_checkpoint(config: OutputSettings, world: World) -> Checkpoint | None:
    """The checkpoint that a run with ``--load_checkpoint`` resumes from. The first rank looks and tells the others.

    None if there is none. Raises CheckpointError if it has no resumable state.
    """
    found = world.gather("checkpoint", checkpoint_store(config).latest() if world.is_first else None)[0]
    if found is None:
        logger.warning("--load_checkpoint: %s has no complete checkpoint, starting anew", config.ckpt_path)
    elif not found.state["resumable"]:
        raise CheckpointError(
            f"The checkpoint {found.path} was written with --disable_ds_ckpt and cannot be resumed: start without "
            f"--load_checkpoint, with --pretrain set to its folder {HF_FOLDER}."
        )
    return found


def every(steps: int, step: int) -> bool:
    """Whether an action that runs every ``steps`` steps is due after ``step``; never if ``steps`` is below 1."""
    return steps > 0 and step % steps == 0


class Keep:
    """The checkpoints and the best model of one run. ``aim``: the metric of the best model, None if none is kept."""

    def __init__(self, config: OutputSettings, aim: Aim | None, world: World, journal: Journal) -> None:
        self._config, self._aim, self._world, self._journal = config, aim, world, journal
        self._store, self._bests = checkpoint_store(config), BestStore(Path(config.ckpt_path))
        self._best: Best | None = None

    def resume(self, found: Checkpoint) -> None:
        """Load the best evaluation before ``found``, and a later one whose model is in the folder."""
        if self._aim is not None:
            best = self._bests.resumed(self._aim, found.state.get("best")) if self._world.is_first else None
            self._best = self._world.gather("best evaluation", best)[0]

    def is_best(self, values: Mapping[str, float]) -> bool:
        """Whether these values beat every earlier evaluation."""
        return self._aim is not None and better(self._aim, values[self._aim.metric], self._best)

    @contextmanager
    def best(self, step: int, values: Mapping[str, float]) -> Iterator[Path]:
        """Yields the folder for the new best model, from the evaluation after ``step``."""
        assert self._aim is not None
        metric, folder = self._aim.metric, self._bests.folder
        best = self._best = Best(self._aim, values[metric], step)
        with self._journal.progress.phase("writing the best model"), ExitStack() as stack:
            yield stack.enter_context(self._bests.write(best)) if self._world.is_first else folder
        self._journal.announce(f"best so far: {metric} {best.value:.5g} at step {step}, in {folder}")

    def checkpoint_is_due(self, step: int) -> bool:
        """True every ``--save_steps`` steps."""
        return every(self._config.save_steps, step)

    @contextmanager
    def checkpoint(self, step: int, state: Mapping[str, Any], size: int) -> Iterator[Path]:
        """Yields the folder for checkpoint ``step``, the same on every rank.

        ``state``: what the loop resumes from, as JSON. ``size``: bytes of the resumable part.
        """
        resumable, best = not self._config.disable_ds_ckpt, self._best
        whole = {**state, "resumable": resumable, "best": best.to_json() if best is not None else None}
        with self._journal.progress.phase("writing a checkpoint"), ExitStack() as stack:
            writing = self._store.write(step, whole, size if resumable else 0)
            folder = stack.enter_context(writing) if self._world.is_first else Path()
            yield self._world.gather("checkpoint folder", folder)[0]
