"""What the ranks of ``test_offline_ranks`` run: every command once, without meeting anew in between."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.learn_tools import partition_small_weights
from tests.offline_world import flags
from togi.config.parse import parse
from togi.errors import UserError
from togi.methods import METHODS
from togi.parallel.process import World
from togi.run.offline import run

STAGE_3 = ("rm", "kto", "kd")
RESUMED_AFTER = 6
LORA = ("--lora_rank", "4", "--target_modules", "q_proj", "v_proj", "down_proj")
ON_POLICY = ("--on_policy_share", "0.5", "--rollout_engine", "transformers", "--generate_max_len", "12")
# command -> ZeRO stage
ADAPTED = {"dpo": "2", "rm": "3"}
SPLIT = {"sft": "1", "kd": "2", "rm": "3", "dpo": "3", "kto": "2", "prm": "3"}
# Mixtures of experts with a load-balancing loss; 5 rows a step, one at a time: ranks have 3 and 2, one runs a dummy.
EXPERTS = {
    "sft": ("mixtral", "--zero_stage", "2"),
    "rm": ("qwen3_moe", "--zero_stage", "3", "--gradient_checkpointing"),
    "dpo": ("qwen3_moe", "--zero_stage", "3"),
}
BALANCED = ("--aux_loss_coef", "0.5", "--train_batch_size", "5")
RING_3 = ("--ring_attn_size", "2", "--zero_stage", "3")
THREE = ("--train_batch_size", "3")
FEW = {"sft": ("--zero_stage", "3"), "dpo": ("--backend", "deepspeed"), "prm": ("--zero_stage", "0"), "rm": ()}
DEEPSPEED = {"sft": "2", "rm": "3", "dpo": "3", "kto": "2"}
ADAPTED_DEEPSPEED = {"dpo": "3", "rm": "2"}


def run_all(world: World, folder: Path) -> None:
    """``folder`` is that of ``make_world``; the runs are left in its folders.

    ``two`` are two ranks, ``ring`` those of a ring, ``parts`` those that split the weights of each layer. ``whole`` and ``part``
    are one run, the second resumed from the checkpoint of the first in the middle of an epoch.
    """
    partition_small_weights()
    for command in METHODS:
        run_one(world, folder, command, "two")
        run_one(world, folder, command, "ring", "--ring_attn_size", "2")
    for command, stage in SPLIT.items():
        run_one(world, folder, command, "parts", "--ds_tensor_parallel_size", "2", "--zero_stage", stage)
    epochs = ("--max_epochs", "2", "--lr_scheduler", "linear", "--save_steps", "1")
    for command, more in (("dpo", ()), ("rm", (*LORA, "--lora_dropout", "0.2"))):
        run_one(world, folder, command, "whole", *epochs, *more)
        if world.is_first:
            step = f"checkpoints/step_{RESUMED_AFTER:08d}"
            shutil.copytree(folder / "whole" / command / step, folder / "part" / command / step)
        world.barrier("checkpoint copied")
        run_one(world, folder, command, "part", *epochs, *more, "--load_checkpoint")


def run_more(world: World, folder: Path) -> None:
    """Further ways: ``three`` is ZeRO stage 3, ``lora`` trains adapters, ``experts`` mixtures of experts, ``ahead`` scores with a
    sharded reference before training, ``own`` generates; ``deepspeed`` and ``lora_deepspeed`` train with the other backend.
    ``ring_lora``, ``parts_own``, ... are like ``lora``, ``own``, ... in a ring or with split weights.
    """
    partition_small_weights()
    for command in STAGE_3:
        run_one(world, folder, command, "three", "--zero_stage", "3")
    for command in METHODS:
        run_one(world, folder, command, "ring", "--ring_attn_size", "2")
    run_one(world, folder, "dpo", "ring_lora", *LORA, "--ring_attn_size", "2", "--gradient_checkpointing")
    run_one(world, folder, "kto", "ring_deepspeed", "--ring_attn_size", "2", "--backend", "deepspeed")
    run_one(world, folder, "rm", "ring_deepspeed", *RING_3, "--backend", "deepspeed")
    run_one(world, folder, "dpo", "ring_ahead", *RING_3, "--precompute_ref")
    run_one(world, folder, "kd", "ring_own", "--ring_attn_size", "2", *ON_POLICY)
    for command, stage in ADAPTED.items():
        run_one(world, folder, command, "lora", *LORA, "--zero_stage", stage)
    for command, (model, *more) in EXPERTS.items():
        split = (*BALANCED, "--pretrain", str(folder / model), "--no_packing_samples")
        run_one(world, folder, command, "experts", *split, *more)
        run_one(world, folder, command, "experts_deepspeed", *split, *more, "--backend", "deepspeed")
        run_one(world, folder, command, "ring_experts", *split[:-1], *more, "--ring_attn_size", "2")
    run_one(world, folder, "dpo", "ahead", "--precompute_ref", "--zero_stage", "3")
    run_one(world, folder, "kd", "own", *ON_POLICY)
    run_one(world, folder, "kd", "parts_own", "--ds_tensor_parallel_size", "2", *ON_POLICY)
    run_one(world, folder, "dpo", "parts_ahead", "--ds_tensor_parallel_size", "2", "--precompute_ref")
    for command, stage in DEEPSPEED.items():
        run_one(world, folder, command, "deepspeed", "--backend", "deepspeed", "--zero_stage", stage)
    for command, stage in ADAPTED_DEEPSPEED.items():
        run_one(world, folder, command, "lora_deepspeed", *LORA, "--backend", "deepspeed", "--zero_stage", stage)


def run_few(world: World, folder: Path) -> None:
    """Steps of three rows, and one of two, on four ranks: in each step and evaluation there are ranks without any row.

    Left in ``few``; ``few_teams`` are two groups that split the weights (SFT), and two rings (DPO).
    """
    partition_small_weights()
    for command, more in FEW.items():
        run_one(world, folder, command, "few", *THREE, *more)
    run_one(world, folder, "sft", "few_teams", *THREE, "--train_batch_size", "1", "--ds_tensor_parallel_size", "2")
    run_one(world, folder, "dpo", "few_teams", *THREE, "--train_batch_size", "1", "--ring_attn_size", "2")


def run_one(world: World, folder: Path, command: str, name: str, *more: str) -> None:
    config_class, argv = METHODS[command], flags(folder, command, folder / name / command, *more, "--max_ckpt_num", "9")
    run(world, parse(config_class, argv, command), command, argv=argv, announce=lambda line: None)


def make_mistakes(world: World, folder: Path) -> None:
    """What every rank says of rows that the first cannot read, of rows of its own, and of a run folder that is a file."""
    (folder / "file").touch()
    own = folder / ("sft.jsonl" if world.is_first else "sft_eval.jsonl")
    for name, more in (
        ("bad", ("--output_key", "none")),
        ("own", ("--dataset", str(own))),
        ("folder", ("--run_dir", str(folder / "file"))),
    ):
        words = flags(folder, "sft", folder / "mistakes" / name, *more, evaluate=False)
        try:
            run(world, parse(METHODS["sft"], words, "sft"), "sft", argv=[], announce=str)
        except (UserError, SystemExit) as error:
            (folder / f"{name}_{world.rank}").write_text(str(error))
