"""Which runs of RL keep finished groups: those that write checkpoints to go on from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.run import rl
from togi.run.rl_setup import origin


@pytest.mark.parametrize(
    ("flags", "stores"),
    [
        ("", False),
        ("--save_steps 2", True),
        ("--best_metric_key eval/reward --eval_dataset e --eval_steps 1", False),
        ("--save_steps 2 --save_hf_ckpt --disable_ds_ckpt", False),
    ],
)
def test_groups_are_kept_only_for_a_run_that_can_go_on(
    monkeypatch: pytest.MonkeyPatch, flags: str, *, stores: bool
) -> None:
    """A best model alone is no checkpoint: nothing would ever be removed."""
    made: list[bool] = []

    def ledger(directory: object, *, origin: str, stores: bool) -> None:
        made.append(stores)

    monkeypatch.setattr(rl, "Ledger", ledger)
    monkeypatch.setattr(rl, "Keep", lambda *_: None)
    config = parse(RLConfig, ["--pretrain", "m", "--prompt_data", "p", *flags.split()], "rl").config
    anything: Any = SimpleNamespace(
        aim=None, loader=None, environment=lambda *_: None, engines=SimpleNamespace(generate=None), directory=None
    )
    rl.RLRun(config, anything, anything, SimpleNamespace(rollouts=1), anything, anything)  # type: ignore[arg-type]
    assert made == [stores]


def test_groups_of_an_edited_environment_or_agent_are_another_origin(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("class Own: pass\n")
    words = ["--pretrain", "m", "--prompt_data", "p"]
    for flag, value in (("--environment", f"{file}:Own"), ("--agent", f"{file}:run")):
        config = parse(RLConfig, [*words, flag, value], "rl").config
        before = origin(config)
        assert origin(parse(RLConfig, [*words, flag, value, "--max_turns", "3"], "rl").config) != before
        file.write_text(file.read_text() + "# edited\n")
        assert origin(config) != before
