"""``--use_ms``: names become folders before anything else looks at them. A stand-in has the package's documented functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from togi.config.fields import Settings
from togi.config.infer import InferConfig
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.errors import ConfigError
from togi.methods.dpo import DPO
from togi.run.preflight import with_local_names


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """What was asked of ModelScope, which has everything of the namespace org."""
    calls: list[tuple[Any, ...]] = []

    def download(kind: str) -> Callable[..., str]:
        def snapshot(name: str, **how: Any) -> str:
            calls.append((kind, name, how))
            if not name.startswith("org/"):
                raise OSError(f"no {name}\nanywhere")
            return str(tmp_path / "cache" / kind / name)

        return snapshot

    package = ModuleType("modelscope")
    package.__spec__ = ModuleSpec("modelscope", None)
    package.snapshot_download = download("model")  # type: ignore[attr-defined]
    package.dataset_snapshot_download = download("data")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", package)
    return calls


def local(config_class: type[Settings], words: str) -> Any:
    return with_local_names(parse(config_class, words.split(), "test")).config  # type: ignore[type-var]


def test_every_name_is_downloaded_and_paths_stay(asked: list[tuple[Any, ...]], tmp_path: Path) -> None:
    mine, rows, cache = tmp_path / "mine", tmp_path / "rows.jsonl", tmp_path / "cache"
    mine.mkdir()
    rows.write_text("{}\n")
    words = f"--use_ms --pretrain org/policy --reward_pretrain {mine},org/judge --critic_pretrain org/critic "
    config = local(RLConfig, f"{words} --prompt_data {rows},org/sums@easy,org/more --eval_dataset org/test")
    assert config.pretrain == f"{cache}/model/org/policy"
    assert config.reward_pretrain == f"{mine},{cache}/model/org/judge"
    assert config.critic_pretrain == f"{cache}/model/org/critic"
    assert config.prompt_data == f"{rows},{cache}/data/org/sums@easy,{cache}/data/org/more"
    assert config.eval_dataset == f"{cache}/data/org/test"
    weights = {how["allow_patterns"][1] for kind, _, how in asked if kind == "model"}
    assert weights == {"*.safetensors"} and not any("*.bin" in how.get("allow_patterns", ()) for *_, how in asked)


def test_reference_and_inference_too(asked: list[tuple[Any, ...]], tmp_path: Path) -> None:
    config = local(DPO, "--use_ms --pretrain org/a --ref_pretrain org/b --dataset org/pairs")
    assert config.ref_pretrain == f"{tmp_path}/cache/model/org/b"
    assert (
        local(InferConfig, "--use_ms --pretrain org/a --dataset org/rows").dataset == f"{tmp_path}/cache/data/org/rows"
    )


def test_nothing_is_asked_without_the_flag(asked: list[tuple[Any, ...]]) -> None:
    assert local(DPO, "--pretrain org/a --dataset org/pairs").pretrain == "org/a"
    assert asked == []


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--pretrain other/a --dataset org/b",
            r"--pretrain other/a cannot be had from ModelScope \(no other/a anywhere\)",
        ),
        ("--pretrain org/a --dataset other/b", r"--dataset other/b cannot be had from ModelScope"),
        ("--pretrain policy --dataset org/b", "--pretrain policy is no folder and no name of ModelScope"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(asked: list[tuple[Any, ...]], flags: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as error:
        local(DPO, f"--use_ms {flags}")
    assert "\n" not in str(error.value)


def test_the_package_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--use_ms needs the package modelscope: pip install '.\[modelscope\]'"):
        local(DPO, "--use_ms --pretrain org/a --dataset org/b")
