"""The best model's folder through every crash, and what decides which model is the best."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import pytest

from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.errors import CheckpointError, ConfigError
from togi.learn.checkpoint import Aim, Best, BestStore, CheckpointStore, better
from togi.methods import check_method
from togi.methods.dpo import DPO
from togi.methods.method import Method
from togi.methods.rm import RM
from togi.methods.sft import SFT
from togi.run.plan import check_rl_metric, offline_aim, rl_aim

LOSS, REWARD = Aim("eval/loss", highest=False), Aim("eval/reward", highest=True)


def write(store: BestStore, value: float, step: int, aim: Aim = LOSS) -> None:
    with store.write(Best(aim, value, step)) as folder:
        (folder / "model").write_text(str(step))


def test_better_is_strictly_better_and_finite() -> None:
    assert better(LOSS, 2.0, None) and not better(LOSS, math.nan, None)
    best = Best(LOSS, 1.0, 3)
    assert [better(LOSS, value, best) for value in (0.9, 1.0, 1.1, math.nan, -math.inf)] == [True, *[False] * 4]
    assert [better(REWARD, value, Best(REWARD, 1.0, 3)) for value in (0.9, 1.0, 1.1, math.inf)] == [
        *[False] * 2,
        True,
        False,
    ]


def test_the_old_best_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    store = BestStore(tmp_path)
    write(store, 1.0, 1)
    with pytest.raises(RuntimeError), store.write(Best(LOSS, 0.5, 2)) as folder:
        (folder / "model").write_text("half")
        raise RuntimeError("killed")
    assert store.read() == Best(LOSS, 1.0, 1)
    assert (store.folder / "model").read_text() == "1"
    write(store, 0.5, 2)
    assert store.read() == Best(LOSS, 0.5, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    store = BestStore(tmp_path)
    write(store, 1.0, 1)
    write(BestStore(tmp_path / "other"), 0.5, 2)
    store.folder.rename(tmp_path / ".best_old")
    (tmp_path / "other" / "best").rename(tmp_path / ".best_new")
    assert store.read() == Best(LOSS, 0.5, 2)
    store.folder.rename(tmp_path / ".best_old")  # only the old one is left
    assert store.read() == Best(LOSS, 0.5, 2)


@pytest.mark.parametrize(
    ("saved", "there", "expected"), [(None, None, None), (0.9, None, 0.9), (0.9, 0.7, 0.7), (0.5, 0.7, 0.5)]
)
def test_a_resume_goes_on_from_the_better_of_both_records(
    tmp_path: Path, saved: float | None, there: float | None, expected: float | None
) -> None:
    """The checkpoint may be older than the best model (a crash after it), or the folder may be gone."""
    store = BestStore(tmp_path)
    if there is not None:
        write(store, there, 8)
    best = store.resumed(LOSS, asdict(Best(LOSS, saved, 2)) if saved is not None else None)
    assert (best.value if best is not None else None) == expected


def test_a_resume_by_another_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the lowest eval/loss, this run asks for the highest eval/reward"):
        BestStore(tmp_path).resumed(REWARD, asdict(Best(LOSS, 1.0, 2)))


def test_pruning_leaves_the_best_alone(tmp_path: Path) -> None:
    write(BestStore(tmp_path), 1.0, 1)
    store = CheckpointStore(tmp_path, max_num=1, max_gb=1e-9)
    for step in (1, 2):
        with store.write(step, {}, 0) as folder:
            (folder / "weights").write_text("x" * 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "latest", "step_00000002"]


HELD_OUT = "--pretrain m --dataset d.jsonl --eval_dataset e.jsonl"


def aim(config_class: type[Method], flags: str) -> Aim | None:
    parsed = parse(config_class, f"{HELD_OUT} {flags}".split(), "x")
    return offline_aim(parsed.config)


def test_the_direction_follows_from_the_metric() -> None:
    assert aim(SFT, "") is None
    assert aim(SFT, "--best_metric_key none") is None
    assert aim(SFT, "--best_metric_key eval/loss") == LOSS
    assert aim(SFT, "--best_metric_key perplexity") == Aim("eval/perplexity", highest=False)
    assert aim(RM, "--best_metric_key accuracy") == Aim("eval/accuracy", highest=True)
    assert aim(DPO, "--best_metric_key reward/margin") == Aim("eval/reward/margin", highest=True)
    lowest = aim(DPO, "--best_metric_key eval/reward/rejected --best_metric_mode min")
    assert lowest == Aim("eval/reward/rejected", highest=False)
    rl = RLConfig(best_metric_key="eval/math/pass4", eval_n_samples_per_prompt=4)
    assert rl_aim(rl, ["math"]) == Aim("eval/math/pass4", highest=True)
    assert rl_aim(RLConfig(best_metric_key="reward"), []) == REWARD


def test_a_metric_that_is_not_measured_is_an_early_error() -> None:
    with pytest.raises(ConfigError, match="an evaluation of this run has eval/loss, eval/perplexity: choose one"):
        aim(SFT, "--best_metric_key accuracy")
    with pytest.raises(ConfigError, match="say which with --best_metric_mode"):
        aim(DPO, "--best_metric_key reward/rejected")
    check_rl_metric(RLConfig(best_metric_key="math/pass4", eval_n_samples_per_prompt=4))
    with pytest.raises(
        ConfigError,
        match="eval/reward, eval/length, eval/truncated_share, eval/math/pass1, eval/math/pass2, eval/math/pass4",
    ):
        check_rl_metric(RLConfig(best_metric_key="math/pass8", eval_n_samples_per_prompt=4))
    with pytest.raises(ConfigError, match="eval/gsm/pass1"):
        rl_aim(RLConfig(best_metric_key="math/pass1"), ["gsm"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--best_metric_key eval/loss", "--best_metric_key eval/loss is measured on held-out data: add --eval_dataset"),
        (
            "--eval_dataset e --best_metric_mode max",
            "--best_metric_mode max says which values are good, but of no metric",
        ),
    ],
)
def test_flags_that_need_each_other(flags: str, sentence: str) -> None:
    words = f"--pretrain m --dataset d.jsonl --output_key a {flags}".split()
    with pytest.raises(ConfigError, match=sentence):
        check_method(parse(SFT, words, "sft"))
