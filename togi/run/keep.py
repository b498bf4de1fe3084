"""Which models a run keeps on disk: resumable checkpoints, the best model of its evaluations, and how it finds them again.

All ranks call together and the first one writes; the driver of RL is a world of one. What goes into the folders is the
loop's business.
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
    """The checkpoints of a run."""
    return CheckpointStore(Path(config.ckpt_path), config.max_ckpt_num, config.max_ckpt_mem)


def newest_checkpoint(config: OutputSettings, world: World) -> Checkpoint | None:
    """What a run with ``--load_checkpoint`` resumes from. The first rank looks, the others are told.

    Raises CheckpointError when it holds no resumable state.
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
    """Whether something that is done every so many steps is due after ``step``; below 1 it never is."""
    return steps > 0 and step % steps == 0


class Keep:
    """The checkpoints and the best model of one run. ``aim``: what the best one is the best in, None where none is kept."""

    def __init__(self, config: OutputSettings, aim: Aim | None, world: World, journal: Journal) -> None:
        self._config, self._aim, self._world, self._journal = config, aim, world, journal
        self._store, self._bests = checkpoint_store(config), BestStore(Path(config.ckpt_path))
        self._best: Best | None = None

    def resume(self, found: Checkpoint) -> None:
        """Know the best evaluation before ``found``, and a later one whose model is in the folder."""
        if self._aim is not None:
            best = self._bests.resumed(self._aim, found.state.get("best")) if self._world.is_first else None
            self._best = self._world.gather("best evaluation", best)[0]

    def is_best(self, values: Mapping[str, float]) -> bool:
        """Whether no evaluation before was as good as the one with these values."""
        return self._aim is not None and better(self._aim, values[self._aim.metric], self._best)

    @contextmanager
    def best(self, step: int, values: Mapping[str, float]) -> Iterator[Path]:
        """Yields the folder to write the new best model into, that of the evaluation after ``step``."""
        assert self._aim is not None
        metric, folder = self._aim.metric, self._bests.folder
        best = self._best = Best(self._aim, values[metric], step)
        with self._journal.progress.phase("writing the best model"), ExitStack() as stack:
            yield stack.enter_context(self._bests.write(best)) if self._world.is_first else folder
        self._journal.announce(f"best so far: {metric} {best.value:.5g} at step {step}, in {folder}")

    def checkpoint_is_due(self, step: int) -> bool:
        """Every ``--save_steps`` steps."""
        return every(self._config.save_steps, step)

    @contextmanager
    def checkpoint(self, step: int, state: Mapping[str, Any], size: int) -> Iterator[Path]:
        """Yields the folder to write checkpoint ``step`` into, the same on every rank.

        ``state``: what the loop resumes from, as JSON. ``size``: bytes of the resumable part.
        """
        resumable, best = not self._config.disable_ds_ckpt, self._best
        whole = {**state, "resumable": resumable, "best": best.to_json() if best is not None else None}
        with self._journal.progress.phase("writing a checkpoint"), ExitStack() as stack:
            writing = self._store.write(step, whole, size if resumable else 0)
            folder = stack.enter_context(writing) if self._world.is_first else Path()
            yield self._world.gather("checkpoint folder", folder)[0]
