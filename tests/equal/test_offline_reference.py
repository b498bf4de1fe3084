"""A frozen model elsewhere is the same run: scored ahead of the training, or in host memory between its passes."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.offline_world import flags, make_world, train
from tests.tiny import save_tiny_model
from togi.cli.main import main
from togi.learn.learner import Learner
from togi.model.loading import ModelSource
from togi.model.policy import PolicyModel
from togi.parallel import frozen
from togi.parallel.backend import BackendOptions
from togi.parallel.process import World
from togi.run import offline_setup

LORA = ("--lora_rank", "4", "--target_modules", "q_proj", "down_proj")
EQUAL = ("loss", "grad_norm", "reward/chosen", "reward/margin", "eval/loss", "eval/reward/rejected")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


class Loaded:
    """The folders of the language models that a run has loaded, in order, and how many of them were alive at each update."""

    def __init__(self) -> None:
        self.folders: list[str] = []
        self.models: list[weakref.ref[PolicyModel]] = []
        self.alive: list[int] = []

    def start(self) -> None:
        for each in (self.folders, self.models, self.alive):
            each.clear()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    seen = Loaded()
    load, update = offline_setup.load_causal_lm, Learner.update

    def note(source: ModelSource) -> PolicyModel:
        model = load(source)
        seen.folders.append(Path(source.path).name)
        seen.models.append(weakref.ref(model))
        return model

    def count(self: Learner, batches: object) -> object:
        seen.alive.append(sum(model() is not None for model in seen.models))
        return update(self, batches)

    monkeypatch.setattr(offline_setup, "load_causal_lm", note)
    monkeypatch.setattr(Learner, "update", count)
    return seen


@pytest.mark.parametrize("more", [("--ref_pretrain", "teacher"), LORA, ()], ids=["other", "lora", "same"])
def test_scoring_ahead_is_the_same_run(world: Path, tmp_path: Path, more: tuple[str, ...], loaded: Loaded) -> None:
    """Of all metrics of all steps. With LoRA the reference is the base inside, which there is anyway."""
    words = [str(world / word) if word == "teacher" else word for word in more] + ["--max_epochs", "2"]
    during = train(world, "dpo", tmp_path / "during", *words)
    assert set(loaded.alive) == {1 if more is LORA else 2}
    loaded.start()
    ahead = train(world, "dpo", tmp_path / "ahead", *words, "--precompute_ref")
    assert set(loaded.alive) == {1}, "the reference is still in memory"
    assert len(ahead) == len(during) == 9
    for a, b in zip(ahead, during, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & set(EQUAL):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=2e-6), name


def test_a_resumed_run_reads_the_file_and_is_the_same_run(world: Path, tmp_path: Path, loaded: Loaded) -> None:
    words = ("--precompute_ref", "--ref_pretrain", str(world / "teacher"), "--save_steps", "1", "--max_ckpt_num", "9")
    whole = train(world, "dpo", tmp_path / "whole", *words)
    assert loaded.folders == ["teacher", "model"]  # the reference first: it is gone before the policy comes
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "part" / "checkpoints" / f"step_{step:08d}")
    files = sorted((tmp_path / "part" / "reference").iterdir())
    assert len(files) == 2  # training and held-out rows
    times = [file.stat().st_mtime_ns for file in files]
    loaded.start()
    part = train(world, "dpo", tmp_path / "part", *words, "--load_checkpoint")
    assert loaded.folders == ["model"]
    assert [file.stat().st_mtime_ns for file in files] == times
    assert [step.get("loss") for step in part] == [
        step.get("loss") for step in whole
    ]  # from the evaluation at step 0 on
    ends = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "part")]
    assert ends[0] == ends[1]


def test_another_reference_in_the_same_folder_is_not_taken_for_the_first(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = save_tiny_model(tmp_path / "reference", seed=5)
    words = ("--precompute_ref", "--ref_pretrain", str(reference), "--save_steps", "1", "--max_ckpt_num", "9")
    train(world, "dpo", tmp_path / "run", *words)
    before = sorted((tmp_path / "run" / "reference").iterdir())
    save_tiny_model(reference, seed=6)
    assert main(["dpo", *flags(world, "dpo", tmp_path / "run", *words, "--load_checkpoint")]) == 2
    assert "belongs to another run (the weights of --ref_pretrain" in capsys.readouterr().err
    assert sorted((tmp_path / "run" / "reference").iterdir()) == before


OFFLOADS = [
    ("dpo", ("--ref_offload",), "--ref_offload: there is no accelerator here"),
    ("kto", ("--ref_offload", *LORA), "--ref_offload: with --lora_rank the reference is the base inside"),
    ("kd", ("--teacher_offload",), "--teacher_offload: there is no accelerator here"),
]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="here there is somewhere to move weights to")
@pytest.mark.parametrize(("command", "words", "notice"), OFFLOADS)
def test_an_offload_flag_that_moves_nothing_says_so_and_trains_the_same(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, words: tuple[str, ...], notice: str
) -> None:
    plain = train(world, command, tmp_path / "plain", *words[1:], evaluate=False)
    assert notice not in capsys.readouterr().out
    offloaded = train(world, command, tmp_path / "offloaded", *words, evaluate=False)
    assert capsys.readouterr().out.count(notice) == 1
    assert [step["loss"] for step in offloaded] == [step["loss"] for step in plain]


@pytest.mark.parametrize(("command", "words"), [("dpo", ("--ref_offload",)), ("kd", ("--teacher_offload",))])
def test_weights_that_come_for_each_pass_train_the_same(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, words: tuple[str, ...]
) -> None:
    """The way of a machine with an accelerator, with the CPU in its place."""
    plain = train(world, command, tmp_path / "plain", evaluate=False)
    passes: list[int] = []

    def counted(
        module: PolicyModel, world: World, options: BackendOptions, read: Callable[[nn.Module], None], *, on_host: bool
    ) -> Callable[[], AbstractContextManager[None]]:
        around = frozen(module, world, options, read, on_host=on_host)
        if not on_host:
            return around

        def count() -> AbstractContextManager[None]:
            passes.append(1)
            return around()

        return count

    monkeypatch.setattr(offline_setup, "frozen", counted)
    monkeypatch.setattr(offline_setup, "moves_weights", lambda config, world: True)
    offloaded = train(world, command, tmp_path / "offloaded", *words, evaluate=False)
    assert len(passes) == 4  # one for each step: the reference's call, the teacher's micro-batch
    assert [step["loss"] for step in offloaded] == [step["loss"] for step in plain]
