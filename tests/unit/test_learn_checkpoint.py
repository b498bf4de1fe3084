import json
import logging
from pathlib import Path

import pytest
import torch

from tests.learn_tools import CPU, critic, learner, max_difference, packs, rollouts, solo, weights
from togi.config.shared import ModelSettings
from togi.errors import CheckpointError
from togi.learn import checkpoint as module
from togi.learn import learner_state
from togi.learn.checkpoint import Checkpoint, CheckpointStore, damage
from togi.learn.learner import Learner
from togi.learn.learner_state import check_adapter, expected_bytes, load_learner, save_learner
from togi.learn.objective import ValueObjective
from togi.parallel import trainable
from togi.parallel.backend import BackendOptions
from togi.parallel.process import World

IDENTITY = {"model": "tiny"}


def save(store: CheckpointStore, step: int, content: bytes = b"weights") -> None:
    with store.write(step, {"episode": step * 10}, len(content)) as folder:
        (folder / "actor").mkdir()
        (folder / "actor" / "data").write_bytes(content)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_written_renamed_pointed_to_and_rotated(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, max_num=2)
    assert store.latest() is None
    for step in (5, 10, 15):
        save(store, step)
    assert names(tmp_path) == ["latest", "step_00000010", "step_00000015"]
    assert (tmp_path / "latest").read_text() == "step_00000015"
    latest = store.latest()
    assert (latest.step, latest.state) == (15, {"episode": 150})


def test_the_newest_is_kept_even_when_it_alone_is_too_large(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, max_num=3, max_gb=1e-6)
    save(store, 1)
    save(store, 2, b"x" * 5000)
    assert names(tmp_path) == ["latest", "step_00000002"]


def test_the_pointer_says_which_is_the_newest(tmp_path: Path) -> None:
    """A run that goes on from step 10, as 15 and 20 were damaged, or another run's, is resumed and pruned as itself."""
    store = CheckpointStore(tmp_path, max_num=3)
    for step in (10, 15, 20):
        save(store, step)
    (tmp_path / "latest").write_text("step_00000010")
    assert store.latest().step == 10
    save(store, 11)
    assert names(tmp_path) == ["latest", "step_00000010", "step_00000011", "step_00000020"]
    save(store, 12)
    assert names(tmp_path) == ["latest", "step_00000010", "step_00000011", "step_00000012"]
    (tmp_path / "step_00000012" / "manifest.json").unlink()
    assert store.latest().step == 11
    (tmp_path / "latest").unlink()
    save(CheckpointStore(tmp_path, max_num=9), 13)
    (tmp_path / "latest").unlink()
    assert store.latest().step == 13


def test_a_killed_save_leaves_the_last_good_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5)
    killed = store.begin(10, 0)
    (killed / "data").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        assert store.latest().step == 5
    assert str(killed) in caplog.text
    save(store, 12)
    assert names(tmp_path) == ["latest", "step_00000005", "step_00000012"]


def test_a_kill_before_the_pointer_is_renamed_does_not_stop_the_next_save(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5)
    (tmp_path / ".unfinished_latest").write_text("step_00000005")  # what such a kill leaves: a file, no folder
    save(store, 6)
    assert names(tmp_path) == ["latest", "step_00000005", "step_00000006"]


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (lambda path: (path / "actor" / "data").write_bytes(b"weigh"), "has 5 bytes, expected 7"),
        (lambda path: (path / "actor" / "data").write_bytes(b"WEIGHTS"), "does not match its hash"),
        (lambda path: (path / "actor" / "data").unlink(), "is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_text('{"schema"'), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_one_is_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, harm, word: str) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5)
    save(store, 10)
    harm(tmp_path / "step_00000010")
    assert word in damage(tmp_path / "step_00000010")
    with caplog.at_level(logging.WARNING):
        assert store.latest().step == 5
    assert "step_00000010" in caplog.text


def test_a_full_disk_is_an_error_before_and_leaves_nothing_during(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, max_num=1)
    save(store, 5)
    with pytest.raises(CheckpointError, match=r"needs .* TB and .* free: make room"):
        store.begin(10, 10**18)
    with pytest.raises(CheckpointError, match="No space left"), store.write(10, {}, 0):
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt), store.write(10, {}, 0):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["latest", "step_00000005"]
    assert store.latest().step == 5


def test_a_kill_between_write_and_rename_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, max_num=1)
    save(store, 5)

    def die(path: Path) -> None:
        raise SystemExit

    monkeypatch.setattr(module, "_flush", die)
    with pytest.raises(SystemExit):
        save(store, 10)
    assert store.latest().step == 5


def test_resumed_equals_uninterrupted_and_differs_from_cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_state, "MAX_FILE_BYTES", 100_000)
    first = solo(bf16=True)
    for step in range(2):
        first.update(packs(rollouts(3, seed=step), [3]))
    save_learner(first, tmp_path, IDENTITY)
    drawn = torch.rand(2)
    last = packs(rollouts(3, seed=9), [3])
    first.update(last)

    second = solo(bf16=True)
    load_learner(second, tmp_path, IDENTITY)
    assert torch.equal(torch.rand(2), drawn)
    assert second.steps == 2
    second.update(last)
    assert max_difference(weights(first.backend), weights(second.backend)) == 0.0

    cold = solo(bf16=True)
    load_learner(cold, tmp_path, IDENTITY)
    for state in cold.backend._optimizer.state.values():
        state["exp_avg"].zero_()
    cold.update(last)
    assert max_difference(weights(first.backend), weights(cold.backend)) > 1e-5
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    written = sum(file.stat().st_size for file in files)
    assert expected_bytes(first) < written < 1.1 * expected_bytes(first)


def test_another_run_is_refused_with_the_differences(tmp_path: Path) -> None:
    save_learner(solo(), tmp_path, IDENTITY)
    with pytest.raises(CheckpointError, match="model is large, the checkpoint has tiny"):
        load_learner(solo(), tmp_path, {"model": "large"})
    backend = trainable(critic(), World.solo(CPU), BackendOptions(bf16=False))
    other = Learner(backend, ValueObjective(0.2), learner(backend).schedule, 1.0)
    with pytest.raises(CheckpointError, match=r"hf\.score\.weight is not expected"):
        load_learner(other, tmp_path, IDENTITY)


@pytest.mark.parametrize(
    ("rank", "alpha", "sentence"),
    [
        (4, 16, ""),
        (
            8,
            16,
            "has an adapter of rank 4, but --lora_rank is 8 here: go on with --lora_rank 4, or choose another --ckpt_path.",
        ),
        (
            4,
            64,
            "has an adapter of alpha 16, but --lora_alpha is 64 here: go on with --lora_alpha 16, or choose another ",
        ),
        (
            0,
            16,
            "has an adapter of rank 4, but --lora_rank is 0 here: go on with --lora_rank 4, or choose another --ckpt_path.",
        ),
    ],
)
def test_an_adapter_goes_on_with_its_rank_and_scale(tmp_path: Path, rank: int, alpha: int, sentence: str) -> None:
    (tmp_path / "actor").mkdir()
    record = {"parameters": {"layer.lora_A.default.weight": [4, 64], "layer.lora_B.default.weight": [64, 4]}}
    (tmp_path / "actor" / "learner.json").write_text(json.dumps(record))
    settings = ModelSettings(lora_rank=rank, lora_alpha=alpha)
    try:
        check_adapter(Checkpoint(tmp_path, 1, {"lora_alpha": 16}), "actor", settings)
        check_adapter(Checkpoint(tmp_path, 1, {}), "actor", settings)
    except CheckpointError as error:
        assert sentence and str(error).startswith(f"The checkpoint {tmp_path}/actor {sentence}")
    else:
        assert not sentence


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with store.write(3, {"seed": 1}, 0) as folder:
        save_learner(solo(), folder / "actor", IDENTITY)
    manifest = json.loads((tmp_path / "step_00000003" / "manifest.json").read_text())
    assert set(manifest["files"]) == {
        "state.json",
        "actor/learner.json",
        "actor/generators.json",
        "actor/tensors_00001.safetensors",
    }
