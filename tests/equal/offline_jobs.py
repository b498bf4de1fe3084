"""What the ranks of ``test_offline_ranks`` run: every command once, without meeting anew in between."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.offline_world import CONFIGS, flags
from togi.config.parse import parse
from togi.parallel.process import World
from togi.recipes.offline import run_in

STAGE_3 = ("rm", "kto", "kd")
RESUMED_AFTER = 6


def run_all(world: World, folder: Path) -> None:
    """``folder`` is that of ``make_world``; the runs are left in its folders ``two`` and, with ZeRO stage 3, ``three``.

    ``whole`` and ``part`` are one run, the second resumed from the first one's checkpoint in the middle of an epoch.
    """
    for command in CONFIGS:
        run_one(world, folder, command, "two")
    for command in STAGE_3:
        run_one(world, folder, command, "three", "--zero_stage", "3")
    epochs = ("--max_epochs", "2", "--lr_scheduler", "linear", "--save_steps", "1")
    run_one(world, folder, "dpo", "whole", *epochs)
    if world.is_first:
        step = f"checkpoints/step_{RESUMED_AFTER:08d}"
        shutil.copytree(folder / "whole" / "dpo" / step, folder / "part" / "dpo" / step)
    world.barrier("checkpoint copied")
    run_one(world, folder, "dpo", "part", *epochs, "--load_checkpoint")


def run_one(world: World, folder: Path, command: str, name: str, *more: str) -> None:
    config_class, argv = CONFIGS[command], flags(folder, command, folder / name / command, *more, "--max_ckpt_num", "9")
    run_in(world, parse(config_class, argv, command), command, argv=argv, announce=lambda line: None)
