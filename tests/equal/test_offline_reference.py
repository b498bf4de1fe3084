"""``--precompute_ref``: the same run as with the reference beside the policy, without it in memory, and its files are reused."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.offline_world import make_world, train
from tests.tiny import save_tiny_model
from togi.learn.learner import Learner
from togi.model.policy import PolicyModel
from togi.recipes import offline_setup

LORA = ("--lora_rank", "4", "--target_modules", "q_proj", "down_proj")
EQUAL = ("loss", "grad_norm", "reward/chosen", "reward/margin", "eval/loss", "eval/reward/rejected")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of all models that are loaded, in order."""
    paths: list[str] = []
    load = offline_setup.load_causal_lm

    def note(path: str, *args: object, **settings: object) -> PolicyModel:
        paths.append(Path(path).name)
        return load(path, *args, **settings)

    monkeypatch.setattr(offline_setup, "load_causal_lm", note)
    return paths


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many language models are in memory at each update."""
    numbers: list[int] = []
    update: Callable[..., object] = Learner.update

    def count(self: Learner, batches: object) -> object:
        numbers.append(sum(isinstance(thing, PolicyModel) for thing in gc.get_objects()))
        return update(self, batches)

    monkeypatch.setattr(Learner, "update", count)
    return numbers


@pytest.mark.parametrize("more", [("--ref_pretrain", "teacher"), LORA, ()], ids=["other", "lora", "same"])
def test_scoring_ahead_is_the_same_run(world: Path, tmp_path: Path, more: tuple[str, ...], alive: list[int]) -> None:
    """Of all metrics of all steps. With LoRA the reference is the base inside, which there is anyway."""
    words = [str(world / word) if word == "teacher" else word for word in more] + ["--max_epochs", "2"]
    gc.collect()
    during = train(world, "dpo", tmp_path / "during", *words)
    both = set(alive)
    alive.clear()
    gc.collect()
    ahead = train(world, "dpo", tmp_path / "ahead", *words, "--precompute_ref")
    assert both == {1 if more is LORA else 2}
    assert set(alive) == {1}, "the reference is still in memory"
    assert len(ahead) == len(during) == 9
    for a, b in zip(ahead, during, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & set(EQUAL):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=2e-6), name


def test_a_resumed_run_reads_the_file_and_is_the_same_run(world: Path, tmp_path: Path, loaded: list[str]) -> None:
    words = ("--precompute_ref", "--ref_pretrain", str(world / "teacher"), "--save_steps", "1", "--max_ckpt_num", "9")
    whole = train(world, "dpo", tmp_path / "whole", *words)
    assert loaded == ["teacher", "model"]  # the reference first: it is gone before the policy comes
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "part" / "checkpoints" / f"step_{step:08d}")
    files = sorted((tmp_path / "part" / "reference").iterdir())
    assert len(files) == 2  # training and held-out rows
    times = [file.stat().st_mtime_ns for file in files]
    loaded.clear()
    part = train(world, "dpo", tmp_path / "part", *words, "--load_checkpoint")
    assert loaded == ["model"]
    assert [file.stat().st_mtime_ns for file in files] == times
    assert [step.get("loss") for step in part] == [
        step.get("loss") for step in whole
    ]  # from the evaluation at step 0 on
    ends = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "part")]
    assert ends[0] == ends[1]


def test_another_reference_in_the_same_folder_is_not_taken_for_the_first(world: Path, tmp_path: Path) -> None:
    reference = save_tiny_model(tmp_path / "reference", seed=5)
    words = ("--precompute_ref", "--ref_pretrain", str(reference), "--save_steps", "1", "--max_ckpt_num", "9")
    train(world, "dpo", tmp_path / "run", *words)
    save_tiny_model(reference, seed=6)
    for step in (2, 3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    train(world, "dpo", tmp_path / "run", *words, "--load_checkpoint")
    assert len(list((tmp_path / "run" / "reference").iterdir())) == 4
