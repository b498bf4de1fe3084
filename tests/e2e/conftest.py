"""What most runs of these tests need; a module with other wishes has a ``world`` of its own."""

from pathlib import Path

import pytest

from tests.rl_world import make_rl_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, prompts and a reward function."""
    return make_rl_world(tmp_path_factory.mktemp("world"))
