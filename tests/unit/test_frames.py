"""How far it is from ``togi X`` to its loop: at most four frames, counted in a real call whose loop is a stub."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.offline_world import flags, make_world
from tests.tiny import save_tiny_model
from togi.cli.main import main
from togi.errors import RunError
from togi.run import offline, rl

PACKAGE = Path(__file__).parents[2] / "togi"
LONGEST = 4


class Frames:
    """Stands for a loop: notes the functions of togi that led to it, the outermost first, and ends the run."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def note(self) -> None:
        stack = [frame for frame in inspect.stack() if Path(frame.filename).is_relative_to(PACKAGE)]
        self.names = [frame.function for frame in reversed(stack)]
        raise RunError("the loop was reached")

    def train(self, run: Any, found: Any) -> None:
        self.note()

    async def train_rl(self, run: Any, found: Any) -> None:
        self.note()


def test_from_sft_to_its_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, world = Frames(), make_world(tmp_path)
    monkeypatch.setattr(offline, "train", frames.train)
    assert main(["sft", *flags(world, "sft", tmp_path / "run")]) == 1
    assert frames.names == ["main", "offline", "run"]
    assert len([*frames.names, "train"]) <= LONGEST
    assert "the loop was reached" in (tmp_path / "run" / "status.json").read_text()


def test_from_rl_to_its_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = Frames()
    save_tiny_model(tmp_path / "model", arch="llama", seed=0)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "write a number"}\n' * 4)
    (tmp_path / "reward.py").write_text(
        "def reward_func(queries, prompts, labels):\n    return [0.5 for _ in queries]\n"
    )

    @asynccontextmanager
    async def workers(*_: Any) -> AsyncIterator[None]:
        yield None

    async def connect(*_: Any) -> None:
        return None

    monkeypatch.setattr(rl, "train", frames.train_rl)
    monkeypatch.setattr(rl, "workers", workers)
    monkeypatch.setattr(rl, "connect", connect)
    monkeypatch.setattr(rl, "describe", lambda *_: "")

    async def aclose() -> None:
        """Nothing is in work."""

    monkeypatch.setattr(rl, "RLRun", lambda *_: SimpleNamespace(last_checkpoint=None, finishing=None, aclose=aclose))
    words = [
        *("--pretrain", tmp_path / "model", "--prompt_data", tmp_path / "prompts.jsonl", "--input_key", "prompt"),
        *("--reward_func", tmp_path / "reward.py", "--rollout_engine", "transformers", "--n_samples_per_prompt", "2"),
        *("--run_dir", tmp_path / "run", "--save_path", tmp_path / "out", "--ckpt_path", tmp_path / "checkpoints"),
        *("--advantage_estimator", "rloo", "--prompt_max_len", "32", "--generate_max_len", "8"),
    ]
    assert main(["rl", *map(str, words)]) == 1
    assert frames.names == ["main", "rl", "run"]
    assert len([*frames.names, "train"]) <= LONGEST
    assert "the loop was reached" in (tmp_path / "run" / "status.json").read_text()
