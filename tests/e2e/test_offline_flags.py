"""Flags that change where things come from, or nothing on this machine: the same run with them and without."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.offline_world import make_world, train
from togi.run.start import ONE_TOKENIZER


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def learned(values: list[dict[str, float]]) -> list[dict[str, float]]:
    names = ("loss", "grad_norm", "eval/loss")
    kept = [{name: step[name] for name in names if name in step} for step in values]
    assert all(kept)
    return kept


def test_a_compiled_run_learns_the_same_and_says_what_compiling_took(world: Path, tmp_path: Path) -> None:
    torch.compiler.reset()
    plain, other = train(world, "dpo", tmp_path / "plain"), train(world, "dpo", tmp_path / "other", "--torch_compile")
    for one, two in zip(learned(plain), learned(other), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    first, *later = (step["compile/seconds"] for step in other if "loss" in step)
    assert first > 0.5 > max(later)


def test_a_run_from_modelscope_is_the_run_from_folders(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = ModuleType("modelscope")
    package.__spec__ = ModuleSpec("modelscope", None)
    package.snapshot_download = lambda name, allow_patterns: str(world / Path(name).name)  # type: ignore[attr-defined]
    package.dataset_snapshot_download = lambda name: str(tmp_path / Path(name).name)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", package)
    (tmp_path / "rows" / "small").mkdir(parents=True)
    (tmp_path / "rows" / "small" / "train.jsonl").write_text((world / "sft.jsonl").read_text())
    plain = train(world, "sft", tmp_path / "plain")
    capsys.readouterr()
    names = "--use_ms --pretrain org/model --dataset org/rows@small --disable_fast_tokenizer --use_liger_kernel"
    other = train(world, "sft", tmp_path / "other", *names.split())
    assert learned(other) == learned(plain)
    said = capsys.readouterr().out
    assert ONE_TOKENIZER in said
    assert "--use_liger_kernel: there is no CUDA device here" in said
