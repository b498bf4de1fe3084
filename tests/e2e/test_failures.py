"""What ends a run from outside or by its own numbers: the last good checkpoint stays, and one page says how to go on."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.rl_world import GRPO, HF, command, metrics, model_bytes
from togi.cli.main import main
from togi.learn.checkpoint import CheckpointStore
from togi.obs.rollout_store import RolloutStore, Split
from togi.run.journal import claimed

pytestmark = pytest.mark.busy

FLAGS = [*GRPO, *HF, "--full_determinism", "--num_episodes", "2", "--save_steps", "1", "--workers", "local"]
STEPS = 6


def train(world: Path, run: Path, *flags: str) -> int:
    return main(["rl", *command(world, run, *FLAGS, *flags)[3:]])


@pytest.fixture(scope="module")
def calm(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("calm") / "run"
    assert train(world, run) == 0
    return run


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_at(step: int, write: Callable[..., int]) -> Callable[..., int]:
    """``RolloutStore.write``, which finds a full disk at that step."""

    def full(self: RolloutStore, number: int, split: Split, rows: Any) -> int:
        with pytest.MonkeyPatch.context() as patch:
            if number == step and self.folder.name == "rollouts":
                patch.setattr("togi.obs.rollout_store.pq.write_table", no_room)
            return write(self, number, split, rows)

    return full


def committing(step: int, commit: Callable[..., None]) -> Callable[..., None]:
    """``CheckpointStore.commit``, which finds a full disk at that step."""

    def full(self: CheckpointStore, folder: Path, number: int, state: Any) -> None:
        if number == step:
            no_room()
        commit(self, folder, number, state)

    return full


def is_like(run: Path, calm: Path) -> None:
    assert [record["step"] for record in metrics(run)] == list(range(1, STEPS + 1))
    assert model_bytes(run / "model") == model_bytes(calm / "model")


@pytest.mark.parametrize("full", ["checkpoint", "rollouts"])
def test_a_full_disk_keeps_the_last_checkpoint_and_the_command_goes_on(
    world: Path, tmp_path: Path, calm: Path, full: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        if full == "checkpoint":
            patch.setattr(CheckpointStore, "commit", committing(3, CheckpointStore.commit))
        else:
            patch.setattr(RolloutStore, "write", full_at(3, RolloutStore.write))
        assert train(world, run) == 2
    errors = capsys.readouterr().err
    assert "No space left on device" in errors and "make room there" in errors
    page = (run / "failure.md").read_text()
    assert "make room there" in page and f"in step {4 if full == 'checkpoint' else 3} of 6" in page
    (resume,) = re.findall(r"The run goes on from its checkpoint of step 2 by: cd (.*) && togi (.*)", page)
    assert main(shlex.split(resume[1])) == 0
    is_like(run, calm)


def test_weights_that_became_infinite_end_the_run_and_leave_the_checkpoint_before(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(world, run, "--max_steps", "2") == 0
    rates = ["--actor_learning_rate", "1e38", "--lr_scheduler", "constant", "--max_norm", "0"]
    assert train(world, run, "--load_checkpoint", *rates) == 1
    errors = capsys.readouterr().err
    assert "not finite" in errors and "Traceback" not in errors
    page = (run / "failure.md").read_text()
    assert "not finite" in page and "ower " in page  # the learning rate
    assert "in step 3 of 6, syncing weights" in page
    assert "The run goes on from its checkpoint of step 2 by: " in page


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_taken(
    world: Path, tmp_path: Path, calm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    assert train(world, run, "--max_steps", "3") == 0
    newest = run / "checkpoints" / "step_00000003"
    state = newest / "state.json"
    state.write_bytes(state.read_bytes()[:-5])
    assert train(world, run, "--load_checkpoint") == 0
    assert f"skipping checkpoint {newest}: state.json has" in caplog.text
    assert [record["step"] for record in metrics(run)] == list(range(1, STEPS + 1))


def test_a_reward_process_that_is_killed_in_a_run_changes_nothing(world: Path, tmp_path: Path, calm: Path) -> None:
    """Every process of the reward function is killed once, after the second rollout."""
    run, killed = tmp_path / "run", list[int]()
    own = {child.pid for child in psutil.Process().children(recursive=True)}

    def write(self: RolloutStore, step: int, split: Split, rows: Any) -> int:
        if step == 2:
            for child in psutil.Process().children(recursive=True):
                if child.pid not in own and "togi" in " ".join(child.cmdline()):
                    killed.append(child.pid)
                    child.kill()
        return original(self, step, split, rows)

    original = RolloutStore.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutStore, "write", write)
        assert train(world, run) == 0
    assert killed
    is_like(run, calm)


def test_a_reward_that_fails_too_often_leaves_a_checkpoint_of_the_last_step(
    world: Path, tmp_path: Path, calm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints are due only every 100 steps; the models are whole when a reward fails, so the last step is kept."""
    run, reward = tmp_path / "run", world / "reward.py"
    source = reward.read_text()
    try:
        reward.write_text(
            source + "\nimport itertools\nCALLS = itertools.count()\nright = reward_func\n"
            "def reward_func(queries, prompts, labels):\n    assert next(CALLS) < 12, 'out of order'\n"
            "    return right(queries, prompts, labels)\n"
        )
        assert train(world, run, "--save_steps", "100", "--reward_workers", "1") == 2
    finally:
        reward.write_text(source)
    last = metrics(run)[-1]["step"]
    errors = capsys.readouterr().err
    assert "out of order" in errors and f"The run goes on from its checkpoint of step {last} by: " in errors
    assert train(world, run, "--load_checkpoint") == 0
    is_like(run, calm)


def test_two_runs_cannot_share_a_run_folder(
    world: Path, tmp_path: Path, calm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    apart = ["--save_path", str(tmp_path / "model"), "--ckpt_path", str(tmp_path / "checkpoints")]
    with claimed("run_dir", str(run)):
        assert train(world, run, *apart) == 2
    assert f"Another run is writing into --run_dir {run}" in capsys.readouterr().err
    assert train(world, run, *apart) == 0


def test_secrets_are_not_on_the_page(world: Path, tmp_path: Path) -> None:
    """The page of a run that fails does not hold a key of the environment that an error quotes."""
    run = tmp_path / "run"
    program = (
        "import sys; from togi.run import rl; from togi.errors import RunError\n"
        "async def train(*_): raise RunError('it said abcdefgh-of-the-environment')\n"
        "rl.train = train\n"
        "from togi.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", program, "rl", *command(world, run, *FLAGS)[3:]]
    environment = os.environ | {"SOME_API_KEY": "abcdefgh-of-the-environment"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    page = (run / "failure.md").read_text()
    assert "it said <redacted>" in page
