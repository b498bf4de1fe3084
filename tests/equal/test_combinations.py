"""Ways to compute a step, two by two: whatever the settings let through gives what one plain process gives."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch._dynamo
from safetensors.torch import load_file

from tests.combinations import AXES, RL, covering, page, taken, words
from tests.learn_tools import max_difference, partition_small_weights, run_ranks
from tests.offline_world import flags, make_world, train, values
from togi.config.parse import parse
from togi.methods import METHODS
from togi.parallel.process import World
from togi.run.offline import run

ROOT = Path(__file__).parents[2]
# What decides the numbers; everything else is about how they are computed.
WHAT = ("command", "adapters", "experts")
STEPS = ("--train_batch_size", "5")  # 14 rows: 5, 5 and 4, so that two ranks never have the same number
FILES = {"none": "model.safetensors", "LoRA": "adapter_model.safetensors", "QLoRA": "adapter_model.safetensors"}


CHOSEN = "chosen.json"
# Compiling takes minutes on two cores; what compiled layers compute is also in test_compiled_layers.
LAYERS = ["as they are", pytest.param("compiled", marks=pytest.mark.large)]


@cache
def chosen(layers: str) -> list[dict[str, str]]:
    """The combinations that are trained; found when a test asks for them, as it takes a while."""
    return taken(layers) if os.environ.get("TOGI_COMBINATIONS") == "all" else covering(taken(layers))


def more(folder: Path, combination: dict[str, str]) -> list[str]:
    return [*STEPS, *(["--pretrain", str(folder / "mixtral")] if combination["experts"] == "MoE" else [])]


def name(combination: dict[str, str]) -> str:
    return "-".join(combination.values()).replace(" ", "_")


def run_chosen(world: World, folder: Path) -> None:
    partition_small_weights()
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # layers that are no longer compiled would be equal, too
    for combination in json.loads((folder / CHOSEN).read_text()):
        command, place = combination["command"], folder / name(combination)
        argv = flags(folder, command, place, *more(folder, combination), *words(combination), evaluate=False)
        run(world, parse(METHODS[command], argv, command), command, argv=argv, announce=lambda line: None)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder in which all chosen combinations with some layers have been trained."""

    @cache
    def world(layers: str) -> Path:
        folder = make_world(tmp_path_factory.mktemp("world"))
        (folder / CHOSEN).write_text(json.dumps(chosen(layers)))
        run_ranks(run_chosen, 2, folder)
        return folder

    return world


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("command", [command for command in AXES["command"] if command != RL])
def test_pairs_of_ways_equal_one_plain_process(worlds: Callable[[str], Path], command: str, layers: str) -> None:
    """Loss, gradient norm and tokens of every step, and the weights that are saved."""
    world = worlds(layers)
    for what in sorted({tuple(c[axis] for axis in WHAT) for c in chosen(layers) if c["command"] == command}):
        plain = {axis: next(iter(AXES[axis])) for axis in AXES} | dict(zip(WHAT, what, strict=True))
        one = world / "one" / "-".join(what)
        first = train(world, command, one, *more(world, plain), *words(plain, WHAT), evaluate=False)
        for combination in (c for c in chosen(layers) if tuple(c[axis] for axis in WHAT) == what):
            assert_equal(one, first, world / name(combination), combination)


def assert_equal(one: Path, first: list[dict[str, float]], run: Path, combination: dict[str, str]) -> None:
    file, second = FILES[combination["adapters"]], values(run)
    assert len(first) == len(second) == 3
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        for key in ("loss", "grad_norm", "tokens/seen"):
            assert b[key] == pytest.approx(a[key], rel=5e-4, abs=2e-5), (step, key, combination)
    ours, theirs = (load_file(folder / "model" / file) for folder in (one, run))
    assert ours.keys() == theirs.keys(), combination
    # a gradient that is hardly more than float32's rounding still makes a good part of an AdamW step, here of 3e-3
    assert max_difference(ours, theirs) < 3e-4, combination


@pytest.mark.large
def test_layers_were_compiled(worlds: Callable[[str], Path]) -> None:
    """In the first of the runs that ask for it, at the latest; later ones take what is there."""
    world = worlds("compiled")
    reported = [[step["compile/seconds"] for step in values(world / name(c))] for c in chosen("compiled")]
    assert max(map(sum, reported)) > 1


def test_the_page_is_what_the_settings_say() -> None:
    assert (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8") == page()
